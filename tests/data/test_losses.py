"""Losses of positions from hidden states: against torch's own cross-entropy and divergence of all
logits, each with its own log-softmax."""

import pytest
import torch
import torch.nn.functional as F

from koff.data import losses as module
from koff.data.losses import Head, logits_in_pieces, token_losses

IDS = torch.tensor([[3, 0, 4, 1], [2, 2, 0, 3]])
SOME = torch.tensor([[3, -100, 4, 1], [-100, -100, -100, 3]])
WIDTH, VOCAB = 6, 5
# Both sides round the same fp32 sums, over at most 6 products of size ~1 forward and 5 backward, in
# another order, and the log-softmax after them: a few 2^-24 each.
FP32 = 16 * 2**-24


def states_and_teacher(dtype=torch.float32, width=WIDTH):
    return torch.randn(2, 2, 4, width).to(dtype).unbind()


def heads(dtype=torch.float32):
    """One of each kind: a plain one, and with everything that an architecture may add."""
    weight, bias = torch.randn(VOCAB, WIDTH).to(dtype), torch.randn(VOCAB).to(dtype)
    return {
        "plain": Head(weight),
        "biased": Head(weight, bias),
        "scaled": Head(weight, scale=1 / 6),
        "capped": Head(weight, bias, 0.7, 1.5),
    }


def of_all_logits(states, head, labels, teacher=None, weight=0.0):
    """The same sum and losses, of all logits at once, by autograd."""
    logits, p = states, teacher
    if head is not None:
        logits = head.logits(states)
        p = None if teacher is None else head.logits(teacher)
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].mT.float(), targets, reduction="none")
    total = (1 - weight) * losses.sum()
    if p is not None:
        counts = targets != -100
        log_q, log_p = (x[:, :-1][counts].float().log_softmax(-1) for x in (logits, p))
        total = total + weight * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total, losses.detach()


def with_gradient(losses, states, *arguments):
    leaf = states.clone().requires_grad_()
    total, each = losses(leaf, *arguments)
    assert not each.requires_grad
    (gradient,) = torch.autograd.grad(3 * total, leaf)
    return total.detach(), each, gradient


# Logits of a product, and of a softmax: all at once; 3 rows, of which softmax takes 2 and 1; fewer
# than a row.
@pytest.mark.parametrize("sizes", [(2**25, 2**18), (17, 11), (4, 4)])
@pytest.mark.parametrize("kind", ["none", "plain", "biased", "scaled", "capped"])
@pytest.mark.parametrize("labels", [IDS, SOME], ids=["all", "some"])
def test_token_losses_are_torchs_own_with_gradients(labels, kind, sizes, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", sizes[0])
    monkeypatch.setattr(module, "PIECE_CPU", sizes[1])
    head = heads().get(kind)
    states, teacher = states_and_teacher(width=VOCAB if head is None else WIDTH)
    before = states.clone(), teacher.clone()
    for arguments in ((head, labels), (head, labels, teacher, 0.7), (head, labels, teacher, 1.0)):
        got = with_gradient(token_losses, states, *arguments)
        wanted = with_gradient(of_all_logits, states, *arguments)
        for mine, theirs in zip(got, wanted, strict=True):
            assert mine.dtype == torch.float32
            # The sum is one of up to 6 losses of size ~1, the gradient is tripled.
            assert torch.allclose(mine, theirs, atol=6 * FP32, rtol=FP32)
        counts = labels[:, 1:] != -100
        assert torch.equal(got[1] != 0, counts)
        assert torch.equal(got[2].any(-1), F.pad(counts, (0, 1)))
    assert torch.equal(states, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("kind", ["none", "plain", "biased", "scaled", "capped"])
@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_gradients_are_those_of_finite_differences(kind, weight):
    head = heads(torch.float64).get(kind)
    states, teacher = states_and_teacher(torch.float64, VOCAB if head is None else WIDTH)

    def total(states):
        return token_losses(states, head, SOME, teacher if weight else None, weight)[0]

    assert total(states).dtype == torch.float64
    assert torch.autograd.gradcheck(total, (states.requires_grad_(),))


def test_token_losses_are_the_definitions():
    states, teacher = states_and_teacher(torch.float64)
    head = heads(torch.float64)["capped"]
    cross, losses = token_losses(states, head, IDS, teacher, 0.0)
    divergence, _ = token_losses(states, head, IDS, teacher, 1.0)
    q, p = (
        1.5 * torch.tanh(0.7 * (x @ head.weight.T + head.bias) / 1.5) for x in (states, teacher)
    )
    p, q = p.softmax(-1), q.softmax(-1)
    for row in range(2):
        for t in range(3):
            assert losses[row, t] == pytest.approx(-float(q[row, t, IDS[row, t + 1]].log()))
    assert cross == pytest.approx(float(losses.sum()))
    assert divergence == pytest.approx(float((p * (p / q).log())[:, :-1].sum()))
    assert token_losses(teacher, head, IDS, teacher, 1.0)[0] == 0


def test_labels_on_the_states_own_device_leave_nothing_out_but_the_result():
    """On a GPU every position is computed, also those that do not count, whatever is in them."""
    states, teacher = states_and_teacher()
    head = heads()["plain"]
    wanted = with_gradient(token_losses, states, head, SOME, teacher, 0.7)
    states, targets = states.flatten(0, 1), F.pad(SOME[:, 1:], (0, 1), value=-100).flatten()
    states[targets == -100] = float("nan")

    def every_row(leaf):
        return module._TokenLosses.apply(leaf, targets, head, teacher.flatten(0, 1), 0.7)

    total, losses, gradient = with_gradient(every_row, states)
    assert torch.allclose(total, wanted[0], rtol=FP32)
    assert torch.allclose(losses.view(2, 4)[:, :-1], wanted[1], rtol=FP32, atol=FP32)
    assert torch.allclose(gradient.view(2, 4, -1), wanted[2], rtol=FP32, atol=6 * FP32)


def test_a_head_that_is_trained_is_refused_and_measured_all_the_same():
    states = torch.randn(2, 4, WIDTH)
    head = Head(torch.randn(VOCAB, WIDTH, requires_grad=True))
    with pytest.raises(ValueError, match="^token_losses: the head must be frozen, got one that"):
        token_losses(states, head, IDS)
    with torch.no_grad():
        assert token_losses(states, head, IDS)[0] > 0
    next(logits_in_pieces(states.flatten(0, 1), head))


def test_no_position_counts():
    states = torch.randn(2, 4, WIDTH)
    total, losses, gradient = with_gradient(
        token_losses, states, heads()["plain"], torch.full_like(IDS, -100)
    )
    assert total == 0 and not losses.any() and not gradient.any()


@pytest.mark.parametrize("teacher", [False, True])
def test_bf16_rounds_logits_and_their_gradient_once(teacher):
    """As torch does, whose product with the head gives and takes bf16."""
    head = heads(torch.bfloat16)["biased"]
    states, other = states_and_teacher(torch.bfloat16)
    arguments = (head, IDS, other, 0.7) if teacher else (head, IDS)
    got = with_gradient(token_losses, states, *arguments)
    wanted = with_gradient(of_all_logits, states, *arguments)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.bfloat16]
    # The logits, up to 8, may fall to another side of their rounding, 2^-8 of them, each once
    # before and once after the bias: the losses move by twice as much at most.
    assert torch.allclose(got[1], wanted[1], atol=4 * 8 * 2**-8, rtol=0)
    assert torch.allclose(got[0], wanted[0], atol=6 * 4 * 8 * 2**-8, rtol=0)
    assert (got[2] - wanted[2]).abs().max() < 0.05 * wanted[2].abs().max()


def test_autocast_lowers_the_products_and_no_sum():
    states, teacher = states_and_teacher()
    head = heads()["biased"]
    low = head.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradient(token_losses, states, head, IDS, teacher, 0.7)
    wanted = with_gradient(token_losses, states.bfloat16(), low, IDS, teacher.bfloat16(), 0.7)
    assert got[2].dtype == torch.float32
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    # Of bf16 states the gradient is rounded once more, where it is scaled.
    assert torch.allclose(got[2], wanted[2].float(), rtol=2**-8, atol=0)


def test_backward_twice_gives_the_same():
    states, _ = states_and_teacher()
    total, _ = token_losses(states.requires_grad_(), heads()["plain"], IDS)
    first, second = (torch.autograd.grad(total, states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


def test_nothing_of_the_size_of_logits_is_kept():
    """For the backward pass there is the gradient for the hidden states, and nothing else."""
    states, teacher = torch.randn(2, 2, 4, WIDTH).bfloat16()
    head = Head(torch.randn(64, WIDTH).bfloat16())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_losses(states.requires_grad_(), head, IDS, teacher, 0.5)
    floating = [t for t in kept if t.is_floating_point()]
    assert [(t.shape, t.dtype) for t in floating] == [((6, WIDTH), torch.bfloat16)]


def test_without_a_gradient_none_is_computed(monkeypatch):
    states, teacher = states_and_teacher()
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
    with torch.no_grad():
        token_losses(states.requires_grad_(), heads()["plain"], IDS, teacher, 0.5)
    assert len(products) == 2
    token_losses(states, heads()["plain"], IDS, teacher, 0.5)
    assert len(products) == 2 + 3


@pytest.mark.parametrize("kind", ["none", "plain", "capped"])
def test_logits_in_pieces_are_all_logits(kind, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 3 * VOCAB)
    head = heads().get(kind)
    states = torch.randn(8, VOCAB if head is None else WIDTH)
    wanted = states if head is None else head.logits(states)
    found = torch.empty_like(wanted)
    for rows, logits in logits_in_pieces(states, head):
        found[rows] = logits
    assert torch.allclose(found, wanted, atol=FP32, rtol=FP32)
