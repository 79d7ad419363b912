"""Put a saved model on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .folder import MARKER, MEMORIES, current
from .hub import PATTERNS
from .io import save
from .modeling import REMOTE_FILE
from .revise import saved_facts


def push_to_hub(
    source: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload koff model",
    token: str | None = None,
) -> str:
    """Upload a saved model: one commit, after which the repository holds what the folder holds.

    Checkpoints and the training log stay here, and the local paths that ``koff train`` noted are
    left out.

    Args:
        source: folder of a saved model, or an attached model that could be saved.
        repo_id: "user/repo"; created if there is none.
        tokenizer: saved beside the model; for a model only.
        private: of a new repository; None: the account's default.
        revision: an existing branch to push to; None: main.
        message: of the commit.
        token: of the hub; None: the one that ``hf auth login`` stored, or ``HF_TOKEN``.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, ValueError: no saved model, or one that cannot be saved; nothing is
            uploaded then.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="koff-push-") as place:
        if isinstance(source, PreTrainedModel):
            source = save(source, Path(place, "saved"), tokenizer=tokenizer)
        staging = _portable(current(source), Path(place, "staging"))
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            revision=revision,
            commit_message=message,
            allow_patterns=[*PATTERNS, REMOTE_FILE],
            delete_patterns=[*PATTERNS, REMOTE_FILE],
        )
    return commit.commit_url


def _link(source: str, target: str) -> None:
    """A hard link where that works: nothing large is copied for an upload."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _portable(directory: Path, staging: Path) -> Path:
    """A copy of a saved model's folder without checkpoints, log and local paths."""
    facts = saved_facts(directory, "koff.push_to_hub")
    left = shutil.ignore_patterns("checkpoints", "train_log.json", ".*")
    shutil.copytree(directory, staging, copy_function=_link, ignore=left)
    listed = set(facts["memories"])
    for folder in staging.glob(f"{MEMORIES}/*"):
        if folder.name not in listed:  # left by an interrupted change
            shutil.rmtree(folder)
    for record in facts["metadata"].get("added", {}).values():
        record["root"] = "."
    _rewrite(staging / MARKER, facts)
    if (staging / "recipe.json").is_file():
        stored = json.loads((staging / "recipe.json").read_text(encoding="utf-8"))
        _rewrite(staging / "recipe.json", stored | {"root": "."})
    return staging


def _rewrite(path: Path, values: dict[str, Any]) -> None:
    path.unlink()  # or the linked original would change
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
