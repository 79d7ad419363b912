"""``koff demo``: the whole path on a small model of its own, without network or other files; or on
SmolLM2-135M, a real pretrained one."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..commands.recipe import Recipe, parse
from ..commands.saved import count_saved, pack_sources
from ..commands.tables import facts_table, millions, sparsity_facts
from ..commands.train import load_base, run
from ..data.cache import default_cache
from ..evaluation.perplexity import evaluate
from ..pruning.binarize import sparsity
from ..storage.save_load import load
from .base_model import SETTINGS, prepare_base
from .corpus import DOMAINS, prepare_corpus
from .smollm2 import prepare_smollm2


@dataclass(frozen=True)
class Demo:
    """A base model, and what suits it.

    Args:
        prepare: from the folder of caches, the folders of the base and of the corpus.
        dtype: of the base.
        koff: what is learned, as in a recipe.
        train: of a recipe.
        tokens: of each domain's test split, only the first documents that hold so many; None: all.
    """

    prepare: Callable[[Path], tuple[Path, Path]]
    dtype: str
    koff: dict[str, Any]
    train: dict[str, Any]
    tokens: int | None = None


def _small(cache: Path) -> tuple[Path, Path]:
    folder = prepare_base(cache)
    return folder / "base", folder / "data"


def _smollm2(cache: Path) -> tuple[Path, Path]:
    return prepare_smollm2(cache), prepare_corpus(cache)


DEMOS = {
    # Two runs with this schedule, pretraining and evaluation take about five minutes on two cores.
    "small": Demo(
        _small,
        "float32",
        koff={
            "target_sparsity": 0.4,  # of 0.2 this small model would hardly notice the loss
            "lora": {"r": 8, "alpha": 16},
            "kv": {"num_tokens": 16, "init": "text"},
        },
        train={
            "steps": 300,
            "batch_size": 9,
            "block_size": SETTINGS["block_size"],
            "general_every": 8,
            "gate_learning_rate": 0.1,
            "lora_learning_rate": 3e-3,
            "kv_learning_rate": 5e-3,
            "fix_mask_at": 0.6,
            "logging_every": 20,
        },
    ),
    # Sizes and rates of the recipe smollm2; twice as much is pruned, in half of the steps.
    "smollm2": Demo(
        _smollm2,
        "bfloat16",
        koff={
            "target_sparsity": 0.4,
            "lora": {"r": 16, "alpha": 32},
            "kv": {"num_tokens": 32, "init": "text"},
        },
        train={
            "steps": 80,
            "batch_size": 6,
            "block_size": 128,
            "general_every": 8,
            "gate_learning_rate": 0.1,
            "lora_learning_rate": 1e-3,
            "kv_learning_rate": 1e-2,
            "fix_mask_at": 0.5,
            "logging_every": 10,
        },
        tokens=5000,
    ),
}


def demo_recipe(
    base: Path,
    corpus: Path,
    *,
    demo: Demo = DEMOS["small"],
    seed: int = 0,
    gates_only: bool = False,
) -> Recipe:
    """Return the recipe of a demo.

    Args:
        base, corpus: folders, as ``demo.prepare`` returns them.
        demo: which one.
        seed: seed of the initialisation and of the data order.
        gates_only: the same schedule without memories.
    """
    base, corpus = base.resolve(), corpus.resolve()
    splits = ("train", "validation", "test")
    data = {
        domain: {split: str(corpus / f"{domain}.{split}.jsonl") for split in splits}
        for domain in DOMAINS
    }
    parts = {"lora": None, "kv": None} if gates_only else {}
    values = {
        "model": str(base),
        "dtype": demo.dtype,
        "data": data,
        # General rows go with any memory, so that the gates meet every domain with every memory.
        "general": data,
        "koff": demo.koff | parts,
        "train": demo.train,
        "seed": seed,
    }
    return parse(values, base.parent)


def run_demo(
    *,
    model: str = "small",
    output: Path | None = None,
    cache: Path | None = None,
    seed: int = 0,
) -> bool:
    """Make (or find) a base, train koff and gates alone, prune, save, reload, compare.

    Args:
        model: one of ``DEMOS``.
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
        demo = DEMOS[model]
        folders = demo.prepare(cache or default_cache())
        recipe = demo_recipe(*folders, demo=demo, seed=seed)
        alone = demo_recipe(*folders, demo=demo, seed=seed, gates_only=True)
        # Stopped, it would not go on: it begins anew each time.
        how = dict(device="cpu", stops_on_signals=False)
        gates = run(alone, place / "gates", label="gates only", **how)
        koff_folder = run(recipe, output or place / "koff", label="gates and memories", **how)
        console.print("loading what was saved, and measuring")
        better = _compare(console, recipe, gates, koff_folder, demo.tokens)
    console.print(f"took {time.perf_counter() - started:.0f} s")
    if output is not None:
        step = f"next: koff generate {output} --memory math 'Question:'"
        console.print(f"kept in {output}; {step}", markup=False)
    return better


def _compare(
    console: Console, recipe: Recipe, gates_folder: Path, koff_folder: Path, tokens: int | None
) -> bool:
    tokenizer = AutoTokenizer.from_pretrained(koff_folder)
    size = recipe.train.block_size
    # Packed here and not by evaluate: once for all three models.
    packed = pack_sources(recipe.sources("test"), tokenizer, size, "test", tokens)

    def measure(model: PreTrainedModel) -> dict[tuple[str, str | None], float]:
        rows = evaluate(model, tokenizer, packed, block_size=size, batch_size=16)
        return {(row.domain, row.memory): row.perplexity for row in rows}

    dense_model = load_base(recipe).eval()
    small = load(koff_folder)
    dense, gates, own = measure(dense_model), measure(load(gates_folder)), measure(small)
    console.print(_quality_table(dense, gates, own))
    facts = {
        "dense model": f"{millions(count_saved(Path(recipe.model)))} parameters",
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
    # The first three ids are special ones.
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
