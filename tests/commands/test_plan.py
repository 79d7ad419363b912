"""`koff plan`: what a recipe will take, of a configuration alone."""

import json

import pytest
import yaml
from support.command_line import RECIPE, fail, succeed
from transformers import LlamaConfig

from bench.models import llama_config
from bench.rehearse import MODELS
from koff.commands import plan as planning
from koff.commands.recipe import load_recipe
from koff.commands.train import check_model, load_base, make_trainer, prepare, training_arguments
from koff.model.attach import attach


def made(recipe, **settings) -> planning.Plan:
    """The plan of a recipe, with the configuration of its model."""
    return planning.plan(recipe, check_model(recipe), **settings)


@pytest.fixture
def config_alone(tmp_path, no_data_root):
    """A recipe whose model is a config.json, without weights, tokenizer or data."""
    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    train = RECIPE["train"] | {"batch_size": 8, "block_size": 512}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"train": train}), "utf-8")
    return path


def test_a_configuration_is_enough(config_alone, tmp_path):
    options = ("--json", tmp_path / "plan.json", "--tflops", 2, "--memory", "24GB")
    out = succeed("plan", config_alone, *options)
    for name in ("parameters, base", "peak, training step", "loss", "one checkpoint", "It fits"):
        assert name in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["steps"] == 4 and found["tokens"] == 4 * 8 * 512
    assert found["seconds"] == found["flops"] / 2e12
    assert found["fits"] is True and found["changes"] == []
    kinds = found["bytes"]
    assert kinds["optimiser"] == 2 * kinds["learned"] == 8 * found["parameters"]["trained"]
    assert 0 < kinds["activations_with_checkpointing"] < kinds["activations"]
    step = found["peaks"]["step"]
    assert step > kinds["weights"] + kinds["learned"] + kinds["optimiser"] + kinds["activations"]


def test_sizes_are_those_of_the_run(root, no_data_root):
    recipe = load_recipe(root / "recipe.yaml")
    found = made(recipe, rate=1e12)
    model = attach(load_base(recipe), recipe.koff)
    arguments = training_arguments(recipe, root / "none", "cpu")
    trainer = make_trainer(model, prepare(recipe), arguments, "")
    sizes = found.setting.sizes
    assert sizes.trained == sum(p.numel() for p in model.koff.parameters() if p.requires_grad)
    # With the frozen first token of each cache, and the masks.
    assert found.checkpoint == pytest.approx(trainer.checkpoint_bytes(), rel=0.01)


@pytest.mark.slow
def test_what_does_not_fit_is_changed_in_the_order_of_what_it_costs(config_alone, tmp_path):
    recipe = load_recipe(config_alone)
    peak = made(recipe, rate=1e12).setting.peaks.most
    some = made(recipe, memory=int(0.4 * peak), rate=1e12)
    assert some.fits and some.changes[-1].peak <= int(0.4 * peak)
    assert some.changes[0].change == "train.activation_checkpointing=true"
    # Overrides as they are, so that a plan of the changed recipe agrees.
    overrides = [part for change in some.changes for part in change.change.split()]
    changed = made(load_recipe(config_alone, overrides), rate=1e12)
    assert changed.setting.peaks.most == some.changes[-1].peak
    everything = made(recipe, memory=1000, rate=1e12)
    assert [change.change.split("=")[0] for change in everything.changes] == [
        "train.activation_checkpointing",
        "train.batch_size",
        "train.block_size",
        "train.distillation_weight",
        "FSDP over 64 devices",
    ]
    assert not everything.fits
    assert "smaller model" in succeed("plan", config_alone, "--memory", "1KB", "--tflops", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "memory", "weights"), [("llama-3.2-3b", "12GB", 2.4), ("llama-3.1-8b", "24GB", 6.0)]
)
def test_large_models_fit_in_four_bits(name, memory, weights, tmp_path):
    shape, tied = MODELS[name]
    llama_config(
        shape, tie_word_embeddings=tied, max_position_embeddings=4096, dtype="bfloat16"
    ).save_pretrained(tmp_path)
    overrides = (f"model={tmp_path}", "quantization=nf4")
    recipe = load_recipe(f"koff/recipes/{name}.yaml", overrides)
    found = made(recipe, memory=planning.bytes_from(memory), rate=1e12)
    assert found.fits and not found.changes
    # Half a byte for each number of a layer, 1/64 for scales, and embeddings and head in 16 bits.
    assert found.setting.weights < weights * 1e9
    # Saved is the narrow model in 16 bits, which is there at the end.
    peaks, sizes = found.setting.peaks, found.setting.sizes
    assert peaks.compact > found.output > 2 * (sizes.parameters - sizes.removed)


@pytest.mark.slow
def test_few_bits_are_proposed_where_they_are_enough(config_alone, tmp_path):
    wide = dict(hidden_size=1024, intermediate_size=4096, vocab_size=512, num_hidden_layers=2)
    LlamaConfig(**wide, num_attention_heads=4, max_position_embeddings=64).save_pretrained(
        tmp_path / "model"
    )
    small = ("train.batch_size=1", "train.block_size=32", "koff.lora.target_modules=[q_proj]")
    checkpointed = (*small, "train.activation_checkpointing=true")
    few = load_recipe(config_alone, (*checkpointed, "quantization=int8"))
    whole = made(load_recipe(config_alone, checkpointed), rate=1e12).setting.peaks.most
    less = made(few, rate=1e12).setting.peaks.most
    assert less < 0.9 * whole
    recipe = load_recipe(config_alone, small)
    found = made(recipe, memory=(whole + less) // 2, rate=1e12)
    assert found.fits and [change.change for change in found.changes] == [
        "train.activation_checkpointing=true",
        "quantization=int8",
    ]
    assert found.changes[-1].peak == less
    # Nothing is sharded with them.
    lost = made(few, memory=1000, rate=1e12)
    assert not lost.fits and "FSDP" not in lost.changes[-1].change


@pytest.mark.slow
def test_more_devices_see_more_tokens(config_alone):
    recipe = load_recipe(config_alone)
    one, two = (made(recipe, devices=n, rate=1e12) for n in (1, 2))
    assert two.tokens == 2 * one.tokens and two.flops == one.flops
    assert two.setting.peaks.step - one.setting.peaks.step == one.setting.learned


def test_shared_a_base_takes_its_shard_and_what_is_whole(config_alone, tmp_path):
    """Against the shards of two processes: tests/training/test_loading_in_shards.py."""
    options = ("--devices", 4, "--tflops", 1, "--json", tmp_path / "plan.json")
    out = succeed("plan", config_alone, *options, "--fsdp")
    assert "its shard" in out and "CPU memory of each process" in out
    found = json.loads((tmp_path / "plan.json").read_text())
    succeed("plan", config_alone, *options)
    alone = json.loads((tmp_path / "plan.json").read_text())
    assert found["fsdp"] is True and alone["fsdp"] is False
    layer = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    head = 4 * 512 * 64
    assert found["bytes"]["shard"] == alone["bytes"]["weights"] // 4
    assert found["bytes"]["weights"] == found["bytes"]["shard"] + 3 * layer + head
    assert alone["bytes"]["shard"] == alone["bytes"]["weights"]
    assert found["tokens"] == alone["tokens"] and found["disk"] == alone["disk"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("1.5 t", 15 * 10**11), ("800mb", 8 * 10**8)],
)
def test_sizes_are_read_as_they_are_written(text, size):
    assert planning.bytes_from(text) == size


def test_bad_input_is_one_line(config_alone, tmp_path):
    assert "--memory must be a size" in fail("plan", config_alone, "--memory", "much")
    assert "--memory must be a size" in fail("plan", config_alone, "--memory", "0GB")
    assert "--devices must be at least 1" in fail("plan", config_alone, "--devices", 0)
    assert "--fsdp must have several --devices" in fail("plan", config_alone, "--fsdp")
    assert "--tflops must be positive" in fail("plan", config_alone, "--tflops", 0)
    assert "must be an existing file" in fail("plan", tmp_path / "none.yaml")
    assert "existing folder" in fail("plan", config_alone, "--json", tmp_path / "no" / "x.json")
    lost = ("plan", config_alone, "--set", "model=./nowhere")
    assert "model must be an existing folder" in fail(*lost)
    wide = ("plan", config_alone, "--set", "train.width_multiple_of=200")
    assert "got 200, by which a layer can only keep 128; lower it" in fail(*wide)
    assert "must be at most 0.953" in fail(
        "plan",
        config_alone,
        "--set",
        "koff.sparsity_scope=model",
        "--set",
        "koff.target_sparsity=0.9",
    )


def test_a_run_says_what_it_expects(root, no_data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WORTH_COUNTING", 0)
    out = succeed("train", root / "recipe.yaml", "--output", tmp_path / "out", "--device", "cpu")
    recipe = load_recipe(root / "recipe.yaml")
    peak = made(recipe, rate=1e12).headline().split(" at once")[0]
    assert peak in out
