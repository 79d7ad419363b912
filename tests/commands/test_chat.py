"""`koff chat`: with a folder, and with a server that answers bit by bit."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.widths import compacted
from typer.testing import CliRunner

import koff
from koff.cli import app

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}a"


def run(*words, lines):
    """A call of `koff chat` that reads these lines."""
    return CliRunner().invoke(app, ["chat", *map(str, words)], input=lines)


@pytest.fixture
def folder(tmp_path):
    """A saved model whose tokenizer has a chat template."""
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    model = compacted("llama", memories=("fr",), changes={"vocab_size": len(tokenizer)})
    return koff.save(model, tmp_path / "out", tokenizer=tokenizer)


def test_a_folder_answers_with_the_memory(folder):
    result = run(folder, "--memory", "fr", "--max-new-tokens", "5", lines="abc\n\nde\n")
    assert result.exit_code == 0, result.output
    model, tokenizer = koff.load(folder), make_tokenizer(bos_token="<s>")
    messages, answers = "", []
    for line in ("abc", "de"):
        messages += f"u{line}"
        ids = torch.tensor([tokenizer(f"{messages}a")["input_ids"]])
        greedy = {"memory": "fr", "max_new_tokens": 5, "do_sample": False}
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        messages += f"a{answers[-1]}"
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)


def test_what_a_folder_lacks_is_said(folder):
    unknown = run(folder, "--memory", "es", lines="")
    assert "the memory must be one of ['fr'], got 'es'" in unknown.output
    tokenizer = make_tokenizer(bos_token="<s>")
    plain = compacted("llama", memories=("fr",), changes={"vocab_size": len(tokenizer)})
    koff.save(plain, folder, tokenizer=tokenizer, overwrite=True)
    assert "must have a chat template" in run(folder, lines="").output


@pytest.fixture
def server():
    """(url, the requests it got) of a server that speaks as vLLM's does."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, body))
            known = body["model"] in ("backbone", "fr")
            self.send_response(200 if known else 404)
            self.end_headers()
            if not known:
                text = json.dumps({"error": {"message": "the model must be one of backbone, fr"}})
                self.wfile.write(text.encode())
                return
            for part in ("Bon", "jour", None):
                event = {"choices": [{"delta": {"content": part}}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args):
            pass

    service = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}", got
    service.shutdown()
    service.server_close()


@pytest.mark.parametrize("ending", ["", "/", "/v1"])
def test_a_server_answers_with_the_memory(server, ending):
    url, got = server
    result = run(url + ending, "--memory", "fr", lines="Salut\nBien\n")
    assert result.exit_code == 0 and result.stdout == "Bonjour\nBonjour\n"
    assert [path for path, _ in got] == ["/v1/chat/completions"] * 2
    assert got[1][1]["model"] == "fr" and got[1][1]["messages"] == [
        {"role": "user", "content": "Salut"},
        {"role": "assistant", "content": "Bonjour"},
        {"role": "user", "content": "Bien"},
    ]


def test_what_a_server_refuses_is_said(server):
    result = run(server[0], "--memory", "xx", lines="Salut\n")
    assert result.exit_code == 2 and "the model must be one of backbone, fr" in result.output
    nobody = run("http://127.0.0.1:9", lines="Salut\n")
    assert nobody.exit_code == 2 and "must be a server of `koff serve`" in nobody.output
