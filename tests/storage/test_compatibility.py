"""What koff 0.1.0 wrote (tests/data/saved-0.1) loads bit for bit, and its checkpoint resumes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import koff
from koff.storage.saved_folder import open_saved

SAVED = Path(__file__).parents[1] / "data" / "saved-0.1"
IDS = torch.arange(3, 33).view(3, 10)
MEMORIES = {"none": None, "en": "en", "fr": "fr", "mixed": ["fr", None, "en"]}
U = 2**-24  # unit roundoff of fp32


def test_a_saved_model_loads_with_every_bit():
    expected = load_file(SAVED / "expected.safetensors")
    model = koff.load(SAVED / "model")
    state = {f"state.{name}": t for name, t in model.state_dict().items()}
    state = {name: t for name, t in state.items() if not name.endswith("_extra_state")}  # newer
    assert state.keys() == {name for name in expected if name.startswith("state.")}
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert koff.load(SAVED / "model", verify=False).koff.memory_names == ("en", "fr")
    for name, memory in MEMORIES.items():
        want = expected[f"logits.{name}"]
        with torch.no_grad():
            got = model(IDS, memory=memory).logits
        # The tensors are the same; only the order of sums is another CPU's own. Some twenty sums
        # of at most 24 terms lie on the way to a logit: 20 sqrt(24) u / 2 = 49 u of the largest,
        # and as much again for what cancels.
        assert (got - want).abs().max() <= 100 * U * want.abs().max(), name


def test_its_tokenizer_and_its_facts_are_read():
    folder = open_saved(SAVED / "model")
    assert folder.load_tokenizer()("abc é").input_ids == [3, 4, 5, 11, 12]
    assert folder.manifest.base == "someone/tiny" and folder.manifest.metadata["note"] == 1


def test_a_memory_may_be_added_to_it(tmp_path):
    out = shutil.copytree(SAVED / "model", tmp_path / "out")
    koff.import_memory(out, "de", lora=out / "memories/en/lora", kv=out / "memories/fr/kv")
    assert koff.load(out).koff.memory_names == ("en", "fr", "de")


def documents(factor):
    return [{"input_ids": [(factor * i * i + k) % 45 + 3 for i in range(30)]} for k in range(8)]


@pytest.mark.usefixtures("no_real_fsync")
def test_a_checkpoint_resumes_to_the_same_end(tmp_path):
    shutil.copytree(SAVED / "checkpoint-2", tmp_path / "checkpoint-2")
    config = koff.KoffConfig(
        ("en", "fr"),
        target_sparsity=0.3,
        lora=koff.LoRAConfig(r=2, target_modules=("q_proj", "down_proj")),
        kv=koff.KVConfig(num_tokens=2, init="text"),
    )
    arguments = koff.KoffTrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_steps=2,
        fix_mask_at=0.75,
        block_size=8,
        per_device_train_batch_size=2,
        general_every=0,
        saliency_batches=0,  # that koff knew neither of these two
        no_memory_rows=0.0,
        adam_epsilon=0.1,
        lora_learning_rate=1e-2,
        width_multiple_of=1,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    model = koff.attach(AutoModelForCausalLM.from_pretrained(SAVED / "base"), config)
    data = {"en": documents(3), "fr": documents(5)}
    run = koff.KoffTrainer(model, arguments, train_datasets=data)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4 and run.model.koff.gates.fixed
    trained = load_file(SAVED / "trained.safetensors")
    before = load_file(SAVED / "checkpoint-2" / "koff_state.safetensors")
    got = run.model.koff.tensors()
    assert got.keys() == trained.keys()
    moved = set()
    for name, want in trained.items():
        if not want.is_floating_point():
            assert torch.equal(got[name], want), name
            continue
        # Another CPU sums in another order. A gradient is clipped to a norm of 1, so its elements
        # are off by at most 64 u (backward in fp32, tests/support/tolerances.py). Adam's step
        # lr g / (|g| + epsilon) makes lr 64 u / epsilon of that at most, twice in two steps, and
        # twice again as the second starts from the weights of the first. Weights are rounded too.
        rate = 0.1 if "log_alpha" in name else 1e-2
        error = 4 * rate * 64 * U / arguments.adam_epsilon + 2 * U * want.abs()
        assert ((got[name] - want).abs() <= error).all(), name
        if ((before[name] - want).abs() > 100 * error).any():
            moved |= {part for part in ("gates.log_alpha", ".lora.", ".kv.") if part in name}
    assert len(moved) == 3  # what the two steps did is far beyond what is tolerated
