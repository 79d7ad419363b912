"""KoffTrainer: what is learned, what is logged, resuming, and what is refused."""

import json
import logging
import math
import re

import pytest
import torch
from support import activation_checkpointing
from support.models import NAMES, attached
from support.trainings import DOMAINS, arguments, documents, fresh, learned, trainer
from transformers import TrainerCallback

import koff
from koff.data.losses import token_losses
from koff.model.neuron_order import restore_order
from koff.training.settings import Settings


def test_training_learns_and_logs(tmp_path):
    run = trainer(tmp_path, max_steps=60, fix_mask_at=0.8, no_memory_rows=0.0)
    base = {n: p.clone() for n, p in run.model.named_parameters() if not n.startswith("koff.")}
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert logs[-1]["loss_en"] < logs[0]["loss_en"] - 0.3
    names = {"loss_en", "loss_keys", "loss_es", "loss_general/math", "loss_general/en"}
    names |= {"sparsity_mlp", "sparsity_model", "sparsity_non_embedding", "undecided"}
    assert names <= set().union(*logs)
    assert all(0 <= e["undecided"] <= 1 for e in logs)
    for entry in logs:
        parts = [entry[f"grad_norm_{part}"] for part in ("lora", "kv", "gates")]
        assert math.hypot(*parts) == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert min(parts[:2]) > 0 and (parts[2] > 0) == (entry["step"] <= 48)
    assert logs[0]["sparsity_target"] == pytest.approx(0.2) and "multiplier" in logs[0]
    fixed = [e for e in run.state.log_history if "loss_hard_gates" in e]
    assert len(fixed) == 1 and fixed[0]["step"] == 48 and "loss_soft_gates" in fixed[0]
    assert logs[-1]["sparsity_mlp"] == pytest.approx(round(0.2 * 288) / 288)
    assert all(memory.kv_filled for memory in run.model.koff.memories)
    restore_order(run.model)  # the fixed mask moved the kept neurons to the front
    assert all(torch.equal(p, base[n]) for n, p in run.model.named_parameters() if n in base)


def test_constraint_reaches_the_target(tmp_path):
    settings = dict(max_steps=150, fix_mask_at=None, logging_steps=50, general_every=0)
    run = trainer(tmp_path, model=fresh(initializer_range=0.02), **settings)
    run.train()
    report = koff.sparsity(run.model)
    assert not report.hard and report.mlp == pytest.approx(0.2, abs=0.05)
    limit = math.log(100) + 1e-6
    assert all(p.abs().max() <= limit for p in run.model.koff.gates.log_alpha)


def test_noise_on_embeddings_is_for_the_student_alone(tmp_path):
    run, seen = trainer(tmp_path, max_steps=1, neftune_noise_alpha=5.0), []
    real = run._teacher

    def twice(model, ids):
        seen.append([real(model, ids), real(model, ids), model(ids, memory="en").logits])
        seen[-1].append(model(ids, memory="en").logits)
        return seen[-1][0]

    run._teacher = twice
    run.train()
    first, second, student, again = seen[0]
    assert torch.equal(first, second) and not torch.equal(student, again)


def test_two_runs_are_bit_equal_and_another_seed_is_not(tmp_path):
    results = []
    for seed in (3, 3, 4):
        run = trainer(tmp_path, max_steps=4, seed=seed)
        run.train()
        results.append(learned(run.model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    assert not all(torch.equal(results[0][n], results[2][n]) for n in results[0])


@pytest.mark.parametrize("batching", ["mixed", "single"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bit_identical(tmp_path, batching, accumulation):
    def run(folder, **changes):
        settings = dict(gradient_accumulation_steps=accumulation, batching=batching, max_steps=8)
        settings |= dict(save_strategy="steps", save_steps=3, fix_mask_at=0.6)
        return trainer(folder, **{**settings, **changes})

    whole = run(tmp_path / "a")
    whole.train()
    for step in (3, 6):  # before and after the mask is fixed (step 5)
        model = fresh(seed=9)  # other initial values: the checkpoint must bring all of them
        model.koff.config = whole.model.koff.config
        again = run(tmp_path / f"b{step}", model=model)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        mine, theirs = learned(again.model), learned(whole.model)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), step
        assert again.model.koff.gates.fixed
        last = [e for e in whole.state.log_history if "loss" in e][-1]
        mine = [e for e in again.state.log_history if "loss" in e][-1]
        assert mine["loss"] == last["loss"]


def test_checkpoints_hold_no_base_weights_and_no_pickled_arguments(tmp_path):
    from safetensors.torch import load_file

    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-2"
    names = set(load_file(folder / "koff_state.safetensors"))
    assert names == set(run.model.koff.tensors())
    files = {p.name for p in folder.iterdir()}
    assert not files & {"model.safetensors", "training_args.bin", "pytorch_model.bin"}
    torch.load(folder / "optimizer.pt", weights_only=True)
    assert json.loads((folder / "koff_state.json").read_text())["mask_fixed"] is True


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    other = trainer(tmp_path / "b", model=fresh(lora=koff.LoRAConfig(r=8)), max_steps=4)
    with pytest.raises(ValueError, match="checkpoint's config must be"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "koff_state.safetensors").unlink()
    again = trainer(tmp_path / "c", max_steps=4)
    with pytest.raises(FileNotFoundError, match="must hold koff_state.safetensors"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class _MultiplierGradient(TrainerCallback):
    """Remembers the multiplier's gradient of every step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(float(model.koff.gates.multiplier.grad))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulation_does_not_multiply_the_constraint(tmp_path, accumulation):
    watch, model = _MultiplierGradient(), fresh()
    run = koff.KoffTrainer(
        model,
        arguments(
            tmp_path, max_steps=1, gradient_accumulation_steps=accumulation, saliency_batches=0
        ),
        train_datasets=DOMAINS,
        callbacks=[watch],
    )
    gap = float(model.koff.gates.expected_sparsity().detach()) - run.target_now()
    run.train()
    assert watch.seen == [pytest.approx(gap, rel=1e-5)]  # d/d lambda1 of lambda1 (s - t) + ...
    assert float(model.koff.gates.multiplier.detach()) * gap > 0  # ascended


def test_gates_only_and_memories_only(tmp_path):
    run = trainer(tmp_path, model=fresh(memories=(), lora=None, kv=None))
    run.train()
    assert koff.sparsity(run.model).hard and not run.model.koff.memory_names
    run = trainer(tmp_path, model=fresh(target_sparsity=0.0))
    run.train()
    assert run.model.koff.gates is None
    memories = fresh(target_sparsity=0.0).koff.memories
    assert not torch.equal(
        run.model.koff.memories["en"].lora["0_q_proj"].b, memories["en"].lora["0_q_proj"].b
    )


def test_memories_are_tuned_after_the_mask_is_fixed(tmp_path):
    run = trainer(tmp_path, max_steps=4, fix_mask_at=0.5)
    run.train()
    before = learned(run.model)
    again = koff.KoffTrainer(run.model, arguments(tmp_path, max_steps=3), train_datasets=DOMAINS)
    again.train()
    after = learned(run.model)
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("gates."))
    assert not torch.equal(
        after["memories.memory_en.lora.0_q_proj.b"], before["memories.memory_en.lora.0_q_proj.b"]
    )


def test_compacted_models_train_on(tmp_path):
    model = koff.compact(attached("llama"), inplace=True)
    run = trainer(tmp_path, model=model, max_steps=3)
    run.train()
    assert run.model.koff.gates is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_trains_the_same(tmp_path, reentrant):
    results = []
    for checkpointing in (False, True):
        settings = activation_checkpointing.arguments(use_reentrant=reentrant)
        run = trainer(tmp_path, max_steps=4, **(settings if checkpointing else {}))
        run.train()
        results.append(learned(run.model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_distillation_pulls_towards_the_frozen_model(tmp_path):
    gaps = []
    for weight in (0.0, 1.0):
        model = fresh(target_sparsity=0.0)
        ids = torch.tensor([d["input_ids"][:16] for d in DOMAINS["en"]])
        teacher = model.eval()(ids).logits.detach()
        run = trainer(tmp_path, model=model, max_steps=80, distillation_weight=weight)
        run.train()
        with torch.no_grad():
            student = run.model.eval()(ids, memory="en").logits
        gaps.append(float(token_losses(student, None, ids, teacher, 1.0)[0]))
    assert gaps[1] < 0.75 * gaps[0]  # 3.86 and 2.41 when this was written
    message = "distillation_weight must be None or lie in 0..1, got 1.5"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, distillation_weight=1.5)


def test_distillation_is_the_default_while_the_unpruned_model_is_there(tmp_path):
    model = fresh(target_sparsity=0.4, kv=koff.KVConfig(5, "normal"))
    default, without = (trainer(tmp_path, model, **w) for w in ({}, {"distillation_weight": 0.0}))
    batch = next(iter(default.get_train_dataloader()))
    default._fill_caches()  # as training begins
    losses = []
    for run in (default, without):
        torch.manual_seed(0)  # of the gates
        losses.append(run.compute_loss(model.train(), batch).item())
    assert losses[0] != losses[1]
    koff.binarize(model, multiple_of=8)
    assert trainer(tmp_path, model).distillation_weight == 0.7
    koff.compact(model, inplace=True)
    assert trainer(tmp_path, model).distillation_weight == 0.0
    with pytest.raises(ValueError, match="be None or 0 for a compacted model"):
        trainer(tmp_path, model, distillation_weight=0.7)


def test_bf16_training_keeps_what_is_learned_in_fp32(tmp_path):
    run = trainer(tmp_path, bf16=True, max_steps=4)
    run.train()
    assert {p.dtype for p in run.model.koff.parameters()} == {torch.float32}
    run = trainer(tmp_path, model=fresh().to(torch.bfloat16), max_steps=4)
    run.train()
    assert {p.dtype for p in run.model.koff.parameters()} == {torch.float32}
    assert all(bool(p.isfinite().all()) for p in run.model.koff.parameters())


def test_evaluation_during_training(tmp_path):
    run = koff.KoffTrainer(
        fresh(),
        arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
        train_datasets=DOMAINS,
        eval_datasets={"en": DOMAINS["en"][:4], "es": DOMAINS["es"][:4]},
    )
    run.train()
    rows = [e for e in run.state.log_history if "eval_loss" in e]
    assert len(rows) == 2 and rows[0]["eval_en_perplexity"] > 1


def test_plain_training_arguments_get_the_defaults(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    docs = {name: documents(i, 40) for i, name in enumerate(NAMES)}
    run = koff.KoffTrainer(fresh(kv=koff.KVConfig(5, "normal")), args, train_datasets=docs)
    assert run.settings == Settings()
    args.learning_rate = 1e-3
    with pytest.raises(ValueError, match="learning_rate must not be set"):
        koff.KoffTrainer(fresh(), args, train_datasets=docs)


def test_few_gate_steps_and_a_costly_rounding_warn(tmp_path, caplog):
    model = fresh()
    with torch.no_grad():
        for p in model.koff.gates.log_alpha:
            p.fill_(-1.6)  # P(z > 0) = 1/2
    with caplog.at_level(logging.WARNING, logger="koff"):
        settings = dict(max_steps=2, gate_learning_rate=0.0, saliency_batches=0)
        run = trainer(tmp_path, model=model, **settings)
        run.train()
    assert "steps are few for gates that start all alike" in caplog.text
    (fixed,) = [e for e in run.state.log_history if "loss_hard_gates" in e]
    assert fixed["loss_hard_gates"] - fixed["loss_soft_gates"] > 0.05
    assert re.search("rounding the gates .* raised the loss .*100 % of them were", caplog.text)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.koff.memories["en"].lora["0_q_proj"].b.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss at step 0 must be finite, got nan"):
        run.train()


REFUSALS = {
    "missing domain": (dict(domains={"en": DOMAINS["en"]}), KeyError, "none for .'es', 'keys'."),
    "unknown domain": (dict(domains={**DOMAINS, "de": []}), KeyError, "must name only memories"),
    "empty": (dict(domains={**DOMAINS, "en": []}), ValueError, "en must not be empty"),
    "short": (
        dict(domains={**DOMAINS, "en": [{"input_ids": [3, 4]}]}),
        ValueError,
        "en must hold at least one block of 16 tokens, got 2",
    ),
    "no domain": (dict(domains={}), ValueError, "must name a domain"),
    "too long": (
        dict(block_size=1020),
        ValueError,
        r"must fit the model's 1024 positions, got 5 \+ 1020",
    ),
    "liger": (dict(use_liger_kernel=True), ValueError, "use_liger_kernel must not be used"),
    "batching": (dict(batching="both"), ValueError, "must be 'mixed' or 'single', got 'both'"),
    "fix_mask_at": (dict(fix_mask_at=0.0), ValueError, r"must be None or lie in \(0, 1\]"),
    "rate": (
        dict(gate_learning_rate=-1.0),
        ValueError,
        "gate_learning_rate must be a finite number",
    ),
    "general_every": (dict(general_every=-1), ValueError, "general_every must be a whole number"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_misfits_are_refused_before_anything_is_written(case, tmp_path):
    changes, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        trainer(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_text_too_short_for_the_cache_is_refused(tmp_path):
    model = fresh(kv=koff.KVConfig(200, "text"))
    domains = {**DOMAINS, "es": documents(2, 2)}
    with pytest.raises(ValueError, match="'es' .KV init 'text'. must have at least 200 tokens"):
        trainer(tmp_path / "out", model=model, domains=domains)
