"""One process at a time changes a folder; a dead one's lock is none."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from support.small_models import small

import koff
from koff.storage.lock import LOCK, check_unlocked, locked

pytestmark = pytest.mark.usefixtures("no_real_fsync")

HOLD = """
import sys, time
from pathlib import Path
from koff.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Start a process that holds a folder's lock, and return it."""
    started = []

    def start(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def model():
    return small(("en",), 0, 0.4)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_another_process_is_changing_is_refused_by_name(
    exists, model, holder, tmp_path
):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    process = holder(out)
    rule = rf"koff\.save: no other process may be changing .*out, got process {process.pid} on "
    with pytest.raises(ValueError, match=rule):
        koff.save(model, out)
    with pytest.raises(ValueError, match=f"got process {process.pid} on .* since 2"):
        check_unlocked(out)
    koff.save(model, tmp_path / "other")  # its neighbour is free
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / LOCK if exists else tmp_path / f"{LOCK}-out").exists()
    koff.save(model, out)  # a dead process holds nothing
    assert not [p.name for p in (*tmp_path.iterdir(), *out.iterdir()) if p.name.startswith(".")]


def test_changes_of_a_saved_folder_are_refused_meanwhile(model, holder, tmp_path):
    out = koff.save(model, tmp_path / "out")
    before = (out / "koff.json").read_bytes()
    holder(out)
    with pytest.raises(ValueError, match="no other process may be changing"):
        koff.remove_memory(out, "en")
    with pytest.raises(ValueError, match="no other process may be changing"):
        koff.save(model, out, overwrite=True)
    assert (out / "koff.json").read_bytes() == before
    assert koff.load(out).koff.memory_names == ("en",)  # who reads waits for nobody


def test_two_runs_do_not_write_their_checkpoints_into_one_folder(holder, tmp_path):
    from support.trainings import tiny_run

    run = tiny_run(tmp_path)
    process = holder(tmp_path)
    with pytest.raises(ValueError, match=f"KoffTrainer: no other .* got process {process.pid}"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_thread_may_lock_again_and_another_may_not(tmp_path):
    seen = []

    def other():
        try:
            with locked(tmp_path):
                seen.append("held")
        except ValueError as error:
            seen.append(str(error))

    with locked(tmp_path), locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        who = json.loads((tmp_path / LOCK).read_text())
        assert who["pid"] == os.getpid()
    assert f"got process {os.getpid()} on" in seen[0]
    assert not (tmp_path / LOCK).exists()
    other()
    assert seen[1] == "held"
