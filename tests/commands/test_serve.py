"""`koff serve`: what is looked at before vLLM starts, and what vLLM is called with."""

import json
from pathlib import Path

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.damage import flip
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import koff
from koff.cli import app
from koff_vllm.samples import VARIABLE, read_samples


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A function that makes an interpreter which answers what koff asks it about vLLM."""
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def make(**changes):
        found = {"found": True, "version": "0.32.0", "plugin": True} | changes
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def started(monkeypatch):
    """What was executed in koff's place: [(file, command, environment)]."""
    calls = []
    monkeypatch.setattr("os.execve", lambda *call: calls.append(call))
    return calls


def run(*words):
    """A call of `koff serve`."""
    return CliRunner().invoke(app, ["serve", *map(str, words)])


def test_vllm_gets_the_folder_and_every_option(saved, python, started):
    result = run(saved, "--python", python(), "--port", "8001", "-tp", "2", "--dtype=bfloat16")
    assert result.exit_code == 0, result.output
    ((file, command, environment),) = started
    assert command[:5] == [file, "-m", "vllm.entrypoints.cli.main", "serve", str(saved.absolute())]
    assert command[-5:] == ["--port", "8001", "-tp", "2", "--dtype=bfloat16"]
    words = dict(zip(command[5:], command[6:], strict=False))
    assert words["--served-model-name"] == "backbone" and words["--max-loras"] == "3"
    assert json.loads(words["--kv-transfer-config"])["kv_connector"] == "MemoryConnector"
    assert words["--lora-target-modules"] == "q_proj" and "--enable-lora" in words
    assert environment["KOFF_CACHE"] and "VLLM_PLUGINS" not in environment


@pytest.mark.parametrize("adds", [False, True])
def test_a_tokenizer_without_a_bos_is_told(original, tmp_path, python, started, adds):
    tokenizer = make_tokenizer(bos_token="<s>")
    if adds:
        template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = template
    folder = koff.save(koff.load(original), tmp_path / "out", tokenizer=tokenizer)
    result = run(folder, "--python", python(), "--no-check")
    assert result.exit_code == 0 and len(started) == 1
    assert ("koff serve: text prompts get no <s> from this" in result.stderr) is not adds


def test_the_server_gets_what_koff_goes_on_with(saved, python, started):
    assert run(saved, "--python", python()).exit_code == 0
    samples = read_samples(Path(started[0][2][VARIABLE]))
    model = koff.load(saved)
    assert len(samples) == 4 and {label.partition("@")[0] for label in samples} == {
        "",
        *model.koff.memory_names,
    }
    for label, sample in samples.items():
        ids, name = torch.tensor([sample.prompt]), label.partition("@")[0] or None
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            memory=name,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        assert out.sequences[0, ids.shape[1] :].tolist() == sample.ids
        best = torch.cat(out.logits).log_softmax(-1).topk(2).values
        assert sample.logprobs == pytest.approx(best[:, 0].tolist(), abs=1e-5)
        assert sample.margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-5)


def test_samples_are_taken_once_for_a_content(saved, python, started, monkeypatch):
    assert run(saved, "--python", python()).exit_code == 0
    monkeypatch.setattr("koff.commands.serve.take_samples", None)  # it would fail
    assert run(saved, "--python", python()).exit_code == 0
    koff.remove_memory(saved, "es")
    assert run(saved, "--python", python(), "--no-check").exit_code == 0
    assert VARIABLE not in started[-1][2] and started[0][2][VARIABLE] == started[1][2][VARIABLE]


def test_a_list_of_plugins_gets_koff(saved, python, started, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert run(saved, "--python", python()).exit_code == 0
    assert started[0][2]["VLLM_PLUGINS"] == "other,koff"


def test_another_version_of_vllm_is_said(saved, python, started):
    result = run(saved, "--python", python(version="0.33.0"))
    assert result.exit_code == 0 and started
    assert "tested with vLLM 0.32, got 0.33.0" in result.output


MISSING = {
    "no vllm": ({"found": False, "version": None}, "vLLM must be installed for"),
    "no metadata": ({"version": None}, "the distribution 'vllm' must be installed"),
    "no plugin": ({"plugin": False}, "koff's plugin must be installed beside vLLM"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_said_in_one_line(saved, python, started, case):
    changes, message = MISSING[case]
    result = run(saved, "--python", python(**changes))
    assert result.exit_code == 2 and not started
    assert message in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("--max-model-len", "8"), ("--max_model_len=8",)], ids=["dashes", "underscores"]
)
def test_too_little_room_is_refused(saved, python, started, words):
    result = run(saved, "--python", python(), *words)
    assert result.exit_code == 2 and not started
    assert "--max-model-len must be more than 8, the learned keys" in result.output
    assert run(saved, "--python", python(), "--max-model-len", "9").exit_code == 0


def test_a_damaged_folder_never_reaches_vllm(saved, python, started, tmp_path):
    flip(saved / "model.safetensors")
    result = run(saved, "--python", python())
    assert result.exit_code == 2 and not started
    assert "model.safetensors must have the sha256" in result.output
    result = run(tmp_path / "nothing", "--python", python())
    assert result.exit_code == 2 and "must be a model that koff.save wrote" in result.output
    result = run(saved, "--python", tmp_path / "nowhere")
    assert result.exit_code == 2 and not started


@pytest.mark.parametrize(
    "words",
    [
        ("--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'),
        ("--kv_transfer_config.kv_connector=ExampleConnector",),
    ],
    ids=["json", "dotted"],
)
def test_another_connector_is_refused_where_there_are_learned_keys(saved, python, started, words):
    result = run(saved, "--python", python(), *words)
    assert result.exit_code == 2 and not started
    assert "--kv-transfer-config must be left to koff" in result.output
