"""Which neurons a mask removes, on numbers worked out by hand."""

import math

import pytest
import torch
from support.models import HYBRID, VOCAB, tiny, tokens

from koff.data.blocks import pack
from koff.evaluation.neurons import (
    active_shares,
    classify,
    neuron_report,
    prune_rate,
    wilson,
)
from koff.model import arch


def texts(names=("en", "fr"), blocks=3):
    """Packed token ids; the second text fills its blocks up."""
    found = {}
    for index, name in enumerate(names):
        ids = tokens(blocks, 12, seed=index).tolist()
        documents = [{"input_ids": row[: 12 - 5 * index], "labels": row[: 12 - 5 * index]}
                     for row in ids]  # fmt: skip
        found[name] = pack(documents, None, 12)
    return found


@pytest.mark.parametrize("architecture", ["llama", "phi3", HYBRID])
def test_shares_are_those_of_the_gates_by_hand(architecture):
    model = tiny(architecture).eval()
    data = texts()
    found = active_shares(model, data, batch_size=2)
    for index, packed in enumerate(data.values()):
        counts, total = [0] * len(found), 0
        for row, length in zip(packed.blocks, packed.lengths.tolist(), strict=True):
            inputs = []
            hooks = [
                mlp.register_forward_pre_hook(
                    lambda module, args, kept=inputs: kept.append(args[0])
                )
                for mlp in arch.mlps(model)
            ]
            with torch.no_grad():
                model(row[None, :length])  # alone, without what fills it up
            for hook in hooks:
                hook.remove()
            for layer, (mlp, x) in enumerate(zip(arch.mlps(model), inputs, strict=True)):
                gate, _, _ = arch.mlp_weights(mlp)
                active = torch.nn.functional.silu(x[0] @ gate.T) > 0
                counts[layer] = counts[layer] + active.sum(0)
            total += length
        for layer, count in enumerate(counts):
            torch.testing.assert_close(found[layer][index], count / total, check_dtype=False)
    assert not [m for m in model.modules() if m._forward_hooks], "no hook stays"


def test_classes_by_hand():
    """200 neurons, two languages: 400 shares, of which 20 are above the 95th percentile."""
    shares = torch.full((2, 200), 0.1, dtype=torch.float64)
    shares[:, :7] = 0.9  # general: 14 shares
    shares[0, 7:10], shares[1, 7:10] = torch.tensor([0.7, 0.71, 0.72]), 0.3  # one-sided
    shares[1, 10:12], shares[0, 10:12] = 0.8, 0.001  # the lowest entropies: 1 % of 200 are two
    shares[0, 12] = 0.6  # the last that counts as much
    shares[1, 199], shares[0, 199] = 0.59, 0.0  # of entropy 0, but little used
    split = [120, 80]
    specific, general, much = classify(shares.split(split, 1))
    assert [s.shape for s in specific] == [(2, 120), (2, 80)] and much == 0.59
    assert specific[0].nonzero().tolist() == [[1, 10], [1, 11]] and not specific[1].any()
    assert general[0].nonzero().flatten().tolist() == list(range(7)) and not general[1].any()
    silent = torch.zeros(2, 200, dtype=torch.float64)
    specific, general, _ = classify([silent])
    assert not specific[0].any() and not general[0].any(), "nobody uses these"


def mask(size, *members):
    found = torch.zeros(size, dtype=torch.bool)
    found[list(members)] = True
    return found


def test_rate_and_its_p_value_are_the_hypergeometric_ones():
    """Of 20 neurons 5 are pruned and 4 chosen, 3 of them pruned."""
    rate = prune_rate([mask(20, 0, 1, 2, 3)], [mask(20, 0, 1, 2, 8, 9)])
    assert (rate.neurons, rate.pruned, rate.rate, rate.expected) == (4, 3, 0.75, 0.25)
    total = math.comb(20, 4)
    chances = [math.comb(5, k) * math.comb(15, 4 - k) / total for k in range(5)]
    exact = chances[3] + chances[4]  # the mean is 1: no other number is 2 away from it
    assert rate.p == pytest.approx(exact, abs=4 * math.sqrt(exact / 100_000))
    assert (rate.low, rate.high) == wilson(3, 4)
    assert (rate.expected_low, rate.expected_high) == (0.0, 0.75)


def test_a_layer_that_is_pruned_more_makes_no_difference():
    """All chosen neurons lie in the layer that loses most, and fare there as the others do."""
    chosen = [mask(40, *range(20)), mask(40)]
    pruned = [mask(40, *range(10, 30)), mask(40, 0)]
    rate = prune_rate(chosen, pruned)
    assert rate.rate == rate.expected == 0.5 and rate.p == pytest.approx(1.0)
    pooled = 21 / 80  # what a test that forgets the layers would compare with
    assert rate.rate > 1.5 * pooled


def test_rates_where_nothing_can_differ():
    everything = prune_rate([mask(4, 0, 1)], [mask(4, 0, 1, 2, 3)])
    assert everything.rate == everything.expected == 1.0 and everything.p is None
    none = prune_rate([mask(4)], [mask(4, 0)])
    assert none.neurons == 0 and math.isnan(none.rate) and none.p is None


def test_wilsons_interval():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson(1, 1)[1] == 1.0 and wilson(0, 1)[0] == 0.0


@pytest.mark.parametrize(("sign", "words"), [(1, "pruned"), (-1, "kept")])
def test_report_finds_a_mask_made_of_specific_neurons(sign, words):
    model = tiny("llama", intermediate_size=400).eval()
    data = texts(("en", "fr", "es"), blocks=6)
    specific, _, _ = classify(active_shares(model, data))
    pruned = []
    for layer in specific:
        own, size = layer.any(0), layer.shape[1]
        others = (~own).nonzero().flatten()[: size // 2]
        pruned.append(
            own | mask(size, *others.tolist()) if sign > 0 else mask(size, *others.tolist())
        )
    found = neuron_report(model, data, pruned)
    own = found.rates["specific"]
    assert own.neurons == 12 and own.rate == (1.0 if sign > 0 else 0.0) and own.p < 0.01
    assert f"language-specific neurons are preferentially {words} (p = " in found.sentence()
    assert sum(layer["specific"] for layer in found.layers) == 12
    assert found.rates["others"].neurons == 3 * 400 - 12
    each = [found.rates[f"specific to {name}"].neurons for name in data]
    assert sum(each) >= 12  # a neuron may be specific to two of three
    assert found.tokens == {name: int(packed.lengths.sum()) for name, packed in data.items()}


def test_report_of_a_mask_by_chance_says_so():
    model = tiny("llama", intermediate_size=400).eval()
    generator = torch.Generator().manual_seed(0)
    pruned = [torch.rand(400, generator=generator) < 0.3 for _ in arch.mlps(model)]
    found = neuron_report(model, texts(blocks=6), pruned)
    assert "no difference that could not be chance" in found.sentence()


def test_what_cannot_be_compared_is_refused():
    model = tiny("llama")
    data = texts()
    pruned = [mask(w) for w in arch.widths(model)]
    with pytest.raises(ValueError, match="at least two languages to compare, got .'en'."):
        neuron_report(model, {"en": data["en"]}, pruned)
    with pytest.raises(ValueError, match="neuron_report: the mask must have .* as the base has"):
        neuron_report(model, data, pruned[:-1])
    foreign = {"en": data["en"], "fr": pack([{"input_ids": [VOCAB] * 12,
                                              "labels": [VOCAB] * 12}], None, 12)}  # fmt: skip
    with pytest.raises(ValueError, match="the text of 'fr' must have token ids in 0"):
        neuron_report(model, foreign, pruned)
