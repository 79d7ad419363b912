"""Gates that start by what neurons matter: the measure, the start, and what a run does with it."""

import pytest
import torch
from support.models import attached, tokens
from support.trainings import fresh, trainer

import koff
from koff.model.gates import LOG_ALPHA_LIMIT
from koff.training.saliency import neuron_saliency


def test_saliency_is_the_mean_square_of_the_gates_gradient():
    """Against finite differences of the loss in single gates."""
    model = attached("llama").double()
    batches = [
        {"input_ids": tokens(seed=seed), "labels": tokens(seed=seed), "memory": memory}
        for seed, memory in ((1, ["en", None, "es"]), (2, ["keys", "en", None]))
    ]
    batches[1]["labels"][1, :4] = -100  # a prompt: given, and not to be learned
    before = [p.clone() for p in model.koff.gates.log_alpha]
    found = neuron_saliency(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, model.koff.gates.log_alpha, strict=True))
    assert all(p.grad is None for p in model.parameters())

    def loss(batch, layer, neuron, shift):
        with model.koff.gates.held_open() as values, torch.no_grad():
            values[layer][neuron] += shift
            logits = model(batch["input_ids"], memory=batch["memory"]).logits[:, :-1]
            labels = batch["labels"][:, 1:].flatten()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)

    for layer, neuron in ((0, 3), (1, 50), (2, 95)):
        slopes = [
            (loss(b, layer, neuron, 1e-3) - loss(b, layer, neuron, -1e-3)) / 2e-3 for b in batches
        ]
        # The losses are means of fp32 values, 6e-8 of 5 nats: 3e-4 of a slope over 2e-3, and the
        # slopes are around 1e-2.
        want = sum(float(s) ** 2 for s in slopes) / 2
        assert float(found[layer][neuron]) == pytest.approx(want, rel=0.2, abs=1e-6)


@pytest.mark.parametrize("target", [0.05, 0.2, 0.6])
def test_gates_start_at_the_target_in_the_order_of_saliency(target):
    gates = attached("llama", target_sparsity=target).koff.gates
    generator = torch.Generator().manual_seed(0)
    saliency = [torch.rand(len(p), generator=generator) ** 4 for p in gates.log_alpha]
    gates.start_(saliency)
    assert float(gates.expected_sparsity().detach()) == pytest.approx(target, abs=1e-4)
    start, flat = torch.cat(list(gates.log_alpha)).detach(), torch.cat(saliency)
    assert start.abs().max() <= LOG_ALPHA_LIMIT + 1e-6
    assert (start[flat.argsort()].diff() >= 0).all()


def test_a_run_starts_its_gates_by_saliency_or_all_alike(tmp_path):
    run = trainer(tmp_path, max_steps=1, fix_mask_at=None, gate_learning_rate=0.0)
    run.train()
    gates = run.model.koff.gates
    assert float(gates.expected_sparsity().detach()) == pytest.approx(0.2, abs=1e-4)
    assert run.target_now() == pytest.approx(0.2)
    run = trainer(tmp_path, max_steps=1, fix_mask_at=None, saliency_batches=0)
    assert run.target_now() < 0.2 or run.args.max_steps == 1
    alike = torch.cat(list(fresh().koff.gates.log_alpha)).detach()
    assert alike.std() < 0.02 and torch.cat(list(gates.log_alpha)).detach().std() > 0.5


def test_gates_that_were_fixed_by_hand_are_left_as_they_are(tmp_path):
    model = fresh()
    koff.binarize(model, multiple_of=1)
    masks = [mask.clone() for mask in model.koff.gates.masks]
    run = trainer(tmp_path, model=model, max_steps=2, distillation_weight=0.0)
    assert all(m >= 0 for batch in run._sampler() for _, _, m in batch)  # all have a memory
    run.train()
    assert all(torch.equal(a, b) for a, b in zip(masks, model.koff.gates.masks, strict=True))
