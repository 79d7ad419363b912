"""``koff demo``: the whole path on a small model of its own, without network or other files."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..commands.recipe import Recipe, parse
from ..commands.saved import count_saved
from ..commands.tables import facts_table, millions, sparsity_facts
from ..commands.train import load_base, run
from ..data.cache import default_cache
from ..data.sources import load_documents
from ..evaluation.perplexity import evaluate
from ..pruning.binarize import sparsity
from ..storage.save_load import load
from .base_model import SETTINGS, prepare_base
from .corpus import DOMAINS

# Two runs with this schedule, pretraining and evaluation take about five minutes on two cores.
TRAIN: dict[str, Any] = {
    "steps": 300,
    "batch_size": 9,
    "block_size": SETTINGS["block_size"],
    "general_every": 8,
    "gate_learning_rate": 0.1,
    "lora_learning_rate": 3e-3,
    "kv_learning_rate": 5e-3,
    "fix_mask_at": 0.6,
    "logging_every": 20,
}
KOFF: dict[str, Any] = {
    "target_sparsity": 0.4,  # of 0.2 this small model would hardly notice the loss
    "lora": {"r": 8, "alpha": 16},
    "kv": {"num_tokens": 16, "init": "text"},
}


def demo_recipe(folder: Path, *, seed: int = 0, gates_only: bool = False) -> Recipe:
    """Return the recipe of the demo.

    Args:
        folder: what ``prepare_base`` returned; relative paths start there.
        seed: seed of the initialisation and of the data order.
        gates_only: the same schedule without memories.
    """
    splits = ("train", "validation", "test")
    data = {
        domain: {split: f"data/{domain}.{split}.jsonl" for split in splits} for domain in DOMAINS
    }
    parts = {"lora": None, "kv": None} if gates_only else {}
    values = {
        "model": "base",
        "dtype": "float32",
        "data": data,
        # General rows go with any memory, so that the gates meet every domain with every memory.
        "general": data,
        "koff": KOFF | parts,
        "train": TRAIN,
        "seed": seed,
    }
    return parse(values, folder.resolve())


def run_demo(*, output: Path | None = None, cache: Path | None = None, seed: int = 0) -> bool:
    """Pretrain (or find) a base, train koff and gates alone, prune, save, reload, compare.

    Args:
        output: folder to keep the model in; None uses a temporary one.
        cache: folder of the base model; None is $KOFF_CACHE, else the user's cache directory.
        seed: seed of both trainings.

    Returns:
        Whether koff, each domain with its own memory, has a lower mean perplexity than gates only.

    Raises:
        ValueError: ``output`` holds something else. OSError: a folder cannot be written.
    """
    logging.disable_progress_bar()
    console = Console()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="koff-demo-") as temporary:
        place = Path(temporary)
        folder = prepare_base(cache or default_cache())
        recipe = demo_recipe(folder, seed=seed)
        alone = demo_recipe(folder, seed=seed, gates_only=True)
        # Stopped, it would not go on: it begins anew each time.
        how = dict(device="cpu", stops_on_signals=False)
        gates = run(alone, place / "gates", label="gates only", **how)
        koff_folder = run(recipe, output or place / "koff", label="gates and memories", **how)
        console.print("loading what was saved, and measuring")
        better = _compare(console, recipe, gates, koff_folder)
    console.print(f"took {time.perf_counter() - started:.0f} s")
    if output is not None:
        step = f"next: koff generate {output} --memory math 'Question:'"
        console.print(f"kept in {output}; {step}", markup=False)
    return better


def _compare(console: Console, recipe: Recipe, gates_folder: Path, koff_folder: Path) -> bool:
    tokenizer = AutoTokenizer.from_pretrained(koff_folder)
    texts = {name: load_documents(source) for name, source in recipe.sources("test").items()}

    def measure(model: PreTrainedModel) -> dict[tuple[str, str | None], float]:
        rows = evaluate(model, tokenizer, texts, block_size=recipe.train.block_size, batch_size=16)
        return {(row.domain, row.memory): row.perplexity for row in rows}

    dense_model = load_base(recipe).eval()
    small = load(koff_folder)
    dense, gates, own = measure(dense_model), measure(load(gates_folder)), measure(small)
    console.print(_quality_table(dense, gates, own))
    facts = {
        "dense model": f"{millions(count_saved(recipe.root / 'base'))} parameters",
        "pruned backbone": f"{millions(count_saved(koff_folder, deep=False))} parameters",
        "each memory": f"{millions(count_saved(koff_folder / 'memories' / DOMAINS[0]))} parameters",
        **sparsity_facts(sparsity(small)),
        "forward, dense / pruned, no memory": f"{speed_up(dense_model, small, None):.2f}x",
        "forward, dense / pruned, one memory": f"{speed_up(dense_model, small, DOMAINS[0]):.2f}x",
    }
    console.print(facts_table(facts, title="size and speed"))
    mean_gates = statistics.fmean(gates[name, None] for name in DOMAINS)
    mean_own = statistics.fmean(own[name, name] for name in DOMAINS)
    verdict = f"mean perplexity: gates only {mean_gates:.2f}, koff {mean_own:.2f}"
    if mean_own < mean_gates:
        console.print(verdict, style="green", highlight=False)
        return True
    console.print(f"failed: koff must be better than gates only; {verdict}", style="red")
    return False


def _quality_table(dense: dict, gates: dict, own: dict) -> Table:
    table = Table(title="perplexity on held-out text (lower is better)")
    table.add_column("domain")
    for name in ("dense", "gates only", "own memory", "wrong memory", "no memory"):
        style = "bold green" if name == "own memory" else None
        table.add_column(name, justify="right", style=style)
    for index, domain in enumerate(DOMAINS):
        wrong = DOMAINS[(index + 1) % len(DOMAINS)]
        table.add_row(
            domain,
            f"{dense[domain, None]:.2f}",
            f"{gates[domain, None]:.2f}",
            f"{own[domain, domain]:.2f}",
            f"{own[domain, wrong]:.2f} ({wrong})",
            f"{own[domain, None]:.2f}",
        )
    return table


def speed_up(
    dense: PreTrainedModel, small: PreTrainedModel, memory: str | None, *, repeats: int = 15
) -> float:
    """Return the median time of the dense forward over that of the pruned one, taken in turns, so
    that what slows the machine down for a while slows both.

    Args:
        dense: the base model.
        small: the pruned koff model.
        memory: active memory of the pruned model, or None.
        repeats: forwards of each, on 8 rows of 128 tokens; three more to warm up.
    """
    # The first three ids are <s>, </s> and <pad>.
    ids = torch.randint(3, dense.config.vocab_size, (8, 128), generator=torch.Generator())

    def seconds(forward: Callable[[], Any]) -> float:
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        for _ in range(repeats + 3):
            first = seconds(lambda: dense(input_ids=ids, use_cache=False))
            times.append(
                (first, seconds(lambda: small(input_ids=ids, use_cache=False, memory=memory)))
            )
    measured = times[3:]
    return statistics.median(a for a, _ in measured) / statistics.median(b for _, b in measured)
