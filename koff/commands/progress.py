"""Progress of a training run on the terminal: one bar, or one line per log where there is none."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SHOWN = {"loss": "loss {:.3f}", "sparsity_mlp": "sparsity {:.1%}", "undecided": "undecided {:.0%}"}


class TrainProgress(TrainerCallback):
    """Shows steps, loss, sparsity and the undecided share; replaces transformers' own bar.

    Args:
        console: where to draw; None is the standard output.
        label: what stands before the bar.
    """

    def __init__(self, console: Console | None = None, label: str = "training"):
        self.console = console or Console()
        self.label = label
        self.bar: Progress | None = None
        self.task: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the bar on the process that writes."""
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), *columns, console=self.console
            )
            self.bar.start()
            done = state.global_step
            self.task = self.bar.add_task(
                self.label, total=state.max_steps, completed=done, facts=""
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the latest numbers."""
        logs = logs or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        facts = "  ".join(text.format(logs[name]) for name, text in _SHOWN.items() if name in logs)
        if self.bar is not None:
            self.bar.update(self.task, facts=facts)
        else:
            step = f"{self.label} {state.global_step}/{state.max_steps}  {facts}"
            self.console.print(step, markup=False, highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        """Stops the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
