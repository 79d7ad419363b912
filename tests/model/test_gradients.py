"""Gradients: recomputation, several forwards, accumulation and unused memories."""

import copy

import pytest
import torch
from support import activation_checkpointing
from support.models import ARCHITECTURES, attached, tokens

import koff

MIX = ["es", None, "keys"]


def loss_of(model, ids, memory, seed=5, **kwargs):
    """Scalar with a graph; the gates' sample depends on the seed alone."""
    torch.manual_seed(seed)
    logits = model(ids, memory=memory, use_cache=False, **kwargs).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.koff.named_parameters()}


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            scale = b[name].abs().max().clamp(min=1e-6)
            assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_gradients_equal_plain_ones(architecture, reentrant):
    model, ids = attached(architecture).train(), tokens()
    loss_of(model, ids, MIX).backward()
    plain = gradients(model)
    assert plain["gates.log_alpha.0"].abs().max() > 0
    model.zero_grad()
    activation_checkpointing.enable(model, reentrant)
    with koff.use_memory(model, "en"):
        loss = loss_of(model, ids, MIX)
    with koff.use_memory(model, ["en", "en", "es"]):  # changed since
        other = loss_of(model, ids, "en", seed=6)
        loss.backward()
    same(gradients(model), plain)
    del other


def test_two_forwards_before_one_backward_equal_two_rounds():
    model, ids = attached("qwen3").train(), tokens()
    loss_of(model, ids, "en", seed=1).backward()
    loss_of(model, ids, MIX, seed=2).backward()
    wanted = gradients(model)
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            activation_checkpointing.enable(model, False)
        total = loss_of(model, ids, "en", seed=1) + loss_of(model, ids, MIX, seed=2)
        total.backward()
        same(gradients(model), wanted, tolerance=1e-5)  # the order of two fp32 additions


def test_accumulation_over_memories_equals_their_mixed_batch():
    model, ids = attached("llama", target_sparsity=0).train(), tokens()
    loss_of(model, ids, MIX).backward()
    wanted = gradients(model)
    model.zero_grad()
    for row, name in enumerate(MIX):
        loss = loss_of(model, ids[row : row + 1], name) / 3
        if name is not None:
            loss.backward()
    same(gradients(model), wanted, tolerance=2e-5)


@pytest.mark.parametrize("memory", ["es", ["es", None, "keys"], torch.tensor([2, -1, 1])])
def test_a_memory_that_no_row_used_has_no_gradient_and_does_not_move(memory):
    model, ids = attached("llama").train(), tokens()
    optimizer = torch.optim.AdamW(model.koff.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):  # a state from steps in which it was used must not move it either
        loss_of(model, ids, ["en", "es", "keys"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(model.koff.state_dict())
    loss_of(model, ids, memory).backward()
    used = {"es"} if isinstance(memory, str) else {"es", "keys"}
    for name in model.koff.memory_names:
        grads = [p.grad for p in model.koff.memories[name].parameters()]
        assert all((g is not None) == (name in used) for g in grads), name
    optimizer.step()
    for key, value in model.koff.state_dict().items():
        if "memory_en" in key or "_frozen" in key:
            assert torch.equal(value, before[key]), key
        elif "memory_es" in key and not key.endswith("_extra_state"):
            assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_the_reference_backends(architecture):
    import koffkernels

    model, ids = attached(architecture).train(), tokens()
    loss_of(model, ids, MIX).backward()
    ours = gradients(model)
    model.zero_grad()
    with koffkernels.force_backend("reference"):
        loss_of(model, ids, MIX).backward()
    same(ours, gradients(model), tolerance=1e-4)  # fp32 sums in another order, 3 layers deep


def test_bf16_base_is_as_near_to_fp32_as_bf16_can_be():
    import koffkernels

    model, ids = attached("llama", target_sparsity=0).train(), tokens()

    def run(backend):
        model.zero_grad()
        with koffkernels.force_backend(backend):
            loss_of(model, ids, MIX).backward()
        return gradients(model)

    wide = run("torch")
    model.to(torch.bfloat16)
    ours, rounded = run("torch"), run("reference")  # fp32 inside every operation, bf16 between
    used = [n for n, g in wide.items() if g is not None]
    assert used == [n for n, g in ours.items() if g is not None]
    assert all(ours[n].dtype == torch.float32 for n in used)

    def error(grads):  # relative, over all parameters together
        gaps = torch.cat([(grads[n] - wide[n]).flatten() for n in used])
        return gaps.norm() / torch.cat([wide[n].flatten() for n in used]).norm()

    # bf16 inside the operations as well adds roundings of the same size: at most doubles it
    assert 0 < error(rounded) < 0.1 and error(ours) <= 2 * error(rounded)


def test_autocast_keeps_what_is_learned_in_fp32():
    model, ids = attached("llama").train(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, ids, MIX)
    loss.backward()
    grads = [p.grad for p in model.koff.parameters() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)


def test_gate_samples_differ_between_forwards_but_not_between_layers_runs():
    model, ids = attached("llama").train(), tokens()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(1)
    first = model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_compiled_forward_equals_eager():
    model, ids = attached("llama", target_sparsity=0.2), tokens()
    wanted = model(ids, memory=MIX, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(ids, memory=MIX, use_cache=False).logits
    assert (got - wanted).abs().max() < 1e-5  # another attention path, fp32
