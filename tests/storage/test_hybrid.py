"""Models with recurrent layers (Qwen3.5) are pruned, trained, saved, loaded and exported as others
are; their learned caches have a format of koff's own."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import bare
from support.character_tokenizer import make_tokenizer
from support.damage import edit, reseal, reshape
from support.models import HYBRID, attached, tiny, tokens
from support.trainings import DOMAINS, arguments
from support.widths import compacted, spread
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM

import koff
from koff.model import arch
from koff.model.prefill import fill_from_tokens

pytestmark = pytest.mark.usefixtures("no_real_fsync")

MIX = ["es", None, "keys"]
MEMORIES = ("en", "keys", "es", None, MIX)
FP32 = 1e-5


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A saved model whose layers differ in width, which no test changes."""
    place = tmp_path_factory.mktemp("hybrid")
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    return koff.save(compacted(HYBRID), place / "out", tokenizer=tokenizer)


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


@pytest.mark.parametrize("per_layer", ["global", "uniform"])
@torch.no_grad()
def test_masked_compacted_and_saved_are_one_model(per_layer, tmp_path):
    model, ids = spread(attached(HYBRID, target_sparsity=0.4)), tokens()
    soft = model(ids, memory="en").logits
    koff.binarize(model, per_layer=per_layer, multiple_of=8)
    masked = [model(ids, memory=m).logits for m in MEMORIES]
    assert (masked[0] - soft).abs().max() > 1e-3  # the mask does something
    small = koff.compact(model)
    stock = per_layer == "uniform"
    assert small.config.model_type == (HYBRID if stock else f"koff_{HYBRID}")
    assert (len(set(arch.widths(small))) == 1) == stock
    again = koff.load(koff.save(small, tmp_path / "out"))
    for memory, wanted in zip(MEMORIES, masked, strict=True):
        assert (small(ids, memory=memory).logits - wanted).abs().max() < FP32
        assert torch.equal(again(ids, memory=memory).logits, small(ids, memory=memory).logits)
    texts = [m.generate(ids, memory=MIX, max_new_tokens=5, do_sample=False) for m in (small, again)]
    assert torch.equal(*texts)
    koff.save(again, tmp_path / "twice")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        other = tmp_path / "twice" / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == other.read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(plain) is Qwen3_5ForCausalLM) == stock
    assert torch.equal(plain(ids).logits, small(ids).logits)


@pytest.mark.parametrize("recurrent", [True, False])
def test_what_lies_in_the_folder_of_a_cache(recurrent, tmp_path):
    kv = koff.KVConfig(7, "tokens", num_frozen_tokens=2, recurrent_state=recurrent)
    model = attached(HYBRID, kv=kv, target_sparsity=0)
    out = koff.save(model, tmp_path / "out")
    folder = out / "memories/en/kv"
    assert {p.name for p in folder.iterdir()} == {"cache.json", "cache.safetensors"}
    assert json.loads((folder / "cache.json").read_text()) == {
        "format": 1, "num_tokens": 7, "num_frozen_tokens": 2, "recurrent_state": recurrent
    }  # fmt: skip
    shapes = {name: tuple(t.shape) for name, t in load_file(folder / "cache.safetensors").items()}
    wanted = {"layers.1.keys": (2, 7, 16), "layers.1.values": (2, 7, 16)}
    for layer in (0, 2) if recurrent else ():
        wanted |= {f"layers.{layer}.state": (4, 8, 12), f"layers.{layer}.conv": (80, 3)}
    assert shapes == wanted
    again = koff.load(out)
    config = again.koff.memories["en"].kv_config
    assert config.num_frozen_tokens == 2 and config.recurrent_state == recurrent
    assert torch.equal(again(tokens(), memory=MIX).logits, model(tokens(), memory=MIX).logits)


def test_the_card_says_what_needs_koff_and_its_code_runs(saved, bare_python):
    card = (saved / "README.md").read_text("utf-8")
    assert "needs koff: PEFT has no place for the\nstates of recurrent layers" in card
    with_koff, without = (part.split("```")[0] for part in card.split("```python\n")[1:])
    assert "load_adapter" in without and "PeftModel" not in without
    bare.run(bare_python, bare.NO_KOFF + without, cwd=saved)


def test_what_peft_has_no_place_for_is_not_exported(saved, tmp_path):
    with pytest.raises(ValueError, match="must have no learned cache where layers are recurrent"):
        koff.export_merged(saved, "en", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_cache_comes_into_another_model_of_the_same_backbone(saved, tmp_path):
    from peft import CartridgeConfig

    model, ids = koff.load(saved), tokens()
    koff.import_memory(model, "copy", kv=saved / "memories/en/kv", lora=saved / "memories/en/lora")
    assert torch.equal(model(ids, memory="copy").logits, model(ids, memory="en").logits)
    CartridgeConfig(num_virtual_tokens=3).save_pretrained(tmp_path / "cartridge")
    with pytest.raises(ValueError, match="own .cache.json. for a model with recurrent layers, got"):
        koff.import_memory(model, "theirs", kv=tmp_path / "cartridge")
    with pytest.raises(FileNotFoundError, match="cache.json"):
        koff.import_memory(model, "none", kv=tmp_path)


DAMAGES = {
    "another format": (dict(format=2), "the format in cache.json must be 1, got 2"),
    "no switch": (dict(recurrent_state=None), "recurrent_state must be true or false, got None"),
    "no states": (dict(recurrent_state=False), r"layers.0.conv of the .* must have shape None"),
    "more tokens": (dict(num_tokens=8), r"layers.1.keys of the .* must have shape \(2, 8, 16\)"),
    "huge": (dict(num_tokens=10**12), r"layers.1.keys of the learned cache must have shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_settings_are_refused(damage, saved):
    changes, message = DAMAGES[damage]
    edit(saved / "memories/keys/kv/cache.json", **changes)
    with pytest.raises(ValueError, match=message):
        koff.load(saved)
    reseal(saved)  # by someone who knows how
    with pytest.raises(ValueError, match=message):
        koff.load(saved)


def test_damaged_files_are_refused(saved):
    folder = saved / "memories/keys/kv"
    whole = (folder / "cache.safetensors").read_bytes()
    reshape(folder / "cache.safetensors", "layers.2.state", (4, 8, 13))
    reseal(saved)
    with pytest.raises(ValueError, match=r"layers.2.state .* must have shape \(4, 8, 12\), got"):
        koff.load(saved)
    (folder / "cache.safetensors").write_bytes(whole)
    (folder / "cache.json").write_text(json.dumps({"format": 1, "num_tokens": 7}))
    reseal(saved)
    with pytest.raises(ValueError, match="must hold num_tokens, num_frozen_tokens, recurrent_stat"):
        koff.load(saved)


def run(folder, model, **changes):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, fix_mask_at=0.5)
    args = arguments(folder, **{**settings, **changes})
    return koff.KoffTrainer(model, args, train_datasets=DOMAINS)


def fresh(seed=0):
    base = tiny(HYBRID, initializer_range=0.1)
    config = koff.KoffConfig(tuple(DOMAINS), kv=koff.KVConfig(5), seed=seed)
    return koff.attach(base, config)


def test_training_fills_the_states_from_text_moves_them_and_resumes(tmp_path):
    def of_en(model):
        memory = model.koff.memories["en"]
        return {name: p.detach().clone() for name, p in memory.kv.named_parameters()}

    model = fresh()
    fill_from_tokens(model, "en", DOMAINS["en"][0]["input_ids"][:5])
    begun = of_en(model)
    whole = run(tmp_path / "a", fresh())
    whole.train()
    ended = of_en(whole.model)
    assert ended.keys() == begun.keys() and {"0.state", "2.conv", "1.k"} <= ended.keys()
    for name in ended:  # four steps of Adam at 1e-2, from where the text left them
        assert 0 < (ended[name] - begun[name]).abs().max() < 0.1, name
    assert begun["0.conv"].abs().max() > 0.1
    model = fresh(seed=9)  # other initial values: the checkpoint must bring all of them
    model.koff.config = whole.model.koff.config
    again = run(tmp_path / "b", model)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    theirs = whole.model.koff.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in again.model.koff.state_dict().items())


def test_a_memory_is_added_to_a_folder(saved, tmp_path):
    before = koff.load(saved)(tokens(), memory="en").logits
    koff.add_memory(
        saved,
        "more",
        DOMAINS["en"],
        kv=koff.KVConfig(6),
        args=arguments(tmp_path / "run", max_steps=2),
    )
    model = koff.load(saved)
    assert torch.equal(model(tokens(), memory="en").logits, before)
    assert model.koff.memories["more"].length == 6
    assert not torch.equal(model(tokens(), memory="more").logits, before)
