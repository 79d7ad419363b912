"""Training on the tokens that count: the loss is transformers' own; the others teach nothing."""

import pytest
import torch
import torch.nn.functional as F
from support.models import NAMES
from support.trainings import ANSWERS, BLOCK, DOMAINS, arguments, fresh, learned

import koff


def trainer(folder, domains=ANSWERS, model=None, **changes):
    settings = dict(max_steps=1, general_every=0, distillation_weight=0.0)
    model = fresh(target_sparsity=0.0, kv=koff.KVConfig(5, "normal")) if model is None else model
    return koff.KoffTrainer(model, arguments(folder, **{**settings, **changes}), domains)


def gradients(run):
    """The gradient of the run's first step, by parameter."""
    found = {}

    class Watch(koff.training.trainer.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update((n, p.grad.clone()) for n, p in model.koff.named_parameters())

    run.add_callback(Watch)
    run.train()
    return found


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_is_the_mean_over_the_tokens_that_count(tmp_path, weight):
    run = trainer(tmp_path, distillation_weight=weight, per_device_train_batch_size=6)
    batch = next(iter(run.get_train_dataloader()))
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        logits, teacher = (run.model(ids, memory=m).logits for m in (batch["memory"], None))
        loss = run.compute_loss(run.model.train(), batch)
    wanted = (1 - weight) * run.model.loss_function(logits, labels, vocab_size=logits.shape[-1])
    counts = labels[:, 1:] != -100
    log_q, log_p = (x[:, :-1][counts].log_softmax(-1) for x in (logits, teacher))
    wanted += weight * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert len(set(counts.sum(1).tolist())) > 1, "rows count differently"


@pytest.mark.parametrize("head", ["as it is", "with a hook"])
def test_logits_are_made_where_somebody_asks_for_them(tmp_path, head):
    """``return_outputs`` gives the model's own, also to a loss of somebody's own."""
    run = trainer(tmp_path, distillation_weight=0.5)
    batch = next(iter(run.get_train_dataloader()))
    linear = run.model.get_output_embeddings()
    if head == "with a hook":
        linear.register_forward_hook(lambda module, inputs, output: output * 2)
    run.model.train()
    torch.manual_seed(0)
    loss, outputs = run.compute_loss(run.model, batch, return_outputs=True)
    torch.manual_seed(0)
    wanted = run.model(batch["input_ids"], memory=batch["memory"]).logits
    assert torch.allclose(outputs["logits"], wanted, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    assert torch.allclose(run.compute_loss(run.model, batch), loss)
    parameters = [p for p in run.model.koff.parameters() if p.requires_grad]
    (outputs["logits"].mean() + loss).backward()
    assert any(p.grad is not None and p.grad.any() for p in parameters)


def test_a_step_makes_no_tensor_of_all_logits(tmp_path, monkeypatch):
    run = trainer(tmp_path, distillation_weight=0.5, per_device_train_batch_size=6)
    linear, forward, called = run.model.get_output_embeddings(), torch.nn.Linear.forward, []
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: called.append(self) or forward(self, x)
    )
    run.train()
    assert called and not any(module is linear for module in called)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """The mean is over the tokens of the whole step, and not of the micro-batches' means."""
    found, logs = [], []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        run = trainer(tmp_path, distillation_weight=0.5, logging_steps=1, **settings)
        found.append(gradients(run))
        logs.append(run.state.log_history[0])
    for other, log in zip(found[1:], logs[1:], strict=True):
        for name, value in found[0].items():
            # fp32 sums in another order, through three layers.
            assert torch.allclose(other[name], value, rtol=1e-4, atol=1e-6), name
        for name in ("loss", *(f"loss_{n}" for n in NAMES)):
            assert log[name] == pytest.approx(logs[0][name], rel=1e-3), name


def test_a_row_whose_labels_are_its_text_is_a_text(tmp_path):
    """But for the first token of a document, which no text of its own stands before."""
    texts = {
        n: [{"input_ids": d["input_ids"][:BLOCK]} for d in docs] for n, docs in DOMAINS.items()
    }
    labelled = {n: [r | {"labels": r["input_ids"]} for r in rows] for n, rows in texts.items()}
    results = []
    for domains in (texts, labelled):
        run = trainer(tmp_path, domains, max_steps=3)
        run.train()
        results.append(learned(run.model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_what_does_not_count_teaches_nothing(tmp_path):
    """Behind the last token that counts any text will do."""

    def ends_in(token):
        """Records of which the last four tokens do not count."""
        ends = {"input_ids": [token] * 4, "labels": [-100] * 4}
        return {
            name: [{part: r[part][:12] + ends[part] for part in r} for r in rows]
            for name, rows in ANSWERS.items()
        }

    results = []
    for token in (3, 50):
        run = trainer(tmp_path, ends_in(token), max_steps=2, distillation_weight=0.5)
        run.train()
        results.append(learned(run.model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_cache_is_filled_from_the_documents_and_not_from_what_fills_blocks(tmp_path):
    short = {n: [{"input_ids": [9, 8, 7], "labels": [9, 8, 7]}] * 9 for n in NAMES}
    runs = []
    for size in (3, 4):  # of three tokens each, the last of every block of four is no text
        model = fresh(target_sparsity=0.0, kv=koff.KVConfig(9, "text"), lora=None)
        run = trainer(tmp_path, short, model, block_size=size, kv_learning_rate=0.0)
        run.train()
        runs.append(learned(run.model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor must not be used, got True"),
        (
            dict(train_sampling_strategy="group_by_length"),
            "train_sampling_strategy must not be used",
        ),
        (
            dict(per_device_train_batch_size=0),
            "per_device_train_batch_size must be at least 1, got 0",
        ),
        (
            dict(per_device_eval_batch_size=0),
            "per_device_eval_batch_size must be at least 1, got 0",
        ),
        (
            dict(gradient_accumulation_steps=0),
            "gradient_accumulation_steps must be at least 1, got 0",
        ),
        (dict(max_steps=-1, num_train_epochs=0), "max_steps or num_train_epochs must be positive"),
    ],
)
def test_settings_that_would_be_ignored_or_do_nothing_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^KoffTrainer: {message}"):
        trainer(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_labels_of_minus_100_alone_are_refused(tmp_path):
    domains = {**ANSWERS, "en": [{"input_ids": [5] * 40, "labels": [-100] * 40}]}
    with pytest.raises(ValueError, match="en must not be empty, got 1 without a token that counts"):
        trainer(tmp_path / "out", domains)
