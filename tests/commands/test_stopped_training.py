"""`koff train` and the signals that end it: the exit code and the last line say how to go on, and
the same command does."""

import os
import signal

import pytest
from support.command_line import invoke, succeed, weights_of

from koff.commands import train
from koff.commands.progress import TrainProgress

pytestmark = pytest.mark.usefixtures("no_data_root")


@pytest.mark.parametrize(
    ("number", "code", "every"), [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 2)]
)
def test_koff_train_stops_and_goes_on(root, tmp_path, monkeypatch, number, code, every):
    output, whole = tmp_path / "out", tmp_path / "whole"

    def command(folder):
        return [
            *("train", root / "recipe.yaml", "--output", folder, "--device", "cpu"),
            *("--set", f"train.save_every={every}"),
        ]

    with monkeypatch.context() as patch:
        begin = TrainProgress.on_step_begin

        def send(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), number)
            return begin(self, args, state, control, **kwargs)

        patch.setattr(TrainProgress, "on_step_begin", send)
        result = invoke(*command(output))
    assert result.exit_code == code, (result.output, result.exception)
    assert " ".join(result.stderr.splitlines()[-1].split()) == (
        f"stopped by {number.name} after step 2 of 4, with a checkpoint in {output}; the same "
        "command, given again, goes on from there"
    )
    assert not (output / "koff.json").exists() and not (output / ".koff-room").exists()
    assert "4 steps, from step 2 on, of 4 x 16 tokens" in succeed(*command(output))
    succeed(*command(whole))
    assert weights_of(output) == weights_of(whole)


def test_processes_go_on_from_the_checkpoint_of_the_first(root, tmp_path, monkeypatch):
    """Also where a network file system shows this one an older state; on a disk of its own, a
    process would begin anew, and wait in a step that no other does."""
    monkeypatch.setattr(train, "said_by_first", lambda what, text: "checkpoints/checkpoint-4")
    monkeypatch.setattr(train, "UNSEEN_FOR", 0.0)
    with pytest.raises(ValueError, match="one folder that every process sees, got no checkpoint-4"):
        train._agreed_checkpoint(tmp_path, None)
    (tmp_path / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    own = str(tmp_path / "checkpoints" / "checkpoint-2")
    found = train._agreed_checkpoint(tmp_path, own)
    assert found == str(tmp_path / "checkpoints" / "checkpoint-4")
    monkeypatch.setattr(train, "said_by_first", lambda what, text: "")
    with pytest.raises(ValueError, match="got no recipe.json here"):
        train._agreed_checkpoint(tmp_path, None)
