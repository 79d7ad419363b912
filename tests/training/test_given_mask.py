"""Masks that are fixed before the first step: by what, what then trains, and how a run resumes."""

import itertools
import math

import pytest
import torch
from support.models import attached
from support.trainings import arguments, fresh, learned, trainer

import koff
from koff.model import arch
from koff.pruning.scores import neuron_magnitude, random_scores
from koff.training.saliency import neuron_saliency
from koff.training.schedule import collate


def test_magnitude_is_the_norm_of_all_weights_of_a_neuron():
    model = attached("llama")
    mlp = arch.mlps(model)[1]
    for neuron in (0, 7, 95):
        weights = [*mlp.gate_proj.weight[neuron], *mlp.up_proj.weight[neuron]]
        weights += mlp.down_proj.weight[:, neuron]
        want = math.sqrt(sum(float(w) ** 2 for w in weights))
        assert float(neuron_magnitude(model)[1][neuron]) == pytest.approx(want, rel=1e-5)


def scores_of(run, mask):
    """The scores of a mask, computed before the run."""
    if mask == "magnitude":
        return neuron_magnitude(run.model)
    if mask == "random":
        return random_scores(run.koff.dense_widths, seed=run.koff.config.seed)
    picks = itertools.islice(run._sampler(), run.settings.saliency_batches)
    batches = (collate([run.train_dataset[index] for index in pick]) for pick in picks)
    return neuron_saliency(run.model, batches)


@pytest.mark.parametrize("mask", ["random", "magnitude", "saliency"])
def test_a_given_mask_keeps_the_highest_scores_and_trains_the_memories_alone(tmp_path, mask):
    # Text is filled into the caches first, as in any run: "normal" leaves the scores comparable.
    model = fresh(kv=koff.KVConfig(5, "normal"), target_sparsity=0.3)
    run = trainer(tmp_path, model=model, mask=mask, max_steps=2, no_memory_rows=1.0)
    # Rows go without their memory only while a mask is learned.
    assert all(memory >= 0 for batch in run._sampler() for _, _, memory in batch)
    scores = torch.cat(scores_of(run, mask))
    before = learned(model)
    run.train()
    kept = torch.cat(run.koff.gates.masks)
    keep = round(0.7 * len(kept))
    assert int(kept.sum()) == keep
    assert torch.equal(kept, torch.zeros_like(kept).index_fill(0, scores.topk(keep).indices, True))
    after = learned(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(".lora." in name for name in changed) and any(".kv." in name for name in changed)
    assert not any("log_alpha" in name or "multiplier" in name for name in changed)


def test_random_masks_differ_by_seed_alone():
    one, again, other = (torch.cat(random_scores([5, 7], seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and len(one.unique()) == 12


def test_a_run_on_a_given_mask_resumes_as_if_it_had_not_stopped(tmp_path):
    settings = dict(mask="saliency", max_steps=4, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path / "a", **settings)
    whole.train()
    again = trainer(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ends = learned(whole.model), learned(again.model)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_given_mask_without_memories_is_all_there_is_to_do(tmp_path):
    run = trainer(tmp_path, model=fresh(memories=()), mask="magnitude", max_steps=50)
    run.train()
    assert run.state.global_step == 1 and run.koff.gates.fixed


def test_masks_that_cannot_be_given_are_refused(tmp_path):
    for changes, message in (
        (dict(mask="best"), "mask must be one of learned, random, magnitude, saliency, got 'best'"),
        (dict(mask="saliency", saliency_batches=0), "saliency_batches must be at least 1 for mask"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match="must be finite, got NaN or inf; look at their source"):
        koff.binarize(fresh(), scores=[torch.full((96,), math.nan)] * 3)
    with pytest.raises(ValueError, match=r"one number for each of \[96, 96, 96\] neurons, got sha"):
        koff.binarize(fresh(), scores=[torch.zeros(96)] * 2)
    assert arguments(tmp_path).mask == "learned"
