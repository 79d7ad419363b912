"""`koff serve`: memories by name, as they are in the folder now; and never another one's text."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tolerance import CLOSE

SMALL = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "8"]
SMALL += ["--max-num-batched-tokens", "256"]
START = 180  # seconds


class Server:
    """`koff serve` in a process of its own.

    Args:
        koff: interpreter that has koff.
        folder: to serve.
        log: file for what it prints.
        extra: more options.
    """

    def __init__(self, koff: str, folder: Path, log: Path, *extra: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [koff, "-m", "koff.cli", "serve", str(folder), "--python", sys.executable]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *SMALL, *extra]
        env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_ENABLE")}
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait(self) -> Server:
        """Return once it answers."""
        end = time.monotonic() + START
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.get("/health")
                return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def get(self, path: str) -> bytes:
        """What a GET answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def open(self, model: str, prompt: list[int], **more):
        """An answer to a completion, still open."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 20}
        body |= {"return_token_ids": True, **more}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)

    def complete(self, model: str, prompt: list[int], **more) -> dict:
        """A completion, whole."""
        with self.open(model, prompt, **more) as answer:
            return json.load(answer)

    def refused(self, model: str, prompt: list[int], **more) -> tuple[int, str]:
        """(status, message) of a completion that is refused."""
        with pytest.raises(urllib.error.HTTPError) as error:
            self.complete(model, prompt, **more)
        return error.value.code, json.load(error.value)["error"]["message"]

    def names(self) -> set[str]:
        """What /v1/models lists."""
        return {card["id"] for card in json.loads(self.get("/v1/models"))["data"]}

    def kill(self) -> None:
        """As a power cut would: no process of it is told."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def serve(request, tmp_path):
    """A function that starts servers; they end with the test."""
    started = []

    def start(folder: Path, *extra: str) -> Server:
        log = tmp_path / f"server-{len(started)}.log"
        started.append(Server(request.config.getoption("--koff"), folder, log, *extra))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


def become(folder: Path, version: Path) -> None:
    """Give a folder the memories of another version, as koff does: koff.json comes last."""
    for path in (version / "memories").iterdir():
        shutil.rmtree(folder / "memories" / path.name, ignore_errors=True)
        shutil.copytree(path, folder / "memories" / path.name)
    shutil.copyfile(version / "koff.json", folder / ".new")
    (folder / ".new").rename(folder / "koff.json")


def check(server: Server, model: str, row: dict) -> str:
    """Ask for a completion and compare; the name of what answered."""
    answer = server.complete(model, row["prompt"], logprobs=0, echo=False)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == row["ids"]
    assert choice["prompt_token_ids"] == row["prompt"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(row["logprobs"], abs=CLOSE)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(row["prompt"])
    assert usage["total_tokens"] == len(row["prompt"]) + 20
    return answer["model"]


def test_memories_come_go_and_change(serve, root, expected, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(root / "before", folder)
    server = serve(folder).wait()
    old = {name for name in server.names() if "@" in name}
    assert server.names() == {"backbone", "aa", "bb", *old} and len(old) == 2
    before, after = expected["before"], expected["after"]
    for name in ("aa", "bb"):
        answered = {check(server, name, row) for row in before[name]}
        assert len(answered) == 1 and answered <= old
        check(server, *answered, before[name][0])  # exactly this version
    for row in before[""]:
        check(server, "backbone", row)
    status, message = server.refused("xx", [5])
    assert status == 404 and message == "the model must be one of backbone, aa, bb, got 'xx'"
    long = [5] * 121
    status, message = server.refused("aa", long)
    assert status == 400 and "must leave room for a token in max_model_len (128)" in message
    assert server.complete("backbone", long)["usage"]["completion_tokens"] == 7

    become(folder, root / "after")
    for name in ("aa", "cc"):
        for row in after[name]:
            check(server, name, row)
    assert before["aa"][1]["ids"] != after["aa"][1]["ids"]
    assert server.refused("bb", [5])[0] == 404
    assert {name for name in server.names() if "@" not in name} == {"backbone", "aa", "cc"}

    # Another backbone lies there now, which is not the one that is loaded.
    shutil.rmtree(folder)
    shutil.copytree(root / "other", folder)
    for row in after["aa"]:
        check(server, "aa", row)


def test_no_row_gets_another_memorys_text(serve, root, expected):
    server, own = serve(root / "eight", "--max-loras", "4").wait(), expected["eight"]
    names = {memory: memory or "backbone" for memory in own}
    assert len(names) == 9

    def client(seed: int) -> int:
        rng, cancelled = random.Random(seed), 0
        for _ in range(10):
            memory = rng.choice([*own])
            row = rng.choice(own[memory])
            if rng.random() < 0.7:
                check(server, names[memory], row)
                continue
            # Some go away in the middle; what they have read is theirs.
            got, keep = [], rng.randrange(1, 8)
            with server.open(names[memory], row["prompt"], stream=True) as answer:
                while len(got) < keep:
                    line = answer.readline().decode().removeprefix("data: ").strip()
                    if line.startswith("{"):
                        got += json.loads(line)["choices"][0]["token_ids"] or []
            assert got == row["ids"][: len(got)]
            cancelled += 1
        return cancelled

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(client, range(20))) > 20
    server.kill()
    server = serve(root / "eight", "--max-loras", "4").wait()
    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(client, range(20, 30))) > 10


def test_a_server_that_goes_on_otherwise_does_not_start(serve, root, tmp_path, monkeypatch):
    """As if koff went on with another token: the server says so, and takes no request."""
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path))
    serve(root / "before").wait().kill()
    (path,) = (tmp_path / "vllm").glob("samples-*.json")
    samples = json.loads(path.read_text())
    (name,) = (label for label in samples if label.startswith("aa@"))
    samples[name]["logprobs"][3] += 0.01
    path.write_text(json.dumps(samples))
    server = serve(root / "before")
    assert server.process.wait(START) != 0
    assert f"{name} must go on as koff does, got a difference: token 3" in server.log.read_text()
