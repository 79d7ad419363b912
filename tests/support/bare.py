"""A Python that has transformers and peft, but no koff: for what others do with saved files."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]

NO_KOFF = """
import importlib.util
for name in ("koff", "koffkernels"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported"
"""

# Loads every job's folder with stock libraries and writes what it computes.
COMPUTE = """
import json, sys
import torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
for job in json.loads(Path(sys.argv[1]).read_text()):
    trust = {"trust_remote_code": True} if job["narrow"] else {}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **trust).eval()
    owner = type(model).__module__.split(".")[0]
    assert owner == ("transformers_modules" if job["narrow"] else "transformers"), owner
    if job["lora"]:
        model.load_adapter(job["lora"])
    if job["kv"]:
        model = PeftModel.from_pretrained(model, job["kv"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], **trust)
    ids = load_file(job["inputs"])["ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        text = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False
        )
    states = {f"hidden_{i}": h.contiguous() for i, h in enumerate(out.hidden_states)}
    save_file({"logits": out.logits.contiguous(), **states}, job["output"])
    texts = tokenizer.batch_decode(text, skip_special_tokens=True)
    Path(job["output"]).with_suffix(".json").write_text(json.dumps(texts))
"""


def make_python(folder: Path) -> Path:
    """A virtual environment that sees this one's packages. What was installed in development mode
    is found through .pth files, which are not followed from another .pth file: so koff is not."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (site / "parent.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return folder / "bin" / "python"


def run(python: Path | str, code: str, *args: object, cwd: Path, **env: str) -> str:
    """Run code in a fresh process, away from this repository and from the network."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    own |= {"HF_HOME": str(cwd / ".hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    command = [str(python), "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compute(python: Path, jobs: list[dict], place: Path) -> None:
    """Run COMPUTE without koff; a job names folder, lora, kv, narrow, inputs and output."""
    place.mkdir(exist_ok=True)
    (place / "jobs.json").write_text(json.dumps(jobs))
    run(python, NO_KOFF + COMPUTE, place / "jobs.json", cwd=place)
