"""A process is killed before every change that a checkpoint makes on disk: the last complete one is
found, and training resumed from it ends bit-identical to an uninterrupted run."""

import logging
import shutil

import pytest
from support.kills import report, run_child, tree_digest
from support.models import same
from support.trainings import STEPS, learned, tiny_run

import koff
from koff.training import checkpoint

pytestmark = pytest.mark.usefixtures("no_real_fsync")


class KilledTrainer(koff.KoffTrainer):
    """Before it writes the checkpoint of ``kill_step``, lets children die while they write it, each
    on a copy of the run's folder."""

    kill_step, lose, cases = None, False, ()

    def _save_checkpoint(self, model, trial):
        if self.state.global_step == self.kill_step:
            self.cases, self.kill_step = [], None
            total = len(self.killed(model, trial, None))
            for at in range(1, total + 1):
                self.killed(model, trial, at)
        super()._save_checkpoint(model, trial)

    def killed(self, model, trial, at):
        own = self.args.output_dir
        copy = f"{own}-killed-{at}"
        shutil.copytree(own, copy)
        self.args.output_dir = copy
        done = run_child(lambda: self._save_checkpoint(model, trial), copy, at, self.lose)
        self.args.output_dir = own
        if at is not None:
            self.cases.append(copy)
        return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("whole"), save_strategy="no")
    run.train()
    return learned(run.model)


SCENARIOS = {  # step of the checkpoint, checkpoints that may be found after a kill
    "first": (1, {None, "checkpoint-1"}),
    "second, rotating": (2, {"checkpoint-1", "checkpoint-2"}),
    "in the place of an older one": (2, {"checkpoint-2"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("lose", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_checkpoint(scenario, lose, in_memory, whole, record_property):
    step, names = SCENARIOS[scenario]
    folder = in_memory / "run"
    if scenario == "in the place of an older one":
        tiny_run(folder, save_steps=2).train()
        shutil.rmtree(folder / f"checkpoint-{STEPS}")
    every = 2 if names == {"checkpoint-2"} else 1
    run = tiny_run(folder, KilledTrainer, save_total_limit=1, save_steps=every)
    run.kill_step, run.lose = step, lose
    run.train()
    assert same(learned(run.model), whole)
    states, found = set(), set()
    for case in map(type(in_memory), run.cases):
        last = checkpoint.last_complete(case)
        found.add(last and last.name)
        # Of what the kill left besides the last complete checkpoint, a run looks at names alone.
        names_left = tuple(sorted(str(p.relative_to(case)) for p in case.rglob("*")))
        state = (last and tree_digest(last), names_left)
        if state not in states:
            states.add(state)
            resume(case, last, whole)
    report(record_property, len(run.cases), len(states))
    assert found == names
    assert len(run.cases) >= 20 and len(states) >= 8


def resume(case, last, whole):
    again = tiny_run(case, save_total_limit=1, save_steps=STEPS)
    again.train(resume_from_checkpoint=None if last is None else True)
    assert same(learned(again.model), whole), case
    assert [path.name for path in case.iterdir()] == [f"checkpoint-{STEPS}"]


def test_incomplete_checkpoints_are_ignored_with_a_message(tmp_path, whole, caplog):
    tiny_run(tmp_path).train()
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-99").mkdir()
    with caplog.at_level(logging.WARNING, logger="koff"):
        again = tiny_run(tmp_path)
        again.train(resume_from_checkpoint=True)
    assert same(learned(again.model), whole)
    assert "checkpoint-99 is ignored: resume: checkpoint checkpoint-99 must hold" in caplog.text
    assert "checkpoint-3 is ignored: resume: checkpoint checkpoint-3 must hold opt" in caplog.text
    with pytest.raises(FileNotFoundError, match="must hold koff_state.safetensors, got none; res"):
        tiny_run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-99"))
    with pytest.raises(ValueError, match="must hold a complete checkpoint, got none; train with"):
        tiny_run(tmp_path / "new").train(resume_from_checkpoint=True)


def test_rotation_keeps_complete_checkpoints(tmp_path):
    """Folders that are no complete checkpoints neither count nor go."""
    (tmp_path / "checkpoint-50").mkdir()
    (tmp_path / "checkpoint-50" / "mine.txt").write_text("mine")
    tiny_run(tmp_path, save_total_limit=2).train()
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3", "checkpoint-50"}


def test_a_complete_staged_checkpoint_is_not_lost_to_a_broken_one(tmp_path, whole):
    """The only complete one may be the one that awaits its rename."""
    tiny_run(tmp_path, save_steps=2).train()
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / checkpoint.STAGED / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    staged = tmp_path / checkpoint.STAGED / "checkpoint-2"
    assert checkpoint.last_complete(tmp_path) == staged
    checkpoint.clean_up(tmp_path)
    assert checkpoint.last_complete(tmp_path) == tmp_path / "checkpoint-2" and not staged.exists()
