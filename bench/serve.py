"""Requests per second and time to the first token, of vLLM by `koff serve` and of koff's generate.

Three backbones of one base model (dense, equal widths, different widths) with eight memories that
are random, since speed does not depend on what they say; for each, the same load of random prompts
without a memory, with one, and with eight mixed, LoRA alone and LoRA with learned keys. The peer is
``model.generate`` on batches as large as there are clients.

    python -m bench.serve MODEL --python VLLM_PYTHON [--json FILE] [--requests 64] [--clients 8]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import koff
from koff.commands.serve import TESTED

from . import timing

MEMORIES = 8
BACKBONES = {"dense": None, "equal widths": "uniform", "different widths": "global"}
LOADS = {
    "no memory": (None,),
    "one, LoRA": ("lora0",),
    "one, LoRA and keys": ("both0",),
    "eight, LoRA": tuple(f"lora{i}" for i in range(MEMORIES)),
    "eight, LoRA and keys": tuple(f"both{i}" for i in range(MEMORIES)),
}
Job = tuple[str | None, list[int]]  # memory, prompt


def make(base: str, per_layer: str | None, folder: Path, keys: int, multiple: int = 64) -> None:
    """Save a backbone at 40 % sparsity, or dense, with eight memories of both kinds."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = koff.KoffConfig(
        memories=tuple(f"both{i}" for i in range(MEMORIES)),
        target_sparsity=0.4 if per_layer else 0,
        lora=koff.LoRAConfig(r=16, alpha=32, target_modules="all-linear"),
        kv=koff.KVConfig(num_tokens=keys, init="tokens"),
    )
    koff.attach(model, config)
    with torch.no_grad():
        for name, p in model.koff.named_parameters():
            if "memories" in name or "log_alpha" in name:
                p.add_(torch.randn_like(p) * 0.02)
    if per_layer:
        koff.binarize(model, per_layer=per_layer, multiple_of=multiple)
        model = koff.compact(model, inplace=True)
    koff.save(model, folder, tokenizer=AutoTokenizer.from_pretrained(base))
    for i in range(MEMORIES):
        koff.import_memory(folder, f"lora{i}", lora=folder / f"memories/both{i}/lora")


def jobs(memories: tuple[str | None, ...], args: argparse.Namespace, vocab: int) -> list[Job]:
    """Random prompts, the memories in turn."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, vocab) for _ in range(args.prompt)] for _ in range(args.requests)]
    return [(memories[i % len(memories)], prompt) for i, prompt in enumerate(prompts)]


def row_of(seconds: float, first: list[float], args: argparse.Namespace) -> dict[str, float]:
    """What a load took, as rates and times."""
    row = {"requests_per_s": args.requests / seconds}
    row["tokens_per_s"] = args.requests * args.new / seconds
    if first:
        row["first_token_median_s"] = statistics.median(first)
        row["first_token_p95_s"] = sorted(first)[int(0.95 * (len(first) - 1))]
    return row


def ask(port: int, job: Job, new: int) -> float:
    """Seconds to the first token of one request, which is then read to its end."""
    body = {"model": job[0] or "backbone", "prompt": job[1], "max_tokens": new}
    body |= {"temperature": 0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    start, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=600) as lines:
        for line in lines:
            if first is None and line.startswith(b"data: {"):
                first = time.perf_counter() - start
    return first


def measure_vllm(folder: Path, args: argparse.Namespace, vocab: int) -> dict[str, dict]:
    """Every load on one server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "koff.cli", "serve", str(folder), "--python", args.python]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-check",
        "--no-enable-log-requests",
    ]
    command += ["--max-num-seqs", str(args.clients), "--max-model-len", str(args.room)]
    # Unasked, vLLM on the CPU reserves a share of all memory for its cache, and does not start
    # where others use it. These requests fit into 1 GiB.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, env=environment
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text()[-2000:]) from None
                time.sleep(1)
        found = {}
        with ThreadPoolExecutor(args.clients) as pool:
            for name, memories in LOADS.items():
                load = jobs(memories, args, vocab)
                # Once for each memory: adapters are loaded, and nothing is compiled later.
                list(pool.map(lambda job: ask(port, job, args.new), load[: len(memories)]))
                load = [(memory, prompt[::-1]) for memory, prompt in load]  # not from its cache
                start = time.perf_counter()
                first = list(pool.map(lambda job: ask(port, job, args.new), load))
                found[name] = row_of(time.perf_counter() - start, first, args)
        return found
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        log.close()


@torch.no_grad()
def measure_generate(folder: Path, args: argparse.Namespace, vocab: int) -> dict[str, dict]:
    """Every load by koff in this process, in batches."""
    model, found = koff.load(folder), {}
    for name, memories in LOADS.items():
        load = jobs(memories, args, vocab)
        batches = [load[i : i + args.clients] for i in range(0, len(load), args.clients)]
        for timed in (batches[:1], batches):
            start = time.perf_counter()
            for batch in timed:
                ids = torch.tensor([prompt for _, prompt in batch])
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    memory=[memory for memory, _ in batch],
                    max_new_tokens=args.new,
                    min_new_tokens=args.new,
                    do_sample=False,
                )
            seconds = time.perf_counter() - start
        found[name] = row_of(seconds, [], args)
    return found


def main() -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or id of a base model")
    parser.add_argument("--python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--keys", type=int, default=128, help="learned keys of a memory")
    args = parser.parse_args()
    args.room = args.keys + args.prompt + args.new + 1
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for backbone, per_layer in BACKBONES.items():
            folder = Path(place) / backbone.replace(" ", "-")
            make(args.model, per_layer, folder, args.keys)
            vocab = koff.load(folder).config.vocab_size
            for engine, measure in (("vLLM", measure_vllm), ("generate", measure_generate)):
                for load, row in measure(folder, args, vocab).items():
                    rows.append({"backbone": backbone, "engine": engine, "load": load, **row})
                    words = (f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1].values())
                    print("  ".join(words), flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("python", "json", "model")}
    settings |= {"model": Path(args.model).name, "vllm": TESTED}
    record = {"settings": settings, "environment": timing.environment(torch.get_num_threads())}
    timing.write(args.json, record | {"rows": rows})


if __name__ == "__main__":
    main()
