"""An id of the Hugging Face hub works wherever a saved model's folder does."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import asker

# What a saved model consists of. No code is downloaded, and no format that can hold any.
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.md", "*.jinja", "*.model")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")  # a revision may be a branch "a/b"


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a saved model: a local one as it is, or a snapshot of a hub repository.

    Args:
        source: a folder; or, where none exists, "user/repo" or "user/repo@revision".
        revision: branch, tag or commit of the repository; None: what ``source`` says, else "main".

    Returns:
        The folder. A snapshot lies in the cache of huggingface_hub (``HF_HOME``) and is not to be
        changed; with ``HF_HUB_OFFLINE=1`` only the cache is asked.

    Raises:
        FileNotFoundError: no such folder and no such repository, or it cannot be reached.
        ValueError: a revision for a local folder.
    """
    text = str(source)
    if Path(source).exists() or not _ID.fullmatch(text):
        if revision is not None:
            raise ValueError(
                f"{asker()}: revision must be left out for a folder, got {revision!r}; give the id "
                "of a hub repository"
            )
        return Path(source)
    from huggingface_hub import snapshot_download

    repo, _, named = text.partition("@")
    try:
        folder = snapshot_download(
            repo, revision=revision or named or None, allow_patterns=list(PATTERNS)
        )
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors there
        raise FileNotFoundError(
            f"{asker()}: {text!r} must be an existing folder or a repository of the hub that can "
            f"be read, got neither ({type(error).__name__}: {str(error).strip().splitlines()[0]}); "
            "correct it, or log in"
        ) from error
    return Path(folder)
