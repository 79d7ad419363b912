"""transformers' own Trainer, and subclasses as TRL has them, on an attached model."""

import pytest
import torch
from support import bare
from support.models import attached, tokens
from support.trainings import learned, tiny_run
from transformers import Trainer, TrainingArguments

import koff

ROWS = [{"input_ids": row, "labels": row} for row in tokens(16, 9).tolist()]


class SFTTrainer(Trainer):
    """A Trainer of somebody else's."""


def small(**config):
    sizes = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=8)
    config = {"target_sparsity": 0, "kv": koff.KVConfig(3, "normal"), **config}
    return attached("llama", changes=sizes, **config)


def plain(model, folder, kind=Trainer, **changes):
    values = dict(max_steps=3, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    values |= dict(learning_rate=0.05, per_device_train_batch_size=4)
    return kind(model, TrainingArguments(str(folder), **{**values, **changes}), train_dataset=ROWS)


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("config", [{}, dict(memories=(), target_sparsity=0.4)], ids=str)
def test_checkpoints_that_would_hold_no_memory_are_refused_before_the_first_step(
    kind, config, tmp_path
):
    model = small(**config)
    before = learned(model)
    run = plain(model, tmp_path, kind)
    message = "^Trainer: save_strategy must be 'no' .* got 'steps'; use koff.KoffTrainer, or save_"
    with pytest.raises(ValueError, match=message):
        run.train()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in learned(model).items())


def test_without_checkpoints_it_trains_what_koff_saves(tmp_path):
    model = small()
    before = learned(model)
    with koff.use_memory(model, "es"):
        plain(model, tmp_path / "run", save_strategy="no").train()
    after = learned(model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("memory_es" in name for name in changed)
    again = learned(koff.load(koff.save(model, tmp_path / "out")))
    assert all(torch.equal(value, again[name]) for name, value in after.items())


def test_evaluation_and_other_models_are_left_alone(tmp_path):
    run = plain(small(), tmp_path / "a", eval_strategy="no")
    assert run.evaluate(ROWS[:4])["eval_loss"] > 0
    bare_model = koff.detach(small())
    plain(bare_model, tmp_path / "b").train()
    assert (tmp_path / "b" / "checkpoint-3" / "model.safetensors").is_file()


def test_koffs_own_trainer_writes_checkpoints(tmp_path):
    tiny_run(tmp_path).train()
    assert (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "import koff; from transformers import Trainer",
        "from transformers import Trainer; import koff",
    ],
)
def test_every_trainer_knows_in_whatever_order_one_imports(order, tmp_path):
    code = f"{order}\nfrom transformers import trainer\n"
    code += "print([kind.__name__ for kind in trainer.DEFAULT_CALLBACKS])"
    out = bare.run(bare.sys.executable, code, cwd=tmp_path, PYTHONPATH=str(bare.ROOT))
    assert out.strip() == "['DefaultFlowCallback', 'PlainTrainerGuard']"
