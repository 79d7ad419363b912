"""Progress of a training run on the terminal: one bar, or a line for each log where the output is
no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SHOWN = {"loss": "loss {:.3f}", "sparsity_mlp": "sparsity {:.1%}", "undecided": "undecided {:.0%}"}


class TrainProgress(TrainerCallback):
    """Show steps, loss, sparsity and the undecided share; takes the place of transformers' own bar.

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
        """Start the bar on the process that writes."""
        if state.is_world_process_zero and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.label,
                total=state.max_steps,
                completed=state.global_step,  # not 0 after a resume
                facts="",
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the latest numbers."""
        logs = logs or {}
        # The last log of a run is its summary, and has "train_loss" instead.
        if not state.is_world_process_zero or "loss" not in logs:
            return
        facts = "  ".join(text.format(logs[name]) for name, text in _SHOWN.items() if name in logs)
        if self.bar is not None:
            self.bar.update(self.task, facts=facts)
        else:
            step = f"{self.label} {state.global_step}/{state.max_steps}  {facts}"
            self.console.print(step, markup=False, highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
