"""Losses of positions: against torch's own cross-entropy and divergence, each with its own
log-softmax."""

import pytest
import torch
import torch.nn.functional as F

from koff.data import losses as module
from koff.data.losses import token_losses

IDS = torch.tensor([[3, 0, 4, 1], [2, 2, 0, 3]])
# Both sides round the same fp32 sums over 5 entries of size ~1 in another order: a few 2^-24 each.
FP32 = 8 * 2**-24


def separately(logits, ids, teacher):
    """Cross-entropy and divergence, each from the logits."""
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    log_q = F.log_softmax(logits[:, :-1].float(), -1)
    log_p = F.log_softmax(teacher[:, :-1].float(), -1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return losses.view(divergence.shape), divergence


# Rows of a piece: all 8, 3 (the last piece has 2), 1 (fewer elements than one row).
@pytest.mark.parametrize("piece", [module.PIECE_CPU, 17, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_are_torchs_own_with_gradients(dtype, piece, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CPU", piece)
    logits, teacher = (torch.randn(2, 4, 5).to(dtype) for _ in range(2))
    results = []
    for losses, leaf in ((token_losses, logits.clone()), (separately, logits.float())):
        leaf.requires_grad_()
        both = losses(leaf, IDS, teacher)
        (0.3 * both[0].mean() + 0.7 * both[1].mean()).backward()
        results.append((*both, leaf.grad))
    (loss, divergence, grad), (wanted_loss, wanted_divergence, wanted_grad) = results
    assert loss.dtype == divergence.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(loss, wanted_loss) and torch.equal(divergence, wanted_divergence)
    one_rounding = 0.0 if dtype == torch.float32 else 2**-8
    assert torch.allclose(grad.float(), wanted_grad, atol=FP32, rtol=one_rounding)
    assert not grad[:, -1].any() and grad[:, :-1].any()


def test_token_losses_are_the_definitions():
    logits, teacher = torch.randn(2, 2, 4, 5, dtype=torch.float64).unbind()
    losses, divergence = token_losses(logits, IDS, teacher)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    for row in range(2):
        for t in range(3):
            assert losses[row, t] == pytest.approx(-float(q[row, t, IDS[row, t + 1]].log()))
    assert torch.allclose(divergence.double(), (p * (p / q).log()).sum(-1)[:, :-1], atol=1e-6)
    assert not token_losses(teacher, IDS, teacher)[1].any()


def test_positions_that_do_not_count_have_neither_loss_nor_gradient():
    labels = torch.tensor([[3, -100, 4, 1], [-100, -100, -100, 3]])
    logits, teacher = torch.randn(2, 2, 4, 5)
    whole = token_losses(logits, IDS, teacher)
    leaf = logits.clone().requires_grad_()
    losses = token_losses(leaf, labels, teacher)
    counts = labels[:, 1:] != -100
    for some, every in zip(losses, whole, strict=True):
        assert torch.equal(some, every * counts) and every.all()
    sum(part.sum() for part in losses).backward()
    assert torch.equal(leaf.grad.any(-1), torch.cat([counts, torch.zeros(2, 1) > 0], 1))
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert float((losses[0].sum() / counts.sum()).detach()) == pytest.approx(
        float(wanted), rel=1e-6
    )


def test_token_losses_without_a_teacher():
    logits = torch.randn(2, 4, 5)
    losses, divergence = token_losses(logits, IDS)
    assert divergence is None
    assert torch.equal(losses, token_losses(logits, IDS, torch.zeros(2, 4, 5))[0])


def test_autocast_does_not_lower_the_losses():
    logits, teacher = torch.randn(2, 2, 4, 500)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = token_losses(logits, IDS, teacher)
    assert all(map(torch.equal, lowered, token_losses(logits, IDS, teacher)))


@pytest.mark.parametrize("which", [0, 1])
def test_one_loss_alone_has_its_gradient(which):
    logits, teacher = torch.randn(2, 2, 4, 5)
    grads = []
    for losses in (token_losses, separately):
        leaf = logits.clone().requires_grad_()
        loss = losses(leaf, IDS, teacher)[which].sum()
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.allclose(*grads, atol=FP32, rtol=0) and grads[0].any()


def test_no_copy_of_all_logits_is_kept(monkeypatch):
    """Autograd keeps the logits and the teacher's as they are, bf16, and no fp32 of their size."""
    monkeypatch.setattr(module, "PIECE_CPU", 64)
    logits, teacher = torch.randn(2, 2, 4, 64).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_losses(logits.requires_grad_(), IDS, teacher)
    assert {t.data_ptr() for t in kept if t.numel() > 8} == {logits.data_ptr(), teacher.data_ptr()}
