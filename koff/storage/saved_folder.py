"""The one door to a saved folder: whatever is read of it is opened here, and looked at first.

A folder may be damaged, half copied or hostile. ``SavedFolder`` reads koff.json when it is made;
every other file is asked for by its name. No file is opened that a link leads out of the folder,
and nothing in it is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import asker
from .files import DamagedFolder, File, digests
from .layout import MARKER, current, tokenizer_names
from .manifest import Manifest, seal_of


def open_saved(directory: str | Path) -> SavedFolder:
    """Open a local folder that is to hold a saved model, with its koff.json as it was saved.

    Args:
        directory: of the saved model; no hub id.

    Raises:
        FileNotFoundError, ValueError: not a saved model, or damaged.
    """
    directory = Path(directory)
    if not (current(directory) / MARKER).is_file():
        got = "a folder without koff.json" if directory.is_dir() else "no folder there"
        raise FileNotFoundError(
            f"{asker()}: {directory} must be a saved model, got {got}; give the folder that "
            "koff.save wrote"
        )
    folder = SavedFolder(directory)
    folder.check_seal()
    return folder


class SavedFolder:
    """A saved model's folder, each file of which is checked once before it is used.

    Args:
        directory: of the saved model. If a save was interrupted after its commit, the complete new
            version inside it is read.

    Attributes:
        directory: as it was given.
        path: where the files are.
        manifest: the content of koff.json. Its checksum is compared by ``check_seal``, which
            ``koff.load`` calls after the comparisons that can say more precisely what is wrong.

    Raises:
        FileNotFoundError, ValueError: no koff.json, or a malformed one.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.path = current(directory)
        self._roots = _allowed_roots(self.path)
        self._files: dict[str, File] = {}
        values = self.file(MARKER).json()
        self.manifest = Manifest.from_json(values)
        self._as_sealed = values.get("checksum") == seal_of(values)

    def check_seal(self) -> None:
        """Refuse a koff.json whose sealed fields are not what was saved.

        Raises:
            ValueError: another checksum.
        """
        if not self._as_sealed:
            raise DamagedFolder(f"{MARKER} must match its checksum, got another content")

    def file(self, name: str) -> File:
        """Return a file of the folder, after making sure, once, that it is there and that no link
        leads it out of here.

        Args:
            name: relative to ``path``, with "/" between the parts.

        Raises:
            FileNotFoundError, ValueError: it is not, or a link does.
        """
        if name not in self._files:
            self._files[name] = _inside(File(self.path / name), name, self._roots)
        return self._files[name]

    def beside(self, name: str) -> File:
        """Return a file that does not belong to the saved model but lies beside it, as a run's
        recipe, log and measurements do; checked as by ``file``.

        Args:
            name: relative to ``directory``, where it stays also while a new version is on its way.

        Raises:
            FileNotFoundError, ValueError: it is not there, or a link leads it out of here.
        """
        return _inside(File(self.directory / name), name, _allowed_roots(self.directory))

    def verify(self, names: Iterable[str]) -> None:
        """Refuse files whose sha256 is not the one that koff.json recorded.

        Raises:
            FileNotFoundError, ValueError: a missing, foreign or changed file.
        """
        names = sorted(names)  # of several damaged files the same is named each time
        for name in names:
            self.file(name)
        for name, got in digests(self.path, names).items():
            wanted = self.manifest.files.get(name)
            if wanted is None:
                raise DamagedFolder(f"{name} must be one of the files that were saved, got {got}")
            if got != wanted:
                raise DamagedFolder(f"{name} must have the sha256 {wanted}, got {got}")

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies here, also one that was put here later."""
        return any(
            (self.path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")
        )

    def load_tokenizer(self) -> Any:
        """Load the tokenizer that lies beside the model; runs no code from the folder.

        Raises:
            FileNotFoundError, ValueError: none there, one of its files is not as it was saved, or
                transformers cannot load it.
        """
        from transformers import AutoTokenizer  # slow, and a model needs none

        if not self.has_tokenizer:
            raise FileNotFoundError(
                f"{asker()}: {self.directory} must hold a tokenizer, got a folder without one; "
                "save the model again with tokenizer=..."
            )
        # Another tokenizer would load as well, and read other text without a word.
        self.verify(tokenizer_names(self.manifest.files))
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # transformers' and tokenizers' own, of many types
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{asker()}: the tokenizer in {self.directory} must be one that transformers "
                f"loads, got {type(error).__name__}: {first}; save the model again with "
                "tokenizer=..."
            ) from error


def _inside(file: File, name: str, roots: list[Path]) -> File:
    """Return the file, unless a link leads it out of these folders."""
    real = file.path.resolve()
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{asker()}: {name} must lie in its folder, got a link to {real}; copy the "
            "folder again, with its files instead of links"
        )
    return file


def _allowed_roots(directory: Path) -> list[Path]:
    """Return where a folder's files may lie: in it or, if it is a snapshot in huggingface_hub's
    cache (models--X/snapshots/REVISION), also among the blobs that the cache links to."""
    real = directory.resolve()
    repo = real.parent.parent
    if real.parent.name == "snapshots" and repo.name.startswith("models--"):
        return [real, repo / "blobs"]
    return [real]
