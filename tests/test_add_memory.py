"""A memory more or less: backbone and other memories stay bit-identical, on a model and on disk,
and a saved folder loads wherever a change was cut short."""

import functools
import hashlib
import shutil

import pytest
import torch
from support.kills import report, run_child
from support.models import ARCHITECTURES, attached, tokens
from support.widths import spread
from transformers import TrainerCallback

import koff
from koff.storage.change import drop_memory, put_memory

pytestmark = pytest.mark.usefixtures("no_real_fsync")

NAMES = ("en", "keys", "es")


def documents(count=6, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, 60, (120,), generator=generator).tolist()}
        for _ in range(count)
    ]


def arguments(folder, **changes):
    settings = dict(max_steps=3, use_cpu=True, block_size=16, disable_tqdm=True)
    settings |= dict(save_strategy="no", per_device_train_batch_size=4, logging_steps=100)
    return koff.KoffTrainingArguments(str(folder), **settings | changes)


def small(architecture="llama", **config):
    model = spread(attached(architecture, target_sparsity=0.4, **config))
    koff.binarize(model, multiple_of=8)
    return koff.compact(model, inplace=True)


@pytest.fixture
def saved(tmp_path):
    return koff.save(small(), tmp_path / "out")


def digests(folder):
    """sha256 of every file but the two that list the memories."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("koff.json", "README.md")
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_add_memory_to_a_folder_changes_nothing_else(architecture, tmp_path):
    out = koff.save(small(architecture), tmp_path / "out")
    before, ids = digests(out), tokens()
    with torch.no_grad():
        wanted = [koff.load(out)(ids, memory=m).logits for m in (*NAMES, None)]
    assert koff.add_memory(out, "de", documents(), args=arguments(tmp_path / "run")) == out
    after = digests(out)
    assert {name: after[name] for name in before} == before
    new = {name for name in after if name not in before}
    assert new and all(name.startswith("memories/de/") for name in new)
    model = koff.load(out)
    assert model.koff.memory_names == (*NAMES, "de")
    with torch.no_grad():
        for memory, want in zip((*NAMES, None), wanted, strict=True):
            assert torch.equal(model(ids, memory=memory).logits, want)
        assert (model(ids, memory="de").logits - model(ids).logits).abs().max() > 1e-3
    assert "| memories | en, keys, es, de |" in (out / "README.md").read_text()
    assert not list(out.glob(".*"))


def test_add_memory_trains_the_new_memory_alone(tmp_path):
    model, seen = small(), []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    others = [p for name in NAMES for p in model.koff.memories[name].parameters()]
    addresses = [p.data_ptr() for p in others]

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            named = dict(model.named_parameters())
            seen.append({n for n, p in named.items() if p.grad is not None})
            assert all(p.grad is None for p in others)

    koff.add_memory(
        model,
        "de",
        documents(),
        lora=koff.LoRAConfig(r=2, alpha=2, target_modules=("down_proj",)),
        kv=koff.KVConfig(num_tokens=3, init="tokens"),
        args=arguments(tmp_path, weight_decay=0.1),
        callbacks=[Look()],
        general_datasets={"math": documents(seed=9)},
    )
    assert len(seen) == 3 and all(seen[0] == names for names in seen)
    assert all(name.startswith("koff.memories.memory_de.") for name in seen[0])
    assert len(seen[0]) == 3 * 2 + 3 * 2
    state = model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in before.items())
    assert [p.data_ptr() for p in others] == addresses and not model.training
    assert model.koff.memory_names == (*NAMES, "de")
    memory = model.koff.memories["de"]
    assert memory.length == 3 and set(memory.lora) == {f"{i}_down_proj" for i in range(3)}
    assert all(bool(weights.b.any()) for weights in memory.lora.values())


def test_what_is_trained_depends_on_the_seed_alone(saved, tmp_path):
    models = []
    for index, seed in enumerate((0, 0, 1)):
        model = koff.load(saved)
        place = tmp_path / f"run{index}"
        koff.add_memory(model, "de", documents(), args=arguments(place, seed=seed))
        models.append(model.koff.memories["de"].state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert any(not torch.equal(models[0][name], models[2][name]) for name in models[0])


def test_gates_only_backbones_take_memories_too(tmp_path):
    out = koff.save(small(memories=(), lora=None, kv=None), tmp_path / "out")
    with pytest.raises(ValueError, match="must have a LoRA or a KV part, got neither; give lora"):
        koff.add_memory(out, "de", documents(), args=arguments(tmp_path / "run"))
    parts = dict(
        lora=koff.LoRAConfig(r=2, target_modules="all-linear"), kv=koff.KVConfig(num_tokens=4)
    )
    koff.add_memory(out, "de", documents(), args=arguments(tmp_path / "run"), **parts)
    model = koff.load(out)
    assert model.koff.memory_names == ("de",) and model.koff.memories["de"].length == 4
    assert model(tokens(), memory="de").logits.isfinite().all()
    koff.remove_memory(out, "de")
    assert koff.load(out).koff.memory_names == ()


def test_texts_without_a_tokenizer_are_refused_by_the_name_of_its_argument(saved, tmp_path):
    with pytest.raises(TypeError, match=r"de must hold .*; pass a tokenizer \(KoffTrainer's pro"):
        koff.add_memory(koff.load(saved), "de", ["Ein Text."], args=arguments(tmp_path / "run"))


def test_refused_additions_leave_model_and_folder_as_they_were(saved, tmp_path):
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    args, model = arguments(tmp_path / "run"), koff.load(saved)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for target in (saved, model):
        add = functools.partial(koff.add_memory, target, args=args)
        for call, message in (
            (lambda add=add: add("en", documents()), "the name must differ from those there are"),
            (lambda add=add: add("../x", documents()), "a memory name must be 1 to 64 letters"),
            (lambda add=add: add("de", []), "de must not be empty"),
            (lambda add=add: add("de", documents(1)[:1], kv=koff.KVConfig(300)), "position"),
            (lambda add=add: add("de", documents(), lora=None, kv=None), "a LoRA or a KV part"),
        ):
            with pytest.raises((ValueError, KeyError), match=message):
                call()
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before
    assert model.koff.memory_names == NAMES
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    opened = attached("llama")
    with pytest.raises(ValueError, match="the mask must be fixed, got open gates"):
        koff.add_memory(opened, "de", documents(), args=args)
    assert opened.koff.memory_names == NAMES


def test_a_memory_that_is_not_finite_is_not_written(saved):
    model, before = koff.load(saved), digests(saved)
    koff.import_memory(model, "de", lora=saved / "memories/en/lora")
    with torch.no_grad():
        model.koff.memories["de"].lora["0_q_proj"].b[0, 0] = torch.nan
    with pytest.raises(ValueError, match="memory 'de' must be finite, got NaN or infinity"):
        put_memory(saved, model, "de")
    assert digests(saved) == before and koff.load(saved).koff.memory_names == NAMES


def test_remove_memory(saved):
    before, model = digests(saved), koff.load(saved)
    with torch.no_grad():
        wanted = {m: model(tokens(), memory=m).logits for m in ("en", "es", None)}
    with pytest.raises(KeyError, match="must be one of .*'es'.*got 'de'"):
        koff.remove_memory(saved, "de")
    assert digests(saved) == before and (saved / "memories/keys").is_dir()
    koff.remove_memory(saved, "keys")
    gone = {name for name in before if name.startswith("memories/keys/")}
    assert digests(saved) == {n: d for n, d in before.items() if n not in gone}
    koff.remove_memory(model, "keys")
    assert koff.load(saved).koff.memory_names == model.koff.memory_names == ("en", "es")
    with torch.no_grad():
        for memory, want in wanted.items():
            assert torch.equal(koff.load(saved)(tokens(), memory=memory).logits, want)
            assert torch.equal(model(tokens(), memory=memory).logits, want)
    with pytest.raises(FileNotFoundError, match="must be a saved model, got a folder without"):
        koff.remove_memory(saved.parent, "en")


@pytest.mark.slow
@pytest.mark.parametrize("lose", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_folder_loads_wherever_a_change_was_cut_short(
    change, lose, saved, in_memory, no_real_fsync, record_property
):
    model, before = koff.load(saved), digests(saved)
    koff.import_memory(model, "de", lora=saved / "memories/en/lora", kv=saved / "memories/en/kv")
    act = {
        "add": lambda at: put_memory(at, model, "de"),
        "remove": lambda at: drop_memory(at, "es"),
    }[change]
    outcome = {"add": (*NAMES, "de"), "remove": ("en", "keys")}[change]
    kept = {name: d for name, d in before.items() if not name.startswith("memories/es/")}
    seen, number, place = set(), 0, in_memory / "out"
    while True:
        shutil.copytree(saved, place)
        number += 1
        if run_child(functools.partial(act, place), place, number, lose):
            break
        names = koff.load(place).koff.memory_names  # whole, either before or after
        seen.add(names)
        now = digests(place)
        assert {name: now[name] for name in kept} == kept
        if names == NAMES:  # again, over what was left: it ends as if nothing had happened
            act(place)
            assert koff.load(place).koff.memory_names == outcome and not list(place.glob(".*"))
        shutil.rmtree(place)
    assert number > 20 and seen == {NAMES, outcome}
    report(record_property, number - 1, len(seen))
