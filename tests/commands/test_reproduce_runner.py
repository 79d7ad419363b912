"""koff reproduce's children: side by side, with their threads and logs, and none left behind.

A small program stands in for `koff`.
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from koff.commands.reproduce import display, runner
from koff.commands.reproduce.plan import Plan, threads_of
from koff.commands.reproduce.runner import Runner, cores, tail

# argv: train RECIPE --output FOLDER ... | eval FOLDER --json FILE ...
STAND_IN = """
import json, os, pathlib, sys, time
what, options = sys.argv[1], sys.argv[2:]
folder = pathlib.Path(options[2] if what == "train" else options[0])
place = folder.parent
with (place / "calls.txt").open("a") as file:
    file.write(f"{what} {folder.name} {os.environ['OMP_NUM_THREADS']} {os.getpid()}\\n")
mode = (place / "mode.txt").read_text()
print("a bar 1 %\\ra bar 2 %\\rlast words of", folder.name, flush=True)
if mode == "hang":
    time.sleep(600)
if mode == "meet" and what == "train":  # wait until somebody else is there too
    (place / f"here-{folder.name}").touch()
    until = time.monotonic() + 60
    while len(list(place.glob("here-*"))) < 2:
        assert time.monotonic() < until, "alone"
        time.sleep(0.01)
if mode == what and "koff" in folder.name:
    sys.exit(3)
if what == "train":
    folder.mkdir()
    (folder / "koff.json").write_text("{}")
elif mode != "forget":
    row = {"variant": "base", "memory": None, "domain": "en", "split": "test", "tokens": 1}
    pathlib.Path(options[2]).write_text(json.dumps([row | {"perplexity": 2.0}]))
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "child", lambda command: [sys.executable, "-c", STAND_IN, *command])
    (tmp_path / "mode.txt").write_text("", "utf-8")
    return Plan(Path("recipe.yaml"), tmp_path, (0.2,), (0,), questions=())


def calls(plan: Plan) -> list[str]:
    return [" ".join(line.split()[:2]) for line in (plan.output / "calls.txt").open()]


def test_runner_makes_what_is_left_and_shares_the_cores(plan, monkeypatch):
    monkeypatch.setattr(runner, "cores", lambda: 7)
    (plan.output / "mode.txt").write_text("meet", "utf-8")
    first = Runner(plan, 2)  # one alone would wait for the other in vain
    assert first.threads == 3 and Runner(plan, 9).threads == 1 and cores() >= 1
    assert first.execute() == {}
    names = ["dense-seed0", "koff-0.2-seed0", "gates-0.2-seed0"]
    assert sorted(calls(plan)) == sorted(f"{what} {n}" for what in ("train", "eval") for n in names)
    assert {line.split()[2] for line in (plan.output / "calls.txt").open()} == {"3"}
    log = (plan.output / "dense-seed0.log").read_text("utf-8")
    command = "$ OMP_NUM_THREADS=3 koff train recipe.yaml --output"
    assert log.startswith(command) and "last words of dense-seed0" in log
    plan.scores(plan.runs[1]).unlink()
    assert Runner(plan, 1).execute() == {}
    assert calls(plan)[6:] == ["eval koff-0.2-seed0"]
    log = plan.log(plan.runs[1])
    assert (threads_of(log, "train", 1), threads_of(log, "eval", 1)) == (3, 7)
    assert threads_of(plan.output / "none.log", "train", 5) == 5


@pytest.mark.parametrize("what", ["train", "eval"])
def test_runner_reports_what_failed_and_goes_on(plan, what):
    (plan.output / "mode.txt").write_text(what, "utf-8")
    failures = Runner(plan, 1).execute()
    assert list(failures) == ["koff-0.2-seed0"]
    assert failures["koff-0.2-seed0"].endswith("a bar 2 %\nlast words of koff-0.2-seed0")
    assert ("eval koff-0.2-seed0" in calls(plan)) == (what == "eval")
    assert not plan.left(plan.runs[0]) and not plan.left(plan.runs[2])


def test_runner_does_not_believe_an_exit_code_alone(plan):
    (plan.output / "mode.txt").write_text("forget", "utf-8")
    failures = Runner(plan, 1).execute()
    assert len(failures) == 3
    assert failures["dense-seed0"].startswith("finished, but not there: koff eval\n")


def test_runner_leaves_no_child_behind(plan, monkeypatch):
    (plan.output / "mode.txt").write_text("hang", "utf-8")

    def interrupted(futures):
        while not (plan.output / "calls.txt").exists() or len(calls(plan)) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Runner(plan, 2).execute()
    pids = [int(line.split()[3]) for line in (plan.output / "calls.txt").open()]
    assert len(pids) == 2  # the third was never started
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_runner_ends_everything_when_the_time_is_up(plan):
    (plan.output / "mode.txt").write_text("hang", "utf-8")
    started = time.monotonic()
    failures = Runner(plan, 2, seconds=3).execute()
    assert set(failures.values()) == {"the time was up"} and len(failures) == 3
    assert time.monotonic() - started < 60  # the stand-ins would take ten minutes
    assert len(calls(plan)) == 2  # the third was never started
    for line in (plan.output / "calls.txt").open():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[3]), 0)


def test_runner_ends_its_children_when_it_is_ended(tmp_path):
    """The whole command, with a `koff` that hangs in place of the real one."""
    (tmp_path / "mode.txt").write_text("hang", "utf-8")
    code = f"""
import sys
from pathlib import Path
from koff.cli import app
from koff.commands.reproduce import plan, runner
runner.child = lambda arguments: [sys.executable, "-c", {STAND_IN!r}, *arguments]
plan.Plan.check = lambda self: None
app(["reproduce", "r.yaml", "--output", {str(tmp_path)!r}, "--seeds", "0", "--only", "main"])
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (tmp_path / "calls.txt").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 143
    assert "interrupted" in said and "the time was up" not in said
    pid = int((tmp_path / "calls.txt").read_text().split()[3])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_runner_waits_for_a_process_that_makes_the_same_run(plan, monkeypatch, capsys):
    """As one that outlived a command that was killed."""
    folder = plan.folder(plan.runs[0])
    code = "import sys, pathlib; from koff.storage.lock import locked\nwith locked(pathlib.Path("
    code += "sys.argv[1])): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    other.stdout.readline()
    ends = threading.Timer(0.5, lambda: (folder.mkdir(), other.communicate()))
    monkeypatch.setattr(Plan, "trained", lambda self, run: self.folder(run).is_dir())
    ends.start()
    assert Runner(plan, 1).execute() == {}
    assert "dense-seed0: another process makes it; waiting for its end" in capsys.readouterr().out
    assert calls(plan)[0] == "eval dense-seed0"  # the other one has trained it


def test_display_tells_the_time_left(plan, monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown = io.StringIO()
    show = display.Display(plan, 2, Console(file=shown, width=80))
    dense, koff, gates = plan.runs
    log = tmp_path / "a.log"
    log.write_text("training 3/4  loss 9.9\n", "utf-8")  # of an earlier attempt
    with show:
        assert show.seconds_left() is None
        with show.running(dense, ["train"], log) as doing:
            now[0] += 10
            assert doing.share() == 0.0 and show.seconds_left() is None
            with log.open("a") as file:
                file.write("training 1/4  loss 3.0\n")
            # 40 seconds each of three trainings, of which 10 are over, by two jobs.
            assert doing.share() == 0.25 and show.seconds_left() == 55
            now[0] += 20
        show.done(dense, doing)
        with show.running(koff, ["train"], log):
            assert show.seconds_left() == 30
            table = Console(file=io.StringIO(), width=80, record=True)
            table.print(show)
            assert "koff-0.2-seed0" in table.export_text()
    assert "dense-seed0: train done in 30 s; 0 of 3 runs, about 0:00:30 left" in shown.getvalue()


def test_tail_is_the_end_without_what_bars_overwrote(tmp_path):
    log = tmp_path / "a.log"
    log.write_bytes(b"".join(b"line %d\n" % n for n in range(30)) + b"10 %\r20 %\n\n\xff end\n")
    assert tail(log, 3) == "10 %\n20 %\n\ufffd end"
    assert tail(log).splitlines()[0] == "line 18" and json.dumps(tail(log))
