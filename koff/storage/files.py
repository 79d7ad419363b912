"""One file at a time, from a folder that nobody vouches for: JSON, safetensors, and their hashes.

Nothing here can execute, and nothing is allocated by what a file claims: a JSON file is measured
before it is read, and of safetensors the header can be read alone. torch is imported for the first
tensor: to say what a folder holds needs none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ..errors import asker

if TYPE_CHECKING:
    from torch import Tensor

# Names of dtypes in safetensors' headers that a weight may have: no integers, no 8-bit floats.
FLOATING = ("F16", "BF16", "F32", "F64")

# The largest JSON of a model is an index or a tokenizer of some MB. More than 64 MiB is an accident
# or an attack: Python's parser needs many times a file's size.
_MOST_JSON = 1 << 26
_FEW_BYTES = 1 << 24  # 16 MiB are hashed before a pool of threads has started
_BLOCK = 1 << 22  # hashlib releases the GIL for blocks, and no file need fit into memory
_THREADS = 4  # sha256 runs at 1.4 GB/s on one core; with four, most disks are the limit

# Part of a path. Windows forbids some characters in names; a leading "." hides, or leads upwards.
# Longer or deeper names than these koff does not write.
_PART = r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}"
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,4}}")


class DamagedFolder(ValueError):
    """What lies in a folder is not what was saved there. There is one way out: copy it again.

    Args:
        fault: "<what> must <rule>, got <value>"; who asked and the way out are put around it.
    """

    def __init__(self, fault: str):
        super().__init__(f"{asker()}: {fault}; copy the folder again")


def is_plain(name: object) -> bool:
    """Whether a file's name is relative, leads nowhere else, and is legal on every system."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


class File:
    """One file that nobody vouches for. It is there when this is made, and nothing is read yet.

    Args:
        path: of a regular file, or of a link to one. A pipe would never end.

    Raises:
        FileNotFoundError: of something else, or of nothing.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            folder = path.parent
            got = f"no such file in {folder}" if folder.is_dir() else f"no folder {folder}"
            raise FileNotFoundError(
                f"{asker()}: {path.name} must be there, got {got}; check the folder"
            )
        self.path = path

    def json(self, kind: type = dict) -> Any:
        """Read JSON of at most 64 MiB.

        Args:
            kind: what it must hold: an object (dict) or a list.

        Raises:
            ValueError: too large, no JSON, or not of the kind.
        """
        size = self.path.stat().st_size
        if size > _MOST_JSON:
            raise ValueError(
                f"{asker()}: {self.path.name} must have at most {_MOST_JSON} bytes, got {size}; "
                "check the folder"
            )
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # "[[[[..." recurses
            raise DamagedFolder(f"{self.path.name} must be JSON, got {error}") from error
        if not isinstance(values, kind):
            wanted = "object" if kind is dict else "list"
            raise ValueError(
                f"{asker()}: {self.path.name} must hold a JSON {wanted}, "
                f"got {type(values).__name__}; check it"
            )
        return values

    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Read name -> (dtype, shape) of every tensor of a safetensors file, and no data.

        The library has checked that the tensors fill the file exactly, so sizes that agree with
        these are the file's real ones. A tensor without values fits any file, and is refused.

        Raises:
            ValueError: damaged, or a tensor without values.
        """
        try:
            # A header is the same for every framework, and "pt" would import torch.
            with safe_open(str(self.path), framework="np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                header = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        except Exception as error:  # the library's own, of several types
            raise DamagedFolder(
                f"{self.path.name} must be a safetensors file, got {error}"
            ) from error
        for name, (_, shape) in header.items():
            if 0 in shape:
                raise DamagedFolder(f"{name} in {self.path.name} must hold values, got {shape}")
        return header

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors of a safetensors file, onto the CPU.

        Raises:
            ValueError: damaged.
        """
        from safetensors.torch import load_file

        try:
            return load_file(str(self.path))
        except Exception as error:
            raise DamagedFolder(
                f"{self.path.name} must be a safetensors file, got {error}"
            ) from error


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return name -> sha256 of files below a folder, large ones several at a time."""
    paths = {name: folder / name for name in names}
    if sum(path.stat().st_size for path in paths.values()) < _FEW_BYTES:
        return {name: sha256(path) for name, path in paths.items()}
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return dict(zip(paths, pool.map(sha256, paths.values()), strict=True))
