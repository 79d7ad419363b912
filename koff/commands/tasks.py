"""`koff eval --tasks`: the tasks of lm-eval, under each memory.

A task file of lm-eval is a program: its ``!function`` tags name Python that runs, and its templates
are Jinja. Those that lm-eval brings are as trusted as any installed package. Those of a folder that
the user names are read as data, unless the user says that they may run: see ``check_task_folder``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..storage.saved_folder import open_saved
from .saved import check_saved, pick_device, read_run, saved_memories

# What reads text and numbers alone; others are datasets of the hub, or unpickle what they find.
_READERS = ("json", "csv", "parquet", "text")
_SEED = 1234  # of the examples before a question; lm-eval's own


@dataclass(frozen=True)
class TaskRow:
    """One measured number of a task.

    Args:
        variant: "base" for the dense base, "koff" for the saved model.
        memory: name of the active memory, or None.
        task: its name.
        metric: name of the measure, as lm-eval has it.
        filter: what lm-eval did to answers before it; "none" where nothing.
        value: the measure.
        stderr: its standard error, if lm-eval knows it.
        samples: number of questions.
        fewshot: examples before each question.
        harness: name and version of what measured it.
    """

    variant: str
    memory: str | None
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    fewshot: int
    harness: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def run_tasks(
    directory: str | Path,
    names: Sequence[str],
    *,
    memories: Sequence[str] | None = None,
    folder: Path | None = None,
    run_code: bool = False,
    base: bool = False,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> list[TaskRow]:
    """Measure a saved model on tasks of lm-eval.

    Args:
        directory: output folder of `koff train`.
        names: of tasks.
        memories: names; None: every memory, then none.
        folder: with task files of the user's own.
        run_code: let these run what code they name.
        base: measure the dense base too.
        limit: questions of each task, from its beginning; None: all.
        fewshot: examples before each question; None: as the task has it.
        batch_size: rows per forward.
        device: where to run; None: as ``pick_device`` finds it.

    Returns:
        Rows of the base, if asked for, then of the saved model, memory by memory.

    Raises:
        FileNotFoundError, KeyError, ValueError: no saved model, unknown memory or task, or a task
            file that would run code. ImportError: no lm-eval.
    """
    directory, device = check_saved(directory), pick_device(device)
    known = saved_memories(directory)
    chosen = [*known, None] if memories is None else list(dict.fromkeys(memories))
    for memory in chosen:
        if memory is not None and memory not in known:
            raise KeyError(
                f"koff eval: --memory must be one of {list(known)}, got {memory!r}; correct it"
            )
    check_lm_eval()
    if folder is not None and not run_code:
        check_task_folder(folder)
    recipe = read_run(directory) if base else None
    tasks = _load_tasks(names, folder, fewshot)

    from ..evaluation.harness import KoffLM
    from ..storage.save_load import load
    from .train import load_base

    tokenizer = open_saved(directory).load_tokenizer()
    rows = []
    if recipe is not None:
        lm = KoffLM(load_base(recipe).to(device), tokenizer, batch_size=batch_size)
        rows += _measure(lm, tasks, "base", limit)
        del lm
    model = load(directory, device=device)
    for memory in chosen:
        lm = KoffLM(model, tokenizer, memory=memory, batch_size=batch_size)
        rows += _measure(lm, tasks, "koff", limit)
    return rows


def check_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ImportError(
            "koff eval: --tasks must have lm-eval, got none installed; pip install 'koff[tasks]'"
        )


def check_task_folder(folder: Path) -> None:
    """Refuse task files that would run code or read what is not theirs.

    A file may hold plain YAML, and read JSON, CSV, Parquet or text. Templates run in Jinja's
    sandbox (see ``_sandboxed``).

    Args:
        folder: with the task files.

    Raises:
        FileNotFoundError: no such folder. ValueError: a file that would; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"koff eval: --task-folder must be a folder of task files, got none at {folder}"
        )
    check_lm_eval()
    import lm_eval.api.metrics  # noqa: F401  # it registers them
    from lm_eval.api.registry import metric_registry

    for path in sorted(folder.rglob("*.yaml")):
        fault = _fault(path, folder.resolve(), metric_registry)
        if fault:
            raise ValueError(
                f"koff eval: {path} must be a task file that only describes data, got {fault}; "
                "correct it, or give --run-task-code if you trust it like a program"
            )


def _fault(path: Path, folder: Path, known: Container[str]) -> str | None:
    """Return what makes a task file more than data, None if nothing does.

    Args:
        path: of the file.
        folder: that it must stay in.
        known: names of lm-eval's own metrics.
    """
    if not path.resolve().is_relative_to(folder):
        return "a link out of its folder"
    try:
        text = path.read_text("utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "tag", None) not in (None, "!"):
                return f"the tag {event.tag}"
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        return f"no plain YAML ({str(error).splitlines()[0]})"
    if not isinstance(values, dict):
        return f"{type(values).__name__} and no mapping"
    for key in ("class", "custom_dataset", "use_prompt", "task_list"):
        if values.get(key) is not None:
            return f"the key {key!r}"
    included = values.get("include") or []
    for name in included if isinstance(included, list) else [included]:
        # Of another suffix it would not be looked at here.
        here = isinstance(name, str) and name.endswith(".yaml")
        if not here or not (path.parent / name).resolve().is_relative_to(folder):
            return f"include: {name!r}, which is no .yaml file of the folder"
    reader = values.get("dataset_path")
    if reader is not None and reader not in _READERS:
        return f"dataset_path: {reader!r}, which is none of {', '.join(_READERS)}"
    settings = values.get("dataset_kwargs") or {}
    if not isinstance(settings, dict) or "trust_remote_code" in settings:
        return "dataset_kwargs with trust_remote_code"
    for metric in values.get("metric_list") or []:
        # What lm-eval does not know it gives to the library evaluate, which loads scripts.
        name = metric.get("metric") if isinstance(metric, dict) else None
        if not isinstance(name, str) or name not in known or metric.get("hf_evaluate"):
            return f"the metric {name!r}, which is none of lm-eval's own"
    # A group or an override may hold tasks of its own, which would need all of this again.
    if isinstance(values.get("task"), list) and not all(isinstance(t, str) for t in values["task"]):
        return "a group with tasks written inside it"
    return None


def _load_tasks(names: Sequence[str], folder: Path | None, fewshot: int | None) -> dict[str, Any]:
    """Return lm-eval's dictionary of loaded tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    # Its own thousands of files take many seconds, so they are read only if they are asked for.
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    # Not by a path: that would be another way in.
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        where = f" or of {folder}" if folder else ""
        raise KeyError(
            f"koff eval: --tasks must be names of lm-eval's tasks{where}, got {unknown[0]!r}; "
            "`lm-eval ls tasks` lists its own"
        )
    with _sandboxed():
        loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        # As lm-eval's own simple_evaluate does; a task that says 0 means it.
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=(own or 0) if fewshot is None else fewshot)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


@contextlib.contextmanager
def _sandboxed() -> Iterator[None]:
    """Let lm-eval render its templates in the sandbox of Jinja, off the insides of Python."""
    import lm_eval.utils
    from jinja2 import TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    plain = lm_eval.utils.env
    boxed = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True
    )
    boxed.filters.update(plain.filters)
    lm_eval.utils.env = boxed
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"koff eval: the templates of a task must be such as its questions can fill, got an "
            f"error: {error}; correct the task file"
        ) from error
    finally:
        lm_eval.utils.env = plain


def _measure(lm: Any, tasks: dict[str, Any], variant: str, limit: int | None) -> list[TaskRow]:
    from lm_eval.evaluator import evaluate

    with _sandboxed():
        found = evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=False)
    harness = f"lm-eval {metadata.version('lm_eval')}"
    rows = []
    for task in tasks["tasks"]:
        measures = found["results"][task]
        for key, value in measures.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measures.get(f"{name}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            rows.append(
                TaskRow(
                    variant=variant,
                    memory=lm.memory,
                    task=task,
                    metric=name,
                    filter=filtered,
                    value=float(value),
                    stderr=float(error) if known else None,
                    samples=found["n-samples"][task]["effective"],
                    fewshot=found["n-shot"][task],
                    harness=harness,
                )
            )
    return rows
