"""Recipes: strict parsing, overrides, paths, and what a run checks before it writes."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import activation_checkpointing
from support.models import HYBRID, multimodal
from transformers import AutoModelForCausalLM

import koff
from koff.commands.recipe import (
    apply_overrides,
    data_root,
    first_difference,
    load_recipe,
    parse,
    shipped_recipes,
)
from koff.commands.train import (
    check_model,
    check_output,
    last_checkpoint,
    load_base,
    training_arguments,
)
from koff.data.sources import Completion
from koff.model import arch
from koff.training.checkpoint import FACTS, STATE, WEIGHTS, seal

RECIPES = list(shipped_recipes().values())
MINIMAL = {
    "model": "some/model",
    "data": {"en": {"train": "en.jsonl"}, "fr": {"train": "fr.jsonl"}},
}


def minimal(**changes):
    return parse(json.loads(json.dumps(MINIMAL)) | changes, Path("/root-of-data"))


def test_parse_defaults_follow_the_data_and_the_seed():
    recipe = minimal(seed=7)
    assert recipe.koff.memories == ("en", "fr")
    assert (recipe.koff.seed, recipe.koff.target_sparsity) == (7, 0.2)
    assert recipe.koff.lora.r == 16 and recipe.koff.kv.num_tokens == 128
    assert (recipe.train.steps, recipe.train.batching, recipe.general) == (1000, "mixed", {})
    assert minimal(koff={"seed": 3}, seed=7).koff.seed == 3
    assert minimal(koff=None, train=None, general=None) == minimal()


def test_parse_without_both_parts_learns_gates_alone():
    recipe = minimal(koff={"lora": None, "kv": None, "memories": ["en", "fr"]})
    assert recipe.koff.memories == () and recipe.koff.target_sparsity == 0.2
    assert minimal(koff={"lora": None}).koff.memories == ("en", "fr")
    assert minimal(koff={"target_sparsity": 0}).koff.target_sparsity == 0


def test_parse_takes_pefts_word_for_all_linear_layers():
    recipe = minimal(koff={"lora": {"target_modules": "all-linear"}})
    assert recipe.koff.lora.target_modules == "all-linear"
    with pytest.raises(ValueError, match="or one of 'all-linear', 'mlp-linear', got 'all'"):
        minimal(koff={"lora": {"target_modules": "all"}})


def test_parse_inverts_to_dict_through_json():
    recipe = minimal(
        koff={"kv": {"num_tokens": 4}, "lora": None},
        general={"math": {"train": {"hub": "a/b", "field": ["q", "a"]}, "weight": 2}},
        train={"fix_mask_at": None, "lora_learning_rate": "1e-3"},
    )
    again = parse(json.loads(json.dumps(recipe.to_dict())), recipe.root)
    assert again == recipe
    assert again.train.lora_learning_rate == 1e-3 and again.train.fix_mask_at is None
    assert again.general["math"].weight == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=x", r"modle must be one of the known keys \['data'.*did you mean 'model'\?"),
        ("train.setps=1", r"train\.setps must be one of.*did you mean 'steps'\?"),
        ("koff.lora.alhpa=1", r"koff\.lora\.alhpa must be one of.*did you mean 'alpha'\?"),
        ("data.en.trian=x", r"data\.en\.trian must be one of.*did you mean 'train'\?"),
        ("data.en.train.hbu=x", r"data\.en\.train must have keys to be set"),
        ("data.en={test: a.jsonl}", r"data\.en\.train must be given, got nothing"),
        ("train.steps=ten", r"train\.steps must be an integer, got 'ten' \(str\)"),
        ("train.steps=true", r"train\.steps must be an integer, got True"),
        ("train.steps=0", r"in train: steps must be at least 1, got 0"),
        ("train.bf16=1", r"train\.bf16 must be true or false, got 1"),
        ("train.batching=both", r"train\.batching must be one of 'mixed', 'single', got 'both'"),
        (
            "train.gate_learning_rate=fast",
            r"train\.gate_learning_rate must be a number, got 'fast'",
        ),
        ("train.fix_mask_at=x", r"train\.fix_mask_at must be a number or null, got 'x'"),
        ("koff.target_sparsity=2", r"in koff: KoffConfig: target_sparsity must lie in 0\.\.0\.953"),
        ("koff.memories=[en]", r"koff\.memories must be the domains of data \['en', 'fr'\]"),
        ("koff.memories=[1]", r"koff\.memories\[0\] must be a text, got 1"),
        ("koff=3", r"koff must be a mapping of keys to values, got 3"),
        ("data=null", r"data must name at least one domain, got none"),
        ("data.a/b.train=x.jsonl", r"in koff: KoffConfig: a memory name must be .*'a/b'"),
        (
            "data={true: {train: x}}",
            r"the value of data must have texts for keys, got true, .* bool",
        ),
        ("general.m={train: x, weight: 0}", r"in general\.m: weight must be positive, got 0"),
        ("dtype=int8", r"dtype must be one of 'auto', 'float32'.*got 'int8'"),
        ("nothing", "an override must read KEY=VALUE, got 'nothing'"),
        ("train.steps=1" + "0" * 30, r"in train: steps must be at most 1000000000, got 10+;"),
        ("train.warmup_ratio=.nan", r"in train: warmup_ratio must lie in 0\.\.1, got nan"),
        ("seed=-1", r"seed must lie in 0\.\.4294967295, got -1"),
        ("seed=2001-13-45", r"seed must be an integer, got '2001-13-45' \(str\)"),
        ("seed=010", r"the value of seed must have numbers in base ten, got 010, .* takes for 8"),
        ("koff.memories=[no, fr]", r"memories\[0\] must be a text, got False \(bool\); quote it"),
        ("revision=3.10", r"revision must be .* got 3\.1 \(float\); quote it if it is a text"),
        ("train.steps=" + "[" * 5000, r"the value of train\.steps must be valid YAML"),
        ("train.steps=[1", r"the value of train\.steps must be valid YAML, got '\[1'"),
    ],
)
def test_load_refuses_with_the_key_path(tmp_path, override, message):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), "utf-8")
    with pytest.raises((KeyError, ValueError), match=message):
        load_recipe(path, [override])


def test_load_refuses_files_that_are_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be an existing file or one of koff's own"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "r.yaml"
    path.write_text("model: x\ndata: [", "utf-8")
    with pytest.raises(ValueError, match=r"r\.yaml line \d must be valid YAML"):
        load_recipe(path)
    path.write_text("- model", "utf-8")
    with pytest.raises(ValueError, match="must hold a mapping of keys to values, got list"):
        load_recipe(path)


WITH_DATA = "model: some/model\ndata:\n  {}\n"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("no: {train: a}", r"line 3 must have texts for keys, got no, .* type bool; quote it"),
        ("ON: {train: a}", r"line 3 must have texts for keys, got ON, .* type bool; quote it"),
        ("001: {train: a}", r"got 001, which YAML takes for a value of type int; quote it"),
        ("1.10: {train: a}", r"got 1\.10, which YAML takes for a value of type float"),
        ("12:30: {train: a}", r"got 12:30, which YAML takes for a value of type int"),
        ("~: {train: a}", r"got ~, which YAML takes for a value of type null"),
        ("? [a, b]\n  : {train: a}", r"got a sequence, which YAML takes for a value of type seq"),
        ("fr: {train: a}\n  fr: {train: b}", r"line 4 must have each key once, got 'fr' again"),
        ("fr: {train: a, train: b}", r"line 3 must have each key once, got 'train' again"),
        ("fr: {train: a}\ndata:\n  en: {train: b}", r"line 4 must have each key once, got 'data'"),
        (
            "fr: {train: a}\nseed: 1:30",
            r"line 4 must have numbers in base ten, got 1:30, .* for 90",
        ),
    ],
)
def test_yaml_that_does_not_say_what_it_seems_to_is_refused(tmp_path, written, message):
    path = tmp_path / "r.yaml"
    path.write_text(WITH_DATA.format(written), "utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_quoted_names_dates_and_merged_keys_are_what_they_seem(tmp_path):
    path = tmp_path / "r.yaml"
    written = '"no": &one {train: a, test: t}\n  "001": {<<: *one, train: b}\n  fr: {train: c}'
    # As editors on Windows write it.
    text = WITH_DATA.format(written).replace("\n", "\r\n") + "revision: 2024-01-01\n"
    path.write_bytes(text.encode("utf-8-sig"))
    recipe = load_recipe(path, ["data.off.train=d"])
    assert {name: part.train for name, part in recipe.data.items()} == {
        "no": "a", "001": "b", "fr": "c", "off": "d"
    }  # fmt: skip
    assert recipe.data["001"].test == "t" and recipe.revision == "2024-01-01"


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.yaml must be UTF-8 text, got a byte that is not"):
        load_recipe(tmp_path / "r.yaml")


def test_overrides_read_yaml_and_leave_the_input_alone():
    values = {"train": {"steps": 5}}
    changed = apply_overrides(values, ["train.steps=10", "koff.kv=null", "koff.lora.r=4", "seed=2"])
    assert changed == {"train": {"steps": 10}, "koff": {"kv": None, "lora": {"r": 4}}, "seed": 2}
    assert values == {"train": {"steps": 5}}


def test_overrides_leave_domains_and_general_parts_out():
    values = {"data": {"en": {}, "fr": {}}, "general": {"math": {}}}
    assert apply_overrides(values, ["data.fr=null", "general.math=null"]) == {
        "data": {"en": {}}, "general": {}
    }  # fmt: skip
    assert list(values["data"]) == ["en", "fr"]
    with pytest.raises(KeyError, match=r"leaves out must be one of \['en', 'fr'\], got 'es'"):
        apply_overrides(values, ["data.es=null"])


def test_paths_start_from_koff_data_or_the_recipe(tmp_path, monkeypatch):
    monkeypatch.delenv("KOFF_DATA", raising=False)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), "utf-8")
    assert load_recipe(path).sources("train")["en"].path == tmp_path / "en.jsonl"
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("KOFF_DATA", str(other))
    recipe = load_recipe(path)
    assert recipe.sources("train")["en"].path == other / "en.jsonl"
    assert data_root(tmp_path) == other
    with pytest.raises(FileNotFoundError, match=r"other/en\.jsonl must be an existing file"):
        recipe.check_files()


def test_model_is_a_folder_or_a_hub_id(tmp_path):
    recipe = minimal(model="models/tiny")
    recipe.root = tmp_path
    assert recipe.model_path() == "models/tiny"
    (tmp_path / "models/tiny").mkdir(parents=True)
    assert recipe.model_path() == str(tmp_path / "models/tiny")
    recipe.model = "./none"
    with pytest.raises(FileNotFoundError, match="model must be an existing folder or a hub id"):
        recipe.model_path()


def test_sources_know_hub_datasets_and_fields():
    recipe = minimal(
        general={
            "arc": {
                "train": {"hub": "a/arc", "name": "C", "split": "train", "limit": 5},
                "test": {"hub": "a/arc", "split": "test", "field": "question"},
                "field": "{question} {answer}",
            }
        }
    )
    source = recipe.sources("train", general=True)["arc"]
    assert (source.hub, source.name, source.limit) == ("a/arc", "C", 5)
    assert source.field == "{question} {answer}"
    assert recipe.sources("test", general=True)["arc"].field == "question"
    assert recipe.sources("validation", general=True) == {} and recipe.sources("test") == {}


def test_a_field_may_name_a_prompt_and_its_completion():
    field = {"prompt": "Q: {question}", "completion": "answer"}
    recipe = minimal(general={"qa": {"train": {"hub": "a/qa"}, "field": field}})
    source = recipe.sources("train", general=True)["qa"]
    assert source.field == Completion("Q: {question}", "answer")
    assert parse(recipe.to_dict(), recipe.root) == recipe
    with pytest.raises(KeyError, match=r"general\.qa\.field\.completion must be given"):
        minimal(general={"qa": {"train": "a", "field": {"prompt": "x"}}})


def test_activation_checkpointing_has_its_name_of_old_too(tmp_path):
    """And reaches transformers under the name that this one knows, without a warning."""
    assert not minimal().train.activation_checkpointing
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        recipe = minimal(train={name: True})
        assert recipe.train.activation_checkpointing
        assert getattr(training_arguments(recipe, tmp_path, "cpu"), activation_checkpointing.NAME)
        assert name == "activation_checkpointing" or name not in recipe.to_dict()["train"]
    with pytest.raises(KeyError, match="train.gradient_checkpointing must be one of the known"):
        minimal(train={"activation_checkpointing": True, "gradient_checkpointing": False})


def test_first_difference_names_the_key():
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) is None
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b"
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == "c"


def test_output_is_new_empty_or_the_same_run(tmp_path):
    recipe = minimal()
    out = tmp_path / "out"
    assert check_output(out, recipe) is None
    out.mkdir()
    assert check_output(out, recipe) is None
    (out / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(ValueError, match=r"must be empty or hold an interrupted run, got \['notes"):
        check_output(out, recipe)
    (out / "recipe.json").write_text(json.dumps({"root": "/", "recipe": recipe.to_dict()}), "utf-8")
    assert check_output(out, recipe) is None
    earlier = recipe.to_dict()  # of a koff that did not know a setting yet
    del earlier["koff"]["kv"]["recurrent_state"]
    (out / "recipe.json").write_text(json.dumps({"root": "/", "recipe": earlier}), "utf-8")
    assert check_output(out, recipe) is None
    for step, complete in ((5, True), (10, True), (15, False)):
        folder = out / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in (WEIGHTS, FACTS, STATE):
            (folder / name).write_text("{}", "utf-8")
        if complete:
            seal(folder)
    assert check_output(out, recipe) == str(out / "checkpoints" / "checkpoint-10")
    with pytest.raises(
        ValueError, match=r"same recipe to resume, got one with another train\.steps"
    ):
        check_output(out, minimal(train={"steps": 3}))
    (out / "koff.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="must not hold a finished model"):
        check_output(out, recipe)
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        check_output(out / "notes.txt", recipe)


def test_of_a_multimodal_model_the_language_model_is_looked_at(tmp_path):
    multimodal().save_pretrained(tmp_path)
    recipe = minimal(model=str(tmp_path))
    config = check_model(recipe)
    assert config.model_type == HYBRID and config.max_position_embeddings == 256
    model = load_base(recipe)
    assert type(model) is arch.stock_classes(HYBRID)[1]
    koff.attach(model, recipe.koff)


def test_last_checkpoint_of_nothing_is_none(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    recipe = load_recipe(path)
    assert recipe.koff.memories == ("en", "fr", "es")
    assert recipe.koff.target_sparsity == 0.2 and recipe.koff.sparsity_scope == "mlp"
    assert recipe.sources("test") and recipe.sources("test", general=True)
    for name in recipe.koff.memories:  # train and test of one domain never overlap
        train, test = (recipe.sources(split)[name] for split in ("train", "test"))
        if train.hub is not None and train.split == test.split:
            assert test.skip + test.limit <= train.skip


def test_shipped_recipes_are_there_by_their_names(tmp_path, monkeypatch):
    names = {path.stem for path in RECIPES}
    large = {"llama-3.2-3b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "qwen3.5-4b"}
    assert large | {"docs-llama", "smollm2"} <= names
    monkeypatch.delenv("KOFF_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("smollm2", ["train.steps=3"])
    assert recipe.train.steps == 3 and recipe.root == tmp_path.resolve()
    (tmp_path / "smollm2").write_text("model: mine\ndata: {en: {train: a.txt}}", "utf-8")
    assert load_recipe("smollm2").model == "mine"  # a file of one's own comes first
    with pytest.raises(FileNotFoundError, match=r"koff's own recipes \(docs-llama, .*smollm2\)"):
        load_recipe("smollm3")


def test_recipes_are_part_of_the_package():
    """A wheel holds what package-data names."""
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["koff"]
    package = Path(koff.__file__).parent
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert set(RECIPES) and set(RECIPES) <= shipped


def _write_gguf(path):
    """A tiny Llama with random weights, as llama.cpp writes one."""
    import gguf

    hidden, middle, heads, kv_heads, vocabulary = 16, 24, 4, 2, 40
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(vocabulary)
    rng = np.random.default_rng(0)
    kv = hidden // heads * kv_heads
    shapes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    shapes |= {"ffn_gate": (middle, hidden), "ffn_up": (middle, hidden)}
    shapes |= {"ffn_down": (hidden, middle)}
    tensors = {"token_embd": (vocabulary, hidden), "output_norm": (hidden,)}
    tensors |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path, dtype):
    _write_gguf(tmp_path / "tiny.gguf")
    recipe = minimal(model=str(tmp_path), gguf_file="tiny.gguf", dtype=dtype)
    assert check_model(recipe).model_type == "llama"
    model = load_base(recipe)
    assert model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    for kind in ("named_parameters", "named_buffers"):  # RoPE's frequencies are a buffer
        first, second = dict(getattr(model, kind)()), dict(getattr(again, kind)())
        assert set(first) == set(second)
        assert all(
            torch.equal(first[n], t) and first[n].dtype == t.dtype for n, t in second.items()
        )
    koff.attach(model, koff.KoffConfig(memories=("en",), kv=None))
    assert model(torch.arange(12)[None], memory="en").logits.isfinite().all()
