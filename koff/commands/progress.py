"""Progress of a training run: its plan, and one bar on a terminal; elsewhere the time that it will
take, once that is known, and a line for each log."""

from __future__ import annotations

import datetime
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..model.state import count_weights

# Steps before the time is estimated. The first is left out: it compiles, allocates, warms up.
_TIMED_AFTER = 3

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
        self.first: tuple[int, float] | None = None  # step and time after the first step

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Say what will be done and start the bar, on the process that writes."""
        if not state.is_world_process_zero:
            return
        self.first = None
        self._print(f"{self.label}: {_plan(args, state, model)}")
        if self.console.is_terminal:
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
        """Move the bar, or say once how long the run will take."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)
        elif state.is_world_process_zero:
            self._estimate(state)

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
            self._print(f"{self.label} {state.global_step}/{state.max_steps}  {facts}")

    def on_train_end(self, args, state, control, **kwargs):
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _estimate(self, state) -> None:
        if self.first is None:
            self.first = (state.global_step, time.perf_counter())
            return
        step, started = self.first
        if state.global_step - step + 1 == _TIMED_AFTER:
            seconds = (time.perf_counter() - started) / (state.global_step - step)
            left = datetime.timedelta(
                seconds=round(seconds * (state.max_steps - state.global_step))
            )
            self._print(f"{self.label}: {seconds:.2g} s a step, about {left} left")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plan(args, state, model) -> str:
    """Return a run's steps, tokens and parameters in words."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = f"{state.max_steps} steps"
    if state.global_step:
        steps += f", from step {state.global_step} on,"
    tokens = state.max_steps * rows * args.block_size
    model = getattr(model, "module", model)  # of DDP
    own = list(model.koff.parameters())
    learned = sum(p.numel() for p in own if p.requires_grad)
    frozen = count_weights(model)["total"] + sum(p.numel() for p in own if not p.requires_grad)
    processes = f" on {args.world_size} processes" if args.world_size > 1 else ""
    return (
        f"{steps} of {rows} x {args.block_size} tokens ({tokens:,} in all){processes}; "
        f"{learned:,} parameters learn, {frozen:,} are frozen"
    )
