"""The command line: one function per command; ``koff --help`` lists them.

A command imports what it runs, and only once it has looked at its arguments: torch and transformers
take seconds, for which neither ``--help`` nor a misspelt option should wait.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from .errors import Stopped, asked_by
from .version import __version__

app = typer.Typer(
    help="Prune a language model's MLPs while it learns one small memory per domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_SAVED = "Output folder of koff train, or USER/REPO[@REVISION] of the Hugging Face hub."
_FOLDER = "Output folder of koff train; changed in place."
# What a wrong file, name or setting raises, here or in a library. Anything else is a bug, and shows
# its traceback.
_USER_ERRORS = (ValueError, KeyError, TypeError, FileNotFoundError, ImportError, OSError)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"koff {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool,
        # Eager: it is answered before the command that is missing is asked for.
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _command(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Register a command whose errors are one line; KOFF_TRACEBACK=1 shows the rest. The settings
    are click's, of the command's context."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Stopped as stopped:
            from .storage.processes import is_first

            if is_first():
                Console(stderr=True).print(stopped, markup=False, highlight=False, soft_wrap=True)
            # As a shell says that a signal ended a command: 130 after Ctrl-C, 143 after SIGTERM.
            raise typer.Exit(128 + stopped.by) from None
        except _USER_ERRORS as error:
            if os.environ.get("KOFF_TRACEBACK"):
                raise
            # str() of a KeyError puts its message into quotes.
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            line = " ".join(str(message).split()) or type(error).__name__
            console = Console(stderr=True)
            console.print(
                f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(2) from None

    # "eval_" is not Python's eval, "add_memory" is typed add-memory.
    name = function.__name__.rstrip("_").replace("_", "-")
    return app.command(name, context_settings=settings)(wrapped)


def _without(parts: list[str]) -> list[str]:
    unknown = sorted(set(parts) - {"lora", "kv"})
    if unknown:
        raise ValueError(
            f"koff train: --without must be lora or kv, got {unknown[0]!r}; both together "
            "train the gates only"
        )
    return [f"koff.{part}=null" for part in parts]


@_command
def train(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe file (YAML), or one of koff's own by name: smollm2, ...")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the model; new, empty or to resume.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, as train.steps=10."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="lora|kv", help="Leave a part out; both: gates only."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="koff.target_sparsity; 0: memories without gates.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="train.steps")] = None,
    seed: Annotated[int | None, typer.Option(help="seed")] = None,
    device: Annotated[str | None, typer.Option(help="cpu: stay off the GPU.")] = None,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Share the base among the processes of torchrun.")
    ] = False,
) -> None:
    """Train what a recipe describes, prune, and save the small model with its memories."""
    from .commands.recipe import load_recipe

    overrides = [*(set_ or []), *_without(without or [])]
    named = {"koff.target_sparsity": sparsity, "train.steps": steps, "seed": seed}
    overrides += [f"{key}={value}" for key, value in named.items() if value is not None]
    checked = load_recipe(recipe, overrides)

    from .commands.train import run
    from .storage.processes import is_first

    folder = run(checked, output, device=device, fsdp=fsdp)
    if is_first():
        next_step = f"koff eval {folder} --base --card, and koff report {folder}"
        Console().print(f"saved to {folder}; next: {next_step}", markup=False)


@_command
def plan(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe file (YAML), or one of koff's own by name: smollm2, ...")
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What each device has, as 24GB or 24GiB.")
    ] = None,
    devices: Annotated[int, typer.Option(help="How many train together.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="They share the base, as with koff train --fsdp.")
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(help="What a device does, 10^12 operations a second; default: measured here."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, as train.steps=10."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything to this file.")
    ] = None,
) -> None:
    """Count what a recipe will take, without loading its model: memory, steps, time and disk.

    With --memory it says what to change where that is too little.
    """
    from .commands.recipe import load_recipe

    if tflops is not None and not tflops > 0:
        raise ValueError(f"koff plan: --tflops must be positive, got {tflops}; correct it")
    checked = load_recipe(recipe, set_ or [])

    from .commands import plan as planning
    from .commands.tables import check_writable, facts_table, write_json
    from .commands.train import check_model, check_widths

    size = None if memory is None else planning.bytes_from(memory)
    if json is not None:
        check_writable(json)
    rate = None if tflops is None else tflops * 1e12
    config = check_model(checked)
    check_widths(checked, config)
    found = planning.plan(checked, config, memory=size, devices=devices, rate=rate, fsdp=fsdp)
    if json is not None:
        write_json(json, found.to_dict())
    console = Console()
    console.print(facts_table(found.facts(), title=f"plan of {checked.model}"))
    for line in found.advice():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _keep(
    directory: Path, rows: list[dict[str, Any]], kind: str, card: bool, json: Path | None
) -> None:
    """Write what was measured where the user wants it."""
    from .commands.tables import write_json

    if card:
        from .storage.change import write_results

        write_results(directory, rows, kind)
    if json is not None:
        write_json(json, rows)


@_command
def eval_(
    directory: Annotated[Path, typer.Argument(help=_SAVED)],
    base: Annotated[bool, typer.Option("--base", help="Measure the dense base too.")] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows to this file.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of each domain, only its first documents, of so many tokens."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks per forward.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the rows into the model card too.")
    ] = False,
    swaps: Annotated[
        bool, typer.Option("--swaps", help="LoRA of one memory with the KV of another, instead.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-eval, instead of text.")
    ] = None,
    memory: Annotated[
        list[str] | None, typer.Option(help="Of --tasks; default: every memory, and none.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Task files of your own, which only describe data.")
    ] = None,
    run_task_code: Annotated[
        bool, typer.Option("--run-task-code", help="Let these run the code that they name.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")
    ] = None,
) -> None:
    """Measure perplexity and bits per byte with every memory and none, on every domain.

    With --tasks: the tasks of lm-eval instead. With --swaps: the domains alone, under the LoRA of
    one memory and the KV of another, or none.
    """
    from .commands.tables import check_writable, eval_table, swaps_table, tasks_table

    of_tasks = {
        "--memory": memory,
        "--task-folder": task_folder,
        "--run-task-code": run_task_code or None,
        "--limit": limit,
        "--fewshot": fewshot,
    }
    of_text = {"--split": None if split == "test" else split, "--max-tokens": max_tokens}
    for name, value in (of_tasks if tasks is None else of_text).items():
        if value is not None:
            must = "come with" if tasks is None else "not come with"
            raise ValueError(f"koff eval: {name} must {must} --tasks, got {value!r}; correct it")
    others = {"--base": base, "--card": card, "--tasks": tasks is not None}
    if swaps and any(others.values()):
        got = ", ".join(name for name, given in others.items() if given)
        raise ValueError(f"koff eval: --swaps must stand alone, got {got} too; run them apart")
    if json is not None:
        check_writable(json)

    from .commands.saved import evaluate_run, evaluate_run_swaps
    from .storage.saved_folder import open_saved

    if card:
        with asked_by("koff eval --card"):
            open_saved(directory)  # a folder of one's own, not a download
    if tasks is not None:
        from .commands.tasks import run_tasks

        rows = run_tasks(
            directory,
            [name for name in tasks.split(",") if name],
            memories=memory,
            folder=task_folder,
            run_code=run_task_code,
            base=base,
            limit=limit,
            fewshot=fewshot,
            batch_size=batch_size,
            device=device,
        )
        _keep(directory, [row.to_dict() for row in rows], "tasks", card, json)
        Console().print(tasks_table([row.to_dict() for row in rows]))
        return
    options = {
        "split": split,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "device": device,
    }
    if swaps:
        found = evaluate_run_swaps(directory, **options)
        _keep(directory, [row.to_dict() for row in found], "swaps", False, json)
        title = f"perplexity, {split}, halves swapped (lower is better)"
        Console().print(swaps_table(found, title=title))
        return
    rows = evaluate_run(directory, base=base, **options)
    _keep(directory, [row.to_dict() for row in rows], "results", card, json)
    console = Console()
    console.print(eval_table(rows, title=f"perplexity, {split} (lower is better)"))
    console.print(
        eval_table(rows, metric="bits_per_byte", title=f"bits per byte, {split} (lower is better)")
    )


@_command
def analyse(
    directory: Annotated[Path, typer.Argument(help=_SAVED)],
    domain: Annotated[
        str | None, typer.Option(help="Domain or general part whose text is read.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Default: the domain's own.")] = None,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="Which neurons went: those of one language?")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything to this file.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of --neurons: each domain's first documents, of so many tokens."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks per forward.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Show how much attention each layer gives to the learned keys of a memory.

    With --neurons instead: whether pruning took the neurons that one language alone uses.
    """
    from .commands.tables import check_writable, neuron_table, prefix_table, write_json

    if neurons == (domain is not None) or (neurons and memory is not None):
        raise ValueError(
            "koff analyse: there must be --domain (with --memory) or --neurons, got "
            f"{'both' if neurons else 'neither'}; give one"
        )
    if not neurons and max_tokens is not None:
        raise ValueError("koff analyse: --max-tokens must come with --neurons; leave it out")
    if json is not None:
        check_writable(json)

    from .commands.saved import analyse_neurons, analyse_run

    options = {"split": split, "batch_size": batch_size, "device": device}
    if neurons:
        report = analyse_neurons(directory, max_tokens=max_tokens, **options)
        if json is not None:
            write_json(json, {"split": split} | report.to_dict())
        Console().print(neuron_table(report))
        Console().print(report.sentence(), markup=False, highlight=False, soft_wrap=True)
        return
    found = analyse_run(directory, domain, memory=memory, **options)
    if json is not None:
        write_json(json, {"domain": domain, "split": split} | found.to_dict())
    title = f"attention of {domain} ({split}) to memory {found.memory}"
    Console().print(prefix_table(found, title=title))


@_command
def generate(
    directory: Annotated[Path, typer.Argument(help=_SAVED)],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    memory: Annotated[str | None, typer.Option(help="Name of the memory; left out: none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Continue a prompt with one memory, or none."""
    from .commands.saved import generate_text

    text = generate_text(
        directory,
        prompt,
        memory=memory,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
    )
    typer.echo(text)


@_command
def info(
    directory: Annotated[Path, typer.Argument(help=_SAVED)],
) -> None:
    """Show what a saved model is: base, widths, sparsities, memories and sizes."""
    from .commands.saved import describe
    from .commands.tables import facts_table

    Console().print(facts_table(describe(directory), title=str(directory)))


@_command
def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Output folders of koff train, of one base model.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An .html or .md file; default: report.html in the one folder."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    """Write a page about finished runs, of one kind or many, from what lies in their folders.

    It shows what `koff eval --card` wrote, and what `koff eval` and `koff analyse` wrote with
    --json to DIR/eval-SPLIT.json and DIR/attention-NAME.json.
    """
    from .commands.report.write import write_report

    written = write_report(directories, output, split=split)
    Console().print(f"written: {written}", markup=False, soft_wrap=True)


@_command
def reproduce(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe file (YAML), or one of koff's own by name: smollm2, ...")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the runs, their logs and the answers.")],
    sparsity: Annotated[str, typer.Option(metavar="S,...", help="Targets.")] = "0.2,0.4",
    seeds: Annotated[
        str, typer.Option(metavar="N,...", help="Seeds of the main runs; the first, of all.")
    ] = "0,1,2",
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="main, or of: parts, general, masks, languages, swaps, neurons; default: all.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For every run.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME KEY=VALUE ...'", help="koff once more, with these settings."),
    ] = None,
    later: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Domain whose memory comes later: FOLDER/NAME.train.jsonl and so on.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Of each domain, only its first documents, of so many tokens."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks per forward, measuring.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu: stay off the GPU.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side, each with cores / jobs.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="End what then still runs; answer with what is whole.")
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Run nothing; answer with what is whole.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands.")] = False,
    name: Annotated[str, typer.Option(help="Of the files with the answers.")] = "reproduction",
) -> None:
    """Test every claim of the paper on a model: train and measure all that it takes, and answer.

    Gates, + LoRA, + KV and both, over sparsities and seeds; once without general steps, with masks
    fixed before the training, with fewer languages; memories and their halves swapped; memories on
    the dense model; which neurons go. The same command goes on where it was stopped.
    """
    from .commands.reproduce.answer import answer, numbers
    from .commands.reproduce.plan import Plan

    questions = None if only is None else [name for name in only.split(",") if name != "main"]
    variants = [text.split() for text in variant or []]
    added = [text.partition("=") for text in later or []]
    plan = Plan(
        recipe=recipe,
        output=output.resolve(),
        sparsities=numbers("--sparsity", sparsity, float),
        seeds=numbers("--seeds", seeds, int),
        questions=None if questions is None else tuple(dict.fromkeys(questions)),
        overrides=tuple(set_ or []),
        split=split,
        device=device,
        name=name,
        max_tokens=max_tokens,
        batch_size=batch_size,
        variants={words[0]: tuple(words[1:]) for words in variants if words},
        later={text: Path(folder) for text, _, folder in added},
    )
    options = {"jobs": jobs, "minutes": minutes, "collect_only": collect, "dry_run": dry_run}
    if not answer(plan, Console(), **options):
        raise typer.Exit(1)


@_command
def export(
    directory: Annotated[Path, typer.Argument(help=_SAVED)],
    merged: Annotated[
        str | None, typer.Option(metavar="NAME", help="The memory to fold into the weights.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --merged: folder for the checkpoint; new or empty.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for GGUF files of backbone and memories."),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --gguf: a memory to write; left out: all."),
    ] = None,
    without_kv: Annotated[
        bool, typer.Option("--without-kv", help="With --gguf: leave learned keys out.")
    ] = False,
) -> None:
    """Write what needs no koff: a checkpoint with one memory's LoRA in the weights and its KV
    beside them, or GGUF files for llama.cpp."""
    given = {"--merged": merged, "--output": output, "--gguf": gguf}
    got = [name for name, value in given.items() if value is not None]
    if got not in (["--merged", "--output"], ["--gguf"]) or (
        gguf is None and (memory or without_kv)
    ):
        raise ValueError(
            "koff export: the options must be --merged NAME --output DIR, or --gguf DIR [--memory "
            f"NAME] [--without-kv], got {', '.join(got) or 'none'}; choose one"
        )
    if gguf is None:
        from .storage.export import export_merged

        folder, what = export_merged(directory, merged, output), "load it"
    else:
        from .storage.export_gguf import export_gguf

        folder = export_gguf(directory, gguf, memories=memory or None, without_kv=without_kv)
        what = "use it, and what it lacks"
    Console().print(f"exported to {folder}; how to {what}: {folder / 'README.md'}", markup=False)


@_command
def add_memory(
    directory: Annotated[Path, typer.Argument(help=_FOLDER)],
    name: Annotated[str, typer.Option(help="Name of the new memory.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Training text: a file (.jsonl, .parquet, .csv, ..., or .txt, which is one "
            "document), a folder or a pattern.",
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A recipe's key, as train.lora_learning_rate=5e-4, koff.kv=null, seed=1.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="train.steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="train.batch_size")] = None,
    test: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text that koff eval measures it on.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu: stay off the GPU.")] = None,
) -> None:
    """Train the memory of one more domain; the backbone and the other memories stay as they are.

    Seed and train settings are those of the folder's recipe.json, but for what concerns gates and
    checkpoints, and a recipe's defaults where there is none; the options change them.
    """
    from .commands.add_memory import addition, extend, has_recipe
    from .storage.processes import is_first

    named = {"train.steps": steps, "train.batch_size": batch_size}
    overrides = [*(set_ or [])]
    overrides += [f"{key}={value}" for key, value in named.items() if value is not None]
    recipe = addition(directory, name, {"train": data, "test": test}, overrides)
    if is_first():
        train = recipe.train
        start = f"of {directory}/recipe.json" if has_recipe(directory) else "a recipe's defaults"
        Console().print(
            f"settings {start}, and the options: {train.steps} steps of "
            f"{train.batch_size * train.gradient_accumulation} rows of {train.block_size} tokens "
            f"per device, LoRA at {train.lora_learning_rate:g}, KV at {train.kv_learning_rate:g}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    folder = extend(directory, recipe, device=device)
    if is_first():
        Console().print(f"memory {name} added to {folder}", markup=False)


@_command
def import_memory(
    directory: Annotated[Path, typer.Argument(help=_FOLDER)],
    name: Annotated[str, typer.Option(help="Name of the new memory.")],
    lora: Annotated[
        Path | None,
        typer.Option(help="PEFT LORA folder, trained on the dense base or on this backbone."),
    ] = None,
    kv: Annotated[Path | None, typer.Option(help="PEFT CARTRIDGE folder.")] = None,
) -> None:
    """Make a memory of adapters that PEFT trained elsewhere."""
    from . import manage

    manage.import_memory(directory, name, lora=lora, kv=kv)
    Console().print(f"memory {name} added to {directory}", markup=False)


@_command
def remove_memory(
    directory: Annotated[Path, typer.Argument(help=_FOLDER)],
    name: Annotated[str, typer.Argument(help="Name of the memory.")],
) -> None:
    """Delete a memory; the backbone and the other memories stay as they are."""
    from . import manage

    manage.remove_memory(directory, name)
    Console().print(f"memory {name} removed from {directory}", markup=False)


@_command
def chat(
    source: Annotated[
        str, typer.Argument(help="Output folder of koff train, or the URL of a koff serve.")
    ],
    memory: Annotated[str | None, typer.Option(help="Name of the memory; left out: none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; of a folder.")] = None,
) -> None:
    """Talk to one memory, or none: a line in, an answer out."""
    from .commands.chat import talk, with_folder, with_server

    with asked_by("koff chat"):
        if source.startswith(("http://", "https://")):
            talk(with_server(source, memory, max_new_tokens))
        else:
            talk(with_folder(source, memory, max_new_tokens, device))


@functools.partial(_command, allow_extra_args=True, ignore_unknown_options=True)
def serve(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help=f"{_SAVED} Options of vLLM follow.")],
    python: Annotated[
        str | None, typer.Option(help="Python of the environment that has vLLM; default: this one.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Stop if vLLM goes on otherwise than koff."),
    ] = True,
) -> None:
    """Serve backbone and memories with vLLM, each as a model of an OpenAI-compatible server.

    Any option of `vllm serve` may follow, as --port 8001 or --tensor-parallel-size 2.
    """
    from .commands.serve import serve_command

    with asked_by("koff serve"):
        command, changes = serve_command(directory, python, context.args, check)
    os.execve(command[0], command, os.environ | changes)


@_command
def push(
    directory: Annotated[Path, typer.Argument(help="Output folder of koff train.")],
    repo: Annotated[str, typer.Argument(help="USER/REPO on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default main.")] = None,
) -> None:
    """Upload a saved model to the Hugging Face hub."""
    from .storage.push import push_to_hub

    url = push_to_hub(directory, repo, private=private or None, revision=revision)
    Console().print(f"pushed: {url}", markup=False, soft_wrap=True)


@_command
def demo(
    model: Annotated[
        Literal["small", "smollm2"],
        typer.Option(help="One that is pretrained now, in minutes; or SmolLM2-135M, fetched."),
    ] = "small",
    output: Annotated[Path | None, typer.Option(help="Keep the model here.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the demo's base model; default $KOFF_CACHE.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the koff training.")] = 0,
) -> None:
    """Run the whole path on a small model of its own: pretrain, learn, prune, save, compare."""
    from .demo.run import run_demo

    if not run_demo(model=model, output=output, cache=cache, seed=seed):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
