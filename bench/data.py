"""How long data take to become blocks, and how much memory, by way and by size of the text.

Three ways, in turns, each in a process of its own: everything in memory, as koff 0.1 read it; the
first run over a source, which tokenises it into the cache; and a later run, which finds it there.
Then 5000 blocks are looked at in random order, as a training does.

    python -m bench.data [--megabytes 20 200] [--rounds 2] [--num-proc 1] [--tokenizer DIR]
        [--ways ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .memory import resident, watched

WAYS = ("in memory", "first run", "later run")
SIZE = 1024  # tokens of a block


def write_texts(path: Path, megabytes: int) -> None:
    """Write documents of about 2 kB of random words, the frequent ones short, as JSON lines."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters[:12], k=rng.randint(2, 9))) for _ in range(20_000)]
    shares = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))  # Zipf's law
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 10**6:
            text = " ".join(rng.choices(words, cum_weights=shares, k=350))
            written += file.write(json.dumps({"text": text}) + "\n")


def make_tokenizer(folder: Path, path: Path) -> None:
    """Train a small byte-level BPE on the first megabyte of a file."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file.readlines(10**6)]
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(texts, 4096, special_tokens=["<s>", "</s>"], show_progress=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)


def child(way: str, path: Path, tokenizer: Path, num_proc: int) -> None:
    """Measure one way, and print what it took."""
    import torch
    from transformers import AutoTokenizer

    from koff.data.blocks import pack
    from koff.data.sources import DataSource, load_documents

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded(["warm"])
    before = resident()
    with watched() as peaks:
        started = time.perf_counter()
        if way == "in memory":
            packed = pack(load_documents(path), loaded, SIZE)
        else:
            packed = pack(DataSource(path=path), loaded, SIZE, num_proc=num_proc)
        seconds = time.perf_counter() - started
        generator = torch.Generator().manual_seed(0)
        for row in torch.randint(len(packed), (5000,), generator=generator).tolist():
            packed.labels(row)
    facts = {
        "seconds": seconds,
        "anonymous": (peaks["RssAnon"] - before["RssAnon"]) / 1e6,
        "resident": (peaks["VmRSS"] - before["VmRSS"]) / 1e6,
        "sum": int(packed.blocks[:: max(1, len(packed) // 100)].sum()),
        "tokens": packed.num_tokens,
    }
    print(json.dumps(facts))


def measure(
    folder: Path,
    megabytes: int,
    rounds: int = 1,
    num_proc: int = 1,
    tokenizer: Path | None = None,
    ways: Sequence[str] = WAYS,
) -> list[dict]:
    """Return a row per way for one size of text, medians over rounds."""
    path = folder / f"{megabytes}.jsonl"
    write_texts(path, megabytes)
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        if not tokenizer.exists():
            make_tokenizer(tokenizer, path)
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for number in range(rounds):
        env = os.environ | {"KOFF_CACHE": str(folder / f"cache-{megabytes}-{number}")}
        for way in ways:
            arguments = [way, str(path), str(tokenizer), str(num_proc)]
            command = [sys.executable, "-m", "bench.data", "--child", *arguments]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    if len({(row["sum"], row["tokens"]) for rows in found.values() for row in rows}) != 1:
        raise AssertionError(f"the ways must give the same blocks, got {found}")
    path.unlink()
    return [
        {"megabytes": megabytes, "way": way}
        | {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for way, rows in found.items()
    ]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num-proc", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        way, path, tokenizer, num_proc = given.child
        return child(way, Path(path), Path(tokenizer), int(num_proc))
    print("| text | way | seconds | memory of its own, MB | with pages of the file, MB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="koff-bench-data-") as folder:
        for megabytes in given.megabytes:
            sizes = (given.rounds, given.num_proc, given.tokenizer, given.ways)
            for row in measure(Path(folder), megabytes, *sizes):
                print(
                    f"| {row['megabytes']} MB | {row['way']} | {row['seconds']:.1f} "
                    f"| {row['anonymous']:.0f} | {row['resident']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
