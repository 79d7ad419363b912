"""SIGTERM and Ctrl-C amid a run: a checkpoint behind the step, from which the next one goes on as
if nothing had been."""

import os
import signal

import pytest
import torch
from support.trainings import learned, trainer
from transformers import TrainerCallback

from koff.training.checkpoint import last_complete
from koff.training.stopping import SIGNALS, StopSignals

STEPS = 4
SETTINGS = dict(max_steps=STEPS, fix_mask_at=0.5, logging_steps=STEPS, enable_jit_checkpoint=True)


class Send(TrainerCallback):
    """Sends this process signals at one event of the training."""

    def __init__(self, event: str, step: int, *signals: signal.Signals):
        self.step, self.signals = step, signals
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.fixture(scope="module", autouse=True)
def ctrl_c():
    """Let it interrupt, which a shell's background jobs are told to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"), **SETTINGS)
    run.train()
    assert run.stopped_by is None and run.state.global_step == STEPS
    return learned(run.model)


@pytest.mark.parametrize(
    ("event", "step", "signals"),
    [
        # While the mask is open, its gates drawn at random; and in the step that fixes it.
        ("on_step_begin", 0, (signal.SIGTERM,)),
        ("on_step_begin", 2, (signal.SIGINT,)),
        # After a forward and its backward, where transformers' own callback loses exactness; too
        # late for this step's agreement.
        ("on_pre_optimizer_step", 0, (signal.SIGTERM, signal.SIGTERM)),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, never_stopped, event, step, signals):
    before = [signal.getsignal(number) for number in SIGNALS]
    run = trainer(tmp_path, **SETTINGS)
    run.add_callback(Send(event, step, *signals))
    run.train()
    done = step + (2 if event == "on_pre_optimizer_step" else 1)
    assert run.stopped_by == signals[0] and run.state.global_step == done
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert last_complete(tmp_path).name == f"checkpoint-{done}"
    # What was learned until then is in the log, too: the next one begins to count anew.
    assert any("loss" in entry and entry["step"] == done for entry in run.state.log_history)
    again = trainer(tmp_path, **SETTINGS)
    again.train(resume_from_checkpoint=True)
    assert again.stopped_by is None and again.state.global_step == STEPS
    resumed = learned(again.model)
    assert all(torch.equal(resumed[name], t) for name, t in never_stopped.items())


def test_micro_batches_are_stopped_behind_their_step(tmp_path):
    changes = SETTINGS | dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    run = trainer(tmp_path / "run", **changes)
    run.add_callback(Send("on_substep_end", 1, signal.SIGTERM))
    run.train()
    assert run.state.global_step == 2
    again = trainer(tmp_path / "run", **changes)
    again.train(resume_from_checkpoint=True)
    resumed = learned(again.model)
    assert all(torch.equal(resumed[name], t) for name, t in learned(whole.model).items())


def test_a_signal_too_late_for_the_last_step_is_passed_on(tmp_path):
    run = trainer(tmp_path, max_steps=1, enable_jit_checkpoint=True)
    run.add_callback(Send("on_train_end", 1, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.stopped_by is None
    run.remove_callback(Send)
    run.train()  # of this one it hears nothing any more


def test_a_run_that_fails_hears_no_more_signals(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    run = trainer(tmp_path, lora_learning_rate=1e30, **SETTINGS)
    with pytest.raises(ValueError, match="must be finite"):
        run.train()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_runs_that_do_not_ask_for_it_leave_signals_alone(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.add_callback(Send("on_step_begin", 0, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.args.enable_jit_checkpoint is False


def test_a_second_ctrl_c_ends_at_once():
    child = os.fork()
    if child == 0:
        with StopSignals().listening():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
