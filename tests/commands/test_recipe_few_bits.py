"""`koff train` with ``quantization``: trained in few bits, saved with the checkpoint's weights."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.command_line import RECIPE, fail, fill_root, succeed
from transformers import AutoModelForCausalLM, Trainer

import koff
from koff.commands import train
from koff.commands.recipe import load_recipe
from koff.model import arch
from koff.model.arch import is_few_bits
from koff.model.few_bits import kind

pytestmark = pytest.mark.few_bits

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_root(tmp_path_factory.mktemp("root"))


def run(folder, output, *overrides):
    settings = [part for override in overrides for part in ("--set", override)]
    options = ("--output", output, "--device", "cpu", *settings)
    return succeed("train", folder / "recipe.yaml", *options)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("nf4", "4bit"), pytest.param("int8", "torchao", marks=slow)],
)
def test_recipe_few_bits_trains_saves_and_loads(folder, tmp_path, name, wanted, monkeypatch):
    kinds = []
    fix = koff.KoffTrainer._fix_mask
    monkeypatch.setattr(
        koff.KoffTrainer,
        "_fix_mask",
        lambda self, model, inputs: (
            kinds.extend(kind(linear) for _, linear in arch.sites(model)),
            fix(self, model, inputs),
        ),
    )
    run(folder, tmp_path / "out", f"quantization={name}")
    assert set(kinds) == {wanted}  # until the end it was in few bits
    model = koff.load(tmp_path / "out")
    assert not is_few_bits(model) and model.koff.memory_names == ("en", "fr")
    original = load_file(folder / "model" / "model.safetensors")
    for index, rows in enumerate(model.koff.kept):
        layer = f"model.layers.{index}"
        own = model.get_submodule(layer)
        assert torch.equal(own.mlp.up_proj.weight, original[f"{layer}.mlp.up_proj.weight"][rows])
        q_proj = original[f"{layer}.self_attn.q_proj.weight"]
        assert torch.equal(own.self_attn.q_proj.weight, q_proj)
    log = json.loads((tmp_path / "out" / "train_log.json").read_text())
    measured = log["quantization"]["perplexity"]
    assert log["quantization"]["format"] == name and measured.keys() == {"en", "fr"}
    # Of the same text by almost the same weights. NF4 moves each by a tenth, in this random model.
    assert all(0.8 < trained / saved < 1.25 for trained, saved in measured.values())
    assert "perplexity" in succeed("eval", tmp_path / "out", "--device", "cpu")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids, memory=None).logits)


@slow
def test_recipe_few_bits_without_gates(folder, tmp_path):
    run(folder, tmp_path / "out", "quantization=nf4", "koff.target_sparsity=0")
    log = json.loads((tmp_path / "out" / "train_log.json").read_text())
    assert log["quantization"]["format"] == "nf4" and "sparsity" not in log
    assert arch.widths(koff.load(tmp_path / "out")) == [64, 64]


@slow
def test_recipe_few_bits_resumes_exactly(folder, tmp_path):
    """A checkpoint holds nothing of the base, which is quantised anew, alike."""

    class Killed(Exception):
        pass

    options = ("quantization=nf4", "train.steps=4")
    run(folder, tmp_path / "whole", *options)
    recipe = load_recipe(folder / "recipe.yaml", options)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.TrainProgress, "on_step_end", stop)
        with pytest.raises(Killed):
            train.run(recipe, tmp_path / "killed", device="cpu")
    train.run(recipe, tmp_path / "killed", device="cpu")
    for memory in ("en", "fr"):
        place = f"memories/{memory}/lora/adapter_model.safetensors"
        whole, again = (load_file(tmp_path / name / place) for name in ("whole", "killed"))
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_recipe_few_bits_bf16_computes_in_bf16(folder):
    recipe = load_recipe(folder / "recipe.yaml", ("quantization=nf4", "train.bf16=true"))
    model = train.load_quantised(recipe, torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert model.dtype == torch.float32 and model.device.type == "cpu"


# ---- what is refused ----


def test_recipe_few_bits_of_an_unknown_name(folder, tmp_path):
    options = ("--output", tmp_path / "out", "--device", "cpu", "--set", "quantization=gptq")
    assert "quantization" in fail("train", folder / "recipe.yaml", *options)
    assert not (tmp_path / "out").exists()


def test_recipe_few_bits_and_gguf(folder):
    with pytest.raises(ValueError, match="quantization must be left out with gguf_file"):
        load_recipe(folder / "recipe.yaml", ("quantization=nf4", "gguf_file=m.gguf"))


@pytest.mark.parametrize(("name", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_recipe_few_bits_without_the_package(folder, tmp_path, name, package, monkeypatch):
    find = train.importlib.util.find_spec
    monkeypatch.setattr(
        train.importlib.util, "find_spec", lambda n, *rest: None if n == package else find(n, *rest)
    )
    options = ("--output", tmp_path / "out", "--device", "cpu", "--set", f"quantization={name}")
    said = fail("train", folder / "recipe.yaml", *options)
    assert f"must have the package `{package}`" in said and "koff[quantized]" in said
    assert not (tmp_path / "out").exists()


def test_recipe_few_bits_of_a_checkpoint_that_compact_cannot_read(tmp_path):
    """Found before the training, not behind it."""
    folder = fill_root(tmp_path)
    weights = folder / "model" / "model.safetensors"
    torch.save(load_file(weights), folder / "model" / "pytorch_model.bin")
    weights.unlink()
    recipe = load_recipe(folder / "recipe.yaml", ("quantization=nf4",))
    with pytest.raises(ValueError, match="train: the original checkpoint .* be in safetensors"):
        train.run(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_recipe_few_bits_are_measured_on_what_there_is(tmp_path):
    """A validation split that is too short is found before the training, not behind it."""
    folder = fill_root(tmp_path)
    (folder / "short.jsonl").write_text(json.dumps({"text": "ab"}) + "\n")
    values = dict(RECIPE, quantization="nf4")
    values["data"] = {**RECIPE["data"], "en": {**RECIPE["data"]["en"], "validation": "short.jsonl"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    options = ("--output", tmp_path / "out", "--device", "cpu")
    assert "data.en.validation" in fail("train", folder / "recipe.yaml", *options)
    assert not (tmp_path / "out").exists()


def test_recipe_few_bits_under_fsdp(folder, tmp_path, monkeypatch):
    recipe = load_recipe(folder / "recipe.yaml", ("quantization=nf4",))
    make = Trainer.create_accelerator_and_postprocess

    def sharding(self):
        make(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharding)
    with pytest.raises(ValueError, match="KoffTrainer: the base must be plain under FSDP"):
        train.run(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
