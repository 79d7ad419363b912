"""How far vLLM comes from koff in each dtype: what the bounds of ``koff serve --check`` rest on.

Each saved model goes on with random prompts, without a memory and with each, in koff as it was
saved and in vLLM in each dtype. The largest difference of log-probabilities up to the first token
that differs is rounding, if nothing is wrong. Beside it stands how many samples of memories the
check would refuse if vLLM had computed them without their memory.

    python -m bench.serve_rounding FOLDER... --python VLLM_PYTHON [--json FILE] [--prompts 16]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import koff
from koff.commands.serve import TESTED, take_samples
from koff_vllm.samples import CLOSE, NEW, Sample

from . import timing

# In vLLM's environment: the same prompts, in the given dtype.
VLLM = """
import json, sys
from pathlib import Path
import koff_vllm
from vllm import LLM, SamplingParams
folder, dtype, inputs, output = sys.argv[1:]
jobs = json.loads(Path(inputs).read_text())
own = {"dtype": dtype, "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 16}
llm = LLM(**koff_vllm.options(folder) | own)
greedy = SamplingParams(temperature=0, max_tokens=jobs["new"], logprobs=0, ignore_eos=True)
found = {}
for name in jobs["memories"]:
    prompts = [{"prompt_token_ids": ids} for ids in jobs["prompts"]]
    memory = koff_vllm.memory(folder, name or None)
    rows = []
    for output_of in llm.generate(prompts, greedy, lora_request=memory, use_tqdm=False):
        got = output_of.outputs[0]
        ids = list(got.token_ids)
        rows.append([ids, [step[i].logprob for step, i in zip(got.logprobs, ids)]])
    found[name] = rows
Path(output).write_text(json.dumps(found))
"""


def run_vllm(folder: Path, dtype: str, prompts: list[list[int]], names: list[str], python: str):
    """Memory -> for each prompt (ids, log-probabilities), of vLLM."""
    with tempfile.TemporaryDirectory() as place:
        inputs, output = Path(place) / "in.json", Path(place) / "out.json"
        inputs.write_text(json.dumps({"prompts": prompts, "memories": names, "new": NEW}))
        command = [python, "-c", VLLM, str(folder), dtype, str(inputs), str(output)]
        # One process, and a cache that leaves room for other work.
        small = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | small)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return json.loads(output.read_text())


def apart(sample: Sample, ids: list[int], logprobs: list[float]) -> float:
    """The largest difference up to the first token that differs: from there on texts do."""
    found = 0.0
    for place, (wanted, got) in enumerate(zip(sample.ids, ids, strict=True)):
        found = max(found, abs(sample.logprobs[place] - logprobs[place]))
        if wanted != got:
            break
    return found


def main() -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="that koff.save wrote")
    parser.add_argument("--python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=[*CLOSE])
    args = parser.parse_args()
    rows = []
    for folder in args.folders:
        model = koff.load(folder)
        names = ["", *model.koff.memory_names]
        rounds = [
            dict(zip(names, take_samples(model, [n or None for n in names], seed), strict=True))
            for seed in range(args.prompts)
        ]
        prompts = [samples[""].prompt for samples in rounds]
        for dtype in args.dtypes:
            got = run_vllm(folder, dtype, prompts, names, args.python)
            found, refused, missed = [], 0, []
            for name in names:
                for index, samples in enumerate(rounds):
                    sample = samples[name]
                    close = sample.close(dtype)
                    found.append(apart(sample, *got[name][index]))
                    refused += sample.difference(*got[name][index], close) is not None
                    if name:
                        wrong = sample.difference(*got[""][index], close) is None
                        missed.append(wrong)
            found.sort()
            row = {
                "model": folder.name,
                "koff": rounds[0][""].dtype,
                "vllm": dtype,
                "samples": len(found),
                "largest": found[-1],
                "median": found[len(found) // 2],
                "refused": refused,
                "without_memory": len(missed),
                "without_memory_refused": len(missed) - sum(missed),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {"settings": {"prompts": args.prompts, "new": NEW, "vllm": TESTED, "close": CLOSE}}
    timing.write(args.json, record | {"environment": timing.environment(1), "rows": rows})


if __name__ == "__main__":
    main()
