"""What is measured on: the GPU's name, versions and condition, and what a run needs installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import traceback

import torch

from .. import timing

# name to import -> distribution to install
NEEDED = {
    "triton": "triton",
    "pytest": "pytest",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",  # this one and the rest are koff's own
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
    "typer": "typer",
    "rich": "rich",
}
DRY_NAME = "dry"
TOOLS = ("gcc", "ncu", "compute-sanitizer", "nvidia-smi")
_QUERY = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "temperature.gpu",
    "clocks_event_reasons.active",
)
_OLD_QUERY = (*_QUERY[:-1], "clocks_throttle_reasons.active")  # its name before driver 535


def missing(dry: bool) -> str | None:
    """One line about the first thing a run cannot do without, None if all is there."""
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            step = f"install it into the Python that runs this, or carry its wheel: {package}"
            return f"bench.gpu: package {package} must be installed, got none; {step}"
    if not dry and not torch.cuda.is_available():
        step = "--dry-run runs every part at tiny sizes on the CPU"
        return f"bench.gpu: a CUDA GPU must be visible to torch, got none; {step}"
    return None


def slug(name: str) -> str:
    """A GPU's name for file names: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-")


def describe(dry: bool) -> dict[str, object]:
    """The GPU: name, capability, multiprocessors, memory and L2 bytes, driver."""
    if dry:
        return {"name": DRY_NAME, "capability": [0, 0], "l2_bytes": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", 50 << 20),
        "cuda": torch.version.cuda,
        "driver": (_smi("driver_version") or [None])[0],
    }


def _smi(*fields: str) -> list[str] | None:
    """Values of nvidia-smi's query fields, None where the tool does not answer."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return values if len(values) == len(fields) else None


def condition() -> dict[str, str] | None:
    """Clocks, power, temperature and throttle reasons now, None where nvidia-smi is silent."""
    values = _smi(*_QUERY) or _smi(*_OLD_QUERY)
    return None if values is None else dict(zip(_QUERY, values, strict=True))


def environment(dry: bool) -> dict[str, object]:
    """Versions, processor and GPU, without anything that identifies the machine."""
    return {**timing.environment(torch.get_num_threads()), "gpu": describe(dry)}


def words_of(dry: bool) -> str:
    """The machine in one line: GPU, versions, and the tools that are there."""
    gpu = DRY_NAME if dry else torch.cuda.get_device_name(0)
    versions = [f"{p} {timing.version_of(p)}" for p in ("torch", "triton", "transformers", "peft")]
    # Triton compiles the stub that launches a kernel by a C compiler.
    tools = [f"{name}{'' if shutil.which(name) else ' is missing'}" for name in TOOLS]
    return ", ".join((gpu, *versions, *tools))


def without_paths(text: str, limit: int) -> str:
    """The end of ``text``, at most ``limit`` characters, with folders cut off its file names."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", "", text).strip()[-limit:]


def words(error: BaseException) -> str:
    """An error in one line: its type, its first line and, of a long one, its last."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0][:200]} ... {lines[-1][-150:]}"
    return f"{type(error).__name__}: {without_paths(text, 400)}"


def trace(error: BaseException) -> str:
    """Where it was raised, and the end of what it says."""
    text = "".join(traceback.format_exception(error))
    return without_paths(text, 4000)
