"""The whole path of a recipe on random weights of a true shape: does it go through, in how much
memory, and what does it leave on the disk?

What breaks at a size is seldom a number and mostly memory, so values do not matter: weights are
drawn once and written in the layout of a checkpoint, and from there on everything is what a user
runs. Each process's stages follow one another as in ``koff train``, and each is a row: seconds, the
most anonymous memory in it (the weights are mapped from their files, and the system may drop those
pages at any time), and what lies on the disk after it.

    python -m bench rehearse --model llama-3.2-3b --output DIR

A stage that is done is not done again: started anew in the same folder, it goes on from there, and
training from its last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import timing
from .memory import watched
from .models import LLAMA_3B, LLAMA_8B, Shape, llama_config

# Of each, whether input and output share one table.
MODELS = {
    "llama-3.2-3b": (LLAMA_3B, True),
    "llama-3.1-8b": (LLAMA_8B, False),
    "tiny": (Shape(64, 192, 3, 4, 2, 128), True),
}
STAGES = ("write", "load", "attach", "train", "compact", "save", "info", "generate", "export")
# Those of one process; any other has a process of its own, so that its peak is its own.
TRAINING = ("load", "attach", "train", "compact", "save")
RESULT = "rehearsal.json"
SHARD = 10**9  # bytes of one file of weights: no more is held while they are written


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


class Meter:
    """Measures stages, and tells each at once.

    Args:
        tell: takes a row.
        folder: whose size on the disk belongs to a row.
    """

    def __init__(self, tell: Callable[[dict], None], folder: Path):
        self.tell, self.folder = tell, folder

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what the block does."""
        start = time.perf_counter()
        with watched() as peaks:
            yield
        seconds, peak = time.perf_counter() - start, peaks["RssAnon"]
        row = {"stage": name, "seconds": seconds, "peak": peak, "disk": on_disk(self.folder)}
        self.tell(row)


def write_base(name: str, folder: Path) -> None:
    """Write a checkpoint of random weights in bf16, file by file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    shape, tied = MODELS[name]
    config = llama_config(
        shape, max_position_embeddings=131072, tie_word_embeddings=tied, dtype="bfloat16"
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    generator, places = torch.Generator().manual_seed(0), {}
    tensors, size, total = {}, 0, 0

    def end_file() -> None:
        nonlocal tensors, size
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        tensors, size = {}, 0

    for key, p in model.named_parameters():  # a tied table once
        values = torch.empty(p.shape, dtype=p.dtype)
        if p.dim() == 1:
            values.fill_(1.0)  # of a norm
        else:
            values.normal_(std=config.initializer_range, generator=generator)
        tensors[key] = values
        size, total = size + values.nbytes, total + values.nbytes
        if size >= SHARD:
            end_file()
    if tensors:
        end_file()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)  # last: it says that the rest is there


def train(args: argparse.Namespace, meter: Meter) -> None:
    """From the checkpoint to a saved model, as `koff train` goes."""
    import torch
    from transformers import AutoModelForCausalLM

    import koff
    from koff.commands.recipe import load_recipe
    from koff.training.arguments import KoffTrainingArguments
    from koff.training.checkpoint import last_complete
    from koff.training.trainer import KoffTrainer

    folder = args.output
    names = ("en", "fr", "es")
    if args.model == "tiny":
        config = koff.KoffConfig(memories=names, kv=koff.KVConfig(num_tokens=4))
    else:
        config = load_recipe(args.model).koff
    vocab = MODELS[args.model][0].vocab
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> list[dict]:
        ids = torch.randint(3, vocab, (tokens,), generator=generator).tolist()
        return [{"input_ids": ids, "labels": ids}]

    # Enough for the caches' beginning, and for a few blocks.
    size = max(config.kv.num_tokens, 8 * args.tokens)
    with meter.stage("load"):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    with meter.stage("attach"):
        koff.attach(model, config)
    checkpoints = folder / "checkpoints"
    with meter.stage("train"):
        trainer = KoffTrainer(
            model,
            args=KoffTrainingArguments(
                output_dir=str(checkpoints),
                max_steps=args.steps,
                per_device_train_batch_size=args.rows,
                block_size=args.tokens,
                saliency_batches=1,
                general_every=2,
                fix_mask_at=0.5,
                save_strategy="steps",
                save_steps=max(1, args.steps // 2),
                save_total_limit=1,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_datasets={name: text(size) for name in names},
            general_datasets={"general": text(size)},
        )
        started = checkpoints.exists() and last_complete(checkpoints)
        trainer.train(resume_from_checkpoint=str(started) if started else None)
    if args.until == "train":
        return
    with meter.stage("compact"):
        if not koff.sparsity(model).hard:  # of one step, half is none
            koff.binarize(model)
        model = koff.compact(model, inplace=True)
    if args.until == "compact":
        return
    with meter.stage("save"):
        koff.save(model, folder / "model", overwrite=True, metadata={"base": args.model})


def info(args: argparse.Namespace) -> None:
    """Read what a saved model says of itself."""
    from koff.commands.saved import describe

    print(json.dumps(describe(args.output / "model"), indent=1), file=sys.stderr)


def generate(args: argparse.Namespace) -> None:
    """Load the saved model and generate with each memory."""
    import torch

    import koff

    model = koff.load(args.output / "model")
    names = model.koff.memory_names
    ids = torch.arange(3, 19).expand(len(names), -1)
    out = model.generate(
        ids, memory=list(names), max_new_tokens=4, min_new_tokens=4, pad_token_id=0
    )
    if out.shape != (len(names), 20):
        raise RuntimeError(f"bench rehearse: generate must add 4 tokens, got {tuple(out.shape)}")


def export(args: argparse.Namespace) -> None:
    """Fold one memory into a checkpoint for transformers and PEFT."""
    from koff.storage.export import export_merged

    export_merged(args.output / "model", "fr", args.output / "merged")


def child(args: argparse.Namespace) -> None:
    """Run the stages of one process and print a row for each."""

    def tell(row: dict) -> None:
        print(f"ROW {json.dumps(row)}", flush=True)

    import torch
    from transformers.utils import logging

    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    meter = Meter(tell, args.output)
    if args.child == "train":
        return train(args, meter)
    with meter.stage(args.child):
        if args.child == "write":
            write_base(args.model, args.output / "base")
        else:
            {"info": info, "generate": generate, "export": export}[args.child](args)
    return None


def rehearse(
    model: str,
    output: Path,
    *,
    steps: int = 4,
    rows: int = 2,
    tokens: int = 256,
    until: str = "export",
    threads: int = 1,
) -> list[dict]:
    """Run what is not done yet, and return the rows of all stages up to one.

    Args:
        model: a key of ``MODELS``.
        output: folder of everything; given again, the rehearsal goes on in it.
        steps, rows, tokens: of the training.
        until: the last stage.
        threads: of torch.
    """
    for name, value, known in (("--model", model, MODELS), ("--until", until, STAGES)):
        if value not in known:
            raise ValueError(
                f"bench rehearse: {name} must be one of {', '.join(known)}, got {value!r}; choose"
            )
    settings = {"model": model, "steps": steps, "rows": rows, "tokens": tokens}
    path = output / RESULT
    record = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": []}
    if record["settings"] != settings:
        raise ValueError(
            f"bench rehearse: {output} must hold a rehearsal of {settings}, got one of "
            f"{record['settings']}; choose another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    done = {row["stage"]: row for row in record["rows"]}
    wanted = STAGES[: STAGES.index(until) + 1]
    # A process begins at its beginning, so a training that is not saved is gone through again.
    last = [name for name in wanted if name in TRAINING][-1:]
    for process in ("write", "train", "info", "generate", "export"):
        stages = [name for name in wanted if name in TRAINING] if process == "train" else [process]
        stages = [name for name in stages if name in wanted]
        if not stages or all(name in done for name in (last if process == "train" else stages)):
            continue
        command = [sys.executable, "-m", "bench.rehearse", "--child", process, "--model", model]
        command += ["--output", str(output), "--until", until, "--threads", str(threads)]
        command += ["--steps", str(steps), "--rows", str(rows), "--tokens", str(tokens)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout:
                if not line.startswith("ROW "):
                    print(line, end="")
                    continue
                row = json.loads(line[4:])
                done[row["stage"]] = row
                record["rows"] = [done[name] for name in STAGES if name in done]
                record["environment"] = timing.environment(threads)
                timing.write(path, record)
                print(shown(row), flush=True)
        if running.returncode:
            raise RuntimeError(
                f"bench rehearse: {process} must end well, got exit code {running.returncode}; "
                "started again, it goes on from here"
            )
    return record["rows"]


def shown(row: dict) -> str:
    """A row as a line of a Markdown table."""
    peak, disk = row["peak"] / 1e9, row["disk"] / 1e9
    return f"| {row['stage']} | {row['seconds']:.1f} | {peak:.2f} | {disk:.2f} |"


HEADER = "| stage | seconds | peak, GB | on disk after it, GB |\n|---|---:|---:|---:|"


def main() -> None:
    """Be a child; ``python -m bench rehearse`` is the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearse")
    parser.add_argument("--child", required=True, choices=("write", "train", *STAGES[6:]))
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--until", required=True)
    for name in ("--steps", "--rows", "--tokens", "--threads"):
        parser.add_argument(name, required=True, type=int)
    child(parser.parse_args())


if __name__ == "__main__":
    main()
