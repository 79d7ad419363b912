"""Binarising and compacting: exact counts, reachable widths, the same function."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import ARCHITECTURES, attached, perturb, tokens
from support.widths import spread
from transformers import AutoModelForCausalLM

import koff
from koff.model import arch
from koff.pruning.binarize import massive_neurons, round_widths

MEMORIES = ("en", "keys", "es", None, ["es", None, "keys"])
FP32 = 1e-5  # removed neurons contribute exact zeros; only the order of the sums changes


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compacted_equals_masked(architecture, multiple, inplace):
    model, ids = spread(attached(architecture, target_sparsity=0.4)), tokens()
    open_logits = model(ids, memory="en").logits
    report = koff.binarize(model, multiple_of=multiple)
    masked = [model(ids, memory=m).logits for m in MEMORIES]
    hidden = model(ids, memory="en", output_hidden_states=True).hidden_states
    small = koff.compact(model, inplace=inplace)
    assert (small is model) == inplace
    for memory, wanted in zip(MEMORIES, masked, strict=True):
        assert (small(ids, memory=memory).logits - wanted).abs().max() < FP32
    states = small(ids, memory="en", output_hidden_states=True).hidden_states
    assert all((a - b).abs().max() < FP32 for a, b in zip(states, hidden, strict=True))
    assert (masked[0] - open_logits).abs().max() > 1e-3  # the mask does something
    assert arch.widths(small) == report.sparsity.widths == koff.sparsity(small).widths
    assert koff.sparsity(small) == report.sparsity
    for module, width in zip(arch.mlps(small), arch.widths(small), strict=True):
        assert module.gate_proj.out_features == module.down_proj.in_features == width
    got = small.generate(ids, memory=list(MEMORIES[-1]), max_new_tokens=4, do_sample=False)
    assert got.shape == (3, 15)


def test_compact_leaves_the_given_model_alone_unless_inplace():
    model, ids = spread(attached("qwen3", target_sparsity=0.4)), tokens()
    koff.binarize(model, multiple_of=1)
    wanted, state = model(ids, memory="en").logits, copy.deepcopy(model.state_dict())
    small = koff.compact(model)
    assert torch.equal(model(ids, memory="en").logits, wanted)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert torch.equal(model(ids, memory="en").logits, wanted)


def test_compact_says_that_it_fixes_the_mask(caplog):
    model = spread(attached("llama", target_sparsity=0.4))
    koff.compact(model)
    assert "fixes the mask of the model, by koff.binarize" in caplog.text
    caplog.clear()
    koff.compact(model)
    assert koff.sparsity(model).hard and "fixes the mask" not in caplog.text


def test_compact_inplace_frees_the_wide_weights():
    model = spread(attached("llama", target_sparsity=0.5))
    koff.binarize(model, multiple_of=1)
    koff.compact(model, inplace=True)
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    used = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(storages.values()) == used  # no view keeps a wide buffer alive


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_uniform_widths_give_the_stock_class(architecture):
    model, ids = spread(attached(architecture, target_sparsity=0.3)), tokens()
    report = koff.binarize(model, per_layer="uniform", multiple_of=8)
    assert len(set(report.sparsity.widths)) == 1
    wanted = model(ids, memory="es").logits
    small = koff.compact(model)
    assert (small(ids, memory="es").logits - wanted).abs().max() < FP32
    assert small.config.model_type == architecture
    assert small.config.intermediate_size == report.sparsity.widths[0]
    assert "koff" not in str(small.config.to_dict())


def test_uneven_widths_give_the_narrow_class():
    model = spread(attached("llama", target_sparsity=0.4))
    koff.binarize(model, multiple_of=1)
    small = koff.compact(model)
    assert small.config.model_type == "koff_llama"
    assert small.config.intermediate_sizes == arch.widths(small)
    assert type(small).__name__ == "KoffLlamaForCausalLM"


@pytest.mark.parametrize("stock", [True, False], ids=["to equal widths", "to others"])
def test_a_narrow_backbone_can_be_pruned_again(stock, tmp_path):
    model = spread(attached("llama", target_sparsity=0.4))
    koff.binarize(model, multiple_of=1)
    koff.save(koff.compact(model), tmp_path / "narrow")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    config = koff.KoffConfig(("en",), target_sparsity=0.3, kv=None)
    again, ids = spread(perturb(koff.attach(base, config)).eval()), tokens()
    if stock:
        with torch.no_grad():
            for p in again.koff.gates.log_alpha:
                p.copy_(torch.arange(len(p)) < 30)
    widths, kept = arch.widths(again), 90 if stock else 120
    koff.binarize(again, target=1 - kept / sum(widths), multiple_of=1)
    wanted = again(ids, memory="en").logits
    small = koff.compact(again)
    assert sum(arch.widths(small)) == kept
    assert small.config.model_type == ("llama" if stock else "koff_llama")
    out = koff.save(small, tmp_path / "out")
    assert (koff.load(out)(ids, memory="en").logits - wanted).abs().max() < FP32
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert (plain(ids).logits - again(ids).logits).abs().max() < FP32
    text = (out / "config.json").read_text("utf-8")
    assert ("intermediate_sizes" in text or "auto_map" in text) != stock


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_binarise_is_exact_without_rounding(target):
    model = spread(attached("llama"))
    report = koff.binarize(model, target=target, multiple_of=1)
    neurons = 3 * 96
    assert sum(report.sparsity.widths) == round((1 - target) * neurons)
    kept = torch.cat(
        [p[m] for p, m in zip(model.koff.gates.log_alpha, model.koff.gates.masks, strict=True)]
    )
    gone = torch.cat(
        [p[~m] for p, m in zip(model.koff.gates.log_alpha, model.koff.gates.masks, strict=True)]
    )
    assert not len(gone) or kept.min() >= gone.max()


def test_no_layer_is_emptied():
    model = attached("llama")
    with torch.no_grad():
        model.koff.gates.log_alpha[1].fill_(-4.0)
        model.koff.gates.log_alpha[1][7] = -3.0
    report = koff.binarize(model, target=0.5, multiple_of=1)
    assert report.sparsity.widths[1] == 1 and bool(model.koff.gates.masks[1][7])
    assert sum(report.sparsity.widths) == 144


@settings(deadline=None, max_examples=200)
@given(
    full=st.integers(1, 300),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    multiple=st.sampled_from([1, 3, 16, 64, 128]),
)
def test_rounded_widths_are_reachable_and_as_near_as_can_be(full, shares, multiple):
    raw = [max(1, round(share * full)) for share in shares]
    keep = sum(raw)
    got = round_widths(raw, [full] * len(raw), multiple, keep)
    for width, wanted in zip(got, raw, strict=True):
        assert width % multiple == 0 or width == full
        assert 1 <= width <= full and abs(width - wanted) < multiple
    floors = [max(r // multiple * multiple, min(multiple, full)) for r in raw]
    if all(f <= r for f, r in zip(floors, raw, strict=True)) and full % multiple == 0:
        assert abs(sum(got) - keep) <= multiple / 2


def test_sparsity_reports_every_scope():
    model = spread(attached("llama", target_sparsity=0.4))
    soft = koff.sparsity(model)
    assert not soft.hard and soft.undecided > 0.5
    assert soft.mlp == pytest.approx(float(model.koff.gates.expected_sparsity().detach()))
    hard = koff.binarize(model, multiple_of=1).sparsity
    weights = {n: p.numel() for n, p in model.named_parameters() if not n.startswith("koff.")}
    mlp = sum(v for n, v in weights.items() if ".mlp." in n)
    table = weights["model.embed_tokens.weight"]
    assert hard.hard and hard.undecided == 0
    assert hard.model == pytest.approx(hard.mlp * mlp / sum(weights.values()))
    assert hard.non_embedding == pytest.approx(hard.mlp * mlp / (sum(weights.values()) - table))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(target=0.99), r"target must lie in 0..0.953, got 0.99"),
        (dict(multiple_of=0), "multiple_of must be a whole number of at least 1, got 0"),
        (dict(per_layer="both"), "per_layer must be 'global' or 'uniform', got 'both'"),
    ],
)
def test_illegal_binarise_arguments_are_refused(kwargs, message):
    model = attached("llama")
    with pytest.raises(ValueError, match=message):
        koff.binarize(model, **kwargs)
    assert not model.koff.gates.fixed


def test_gates_that_are_missing_or_not_finite_are_refused():
    with pytest.raises(ValueError, match="must have gates, got none; attach with target_sparsity"):
        koff.binarize(attached("llama", target_sparsity=0))
    with pytest.raises(ValueError, match="must have gates, got none; it is compact already"):
        koff.compact(attached("llama", target_sparsity=0))
    model = attached("llama")
    with torch.no_grad():
        model.koff.gates.log_alpha[0][3] = float("nan")
    with pytest.raises(ValueError, match="the gates must be finite, got NaN or inf"):
        koff.binarize(model)


def test_binarize_reports_neurons_of_massive_activation_that_it_removes(caplog):
    model, ids = spread(attached("llama", target_sparsity=0.4)), tokens()
    with torch.no_grad():  # far above the median of all
        for layer, neuron in ((1, 5), (2, 7)):
            arch.mlps(model)[layer].down_proj.weight[:, neuron] *= 1e5
        model.koff.gates.log_alpha[1][5] = -4.0
        model.koff.gates.log_alpha[2][7] = 4.0
    assert massive_neurons(model, ids) == [(1, 5), (2, 7)]
    with caplog.at_level("WARNING", logger="koff"):
        report = koff.binarize(model, multiple_of=1, token_ids=ids)
    assert report.massive == [(1, 5)]
    assert "massive activation, 1/5 (layer/neuron)" in caplog.text
    again = koff.binarize(model, multiple_of=1)  # neurons are found in their original order
    assert again.massive is None and again.sparsity == report.sparsity
    assert koff.binarize(model, multiple_of=1, token_ids=ids).massive == [(1, 5)]


@pytest.mark.parametrize(
    ("multiple", "says"),
    [(4096, "0.0 % .* 40.0 % .* of 96 in a layer a multiple of 4096 stays"), (1, None), (8, None)],
)
def test_a_target_that_is_missed_by_far_is_said(multiple, says, caplog):
    model = spread(attached("llama", target_sparsity=0.4))
    report = koff.binarize(model, multiple_of=multiple)
    assert abs(report.sparsity.mlp - 0.4) <= multiple / 2 / 288 + 1 / 288 or says
    found = [record.getMessage() for record in caplog.records if record.name == "koff"]
    assert len(found) == (says is not None)
    assert says is None or re.search(says, found[0])
