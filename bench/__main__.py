"""Benchmarks: ``python -m bench e2e``, and ``python -m bench report`` of all result files."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import timing
from .models import LLAMA_3B, of_layers

ROOT = Path(__file__).parents[1]
RESULTS, DOCS, README = ROOT / "bench" / "results", ROOT / "docs", ROOT / "README.md"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


class DType(StrEnum):
    """Of base weights and activations."""

    bf16 = "bf16"
    fp32 = "fp32"


@app.command()
def e2e(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    model: Annotated[
        Path | None, typer.Option(help="folder of a model (a random one of Llama-3.2-3B's shape)")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="decoder layers of the random model (2; all on a GPU)")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="of weights and activations")] = DType.bf16,
    rounds: Annotated[int, typer.Option(help="readings of each case, taken in turns")] = 5,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="cases whose name contains this")] = None,
    json: Annotated[Path | None, typer.Option(help="write the result here")] = None,
) -> None:
    """Compare prefill, decode and a training step of whole models: dense and pruned, by
    transformers, PEFT and koff."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from . import e2e, report
    from .micro.cases import DTYPES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where, kind = torch.device(device), DTYPES[dtype]
    cuda = where.type == "cuda"
    sizes = e2e.Sizes() if cuda else e2e.SMALL
    if model is None:
        shape = of_layers(LLAMA_3B, layers or (LLAMA_3B.layers if cuda else 2))
        base = e2e.random_llama(shape, where, kind)
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=kind).to(where)
    models = e2e.Models(base, sizes)
    limits = timing.limits(where, kind)
    chosen = [
        case
        for case in e2e.cases(sizes, cuda)
        if not only or any(text in case.name for text in only)
    ]
    record = {
        "what": "prefill, decode and a training step, readings in turns; nothing was timed before "
        "its result was compared with that of transformers or PEFT",
        "command": " ".join(
            ["python -m bench e2e", f"--device {device} --dtype {dtype} --rounds {rounds}"]
            + ([f"--model {model.name}"] if model else [f"--layers {models.shape.layers}"])
        ),
        "environment": timing.environment(threads)
        | {"gpu": torch.cuda.get_device_name() if cuda else None},
        "model": replace(models.shape, rows=sizes.prefill[0], tokens=sizes.prefill[1]).record()
        | {"name": model.name if model else "Llama-3.2-3B's shape, random weights"},
        "sizes": sizes._asdict(),
        "dtype": str(dtype),
        "limits": limits,
        "rows": [],
    }
    for row in e2e.run(models, chosen, limits, rounds):
        record["rows"].append(row)
        print(f"{row['name']:38s} {row.get('text') or row['error']}", flush=True)
        timing.write(json, record)
    print(report.verdicts(record["rows"]))


@app.command()
def rehearse(
    output: Annotated[Path, typer.Option(help="folder of everything; given again, it goes on")],
    model: Annotated[str, typer.Option(help="llama-3.2-3b, llama-3.1-8b or tiny")] = "llama-3.2-3b",
    steps: Annotated[int, typer.Option(min=1, help="of the training")] = 4,
    rows: Annotated[int, typer.Option(min=1, help="of a step")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="of a row")] = 256,
    until: Annotated[str, typer.Option(help="the last stage")] = "export",
    threads: Annotated[int, typer.Option(min=1, help="torch threads")] = 1,
) -> None:
    """Go the whole path of a recipe on random weights of its model's true shape."""
    from .rehearse import HEADER, shown
    from .rehearse import rehearse as run

    settings = {"steps": steps, "rows": rows, "tokens": tokens}
    found = run(model, output, until=until, threads=threads, **settings)
    print("\n".join([HEADER, *map(shown, found)]))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="folder of the result files")] = RESULTS,
    docs: Annotated[
        Path, typer.Option(help="folder of bench.md, its figures and its table")
    ] = DOCS,
    readme: Annotated[bool, typer.Option(help="write README's table anew, too")] = True,
) -> None:
    """Write docs/bench.md, its figures, a CSV with Liger-Kernel's columns, and README's table."""
    from . import report

    report.write(results, docs, README if readme else None)


if __name__ == "__main__":
    app()
