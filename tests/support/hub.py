"""koffkernels as kernel-builder lays it out for the Hugging Face hub."""

import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import torch

from .imports import ROOT

BUILD = tomllib.loads((ROOT / "build.toml").read_text())


def variant(folder: Path, identifier: str) -> Path:
    """A repository on disk with one build for this torch, as kernel-builder lays it out."""
    # A torch with CUDA asks for that also where there is no GPU.
    backend = "cpu" if torch.version.cuda is None else "cuda"
    build = folder / identifier / "build" / f"torch-{backend}"
    source = ROOT / "torch-ext" / BUILD["general"]["name"]
    endings = BUILD["torch-noarch"]["pyext"]

    def others(where: str, names: list[str]) -> list[str]:
        files = [n for n in names if (Path(where) / n).is_file()]
        return [n for n in files if n.rpartition(".")[2] not in endings] + ["__pycache__"]

    shutil.copytree(source, build, ignore=others)
    digests = {
        path.relative_to(build).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(build.rglob("*"))
        if path.is_file()
    }
    general = BUILD["general"]
    metadata = {
        "name": general["name"],
        "id": identifier,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (build / "metadata.json").write_text(json.dumps(metadata))
    return folder / identifier
