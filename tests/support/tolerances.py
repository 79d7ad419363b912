"""How far a result may be from the fp64 oracle: rms(got - want) / rms(want).

The unit roundoff u of a dtype with p bits of precision is 2^-p. One rounding to nearest has an
rms-relative error of about 0.42 u (uniform within half a step of 2u, averaged over mantissas), and
independent roundings add as squares. Matmuls of bf16 and fp16 accumulate in fp32, so there the
length of a sum does not count.

Forward, on the longest way, the MLP's: a LoRA layer rounds the base product, the sum, and with
half the weight a, b, s and the delta: 4 squares. g counts 1.7 times through act, then come u,
act(g), act(g) u, h z and the down layer: 4 (1.7 + 1) + 3 + 4 = 18, and sqrt(18) 0.42 u = 1.8 u.
Backward repeats these in the saved g and u, and adds dh, dg, du and dx: sqrt(36) 0.42 u = 2.5 u.
Gradients of gates are sums of terms of both signs, which costs a little more.
"""

import torch

FORWARD, BACKWARD = "forward", "backward"

# In fp32 and fp64 a sum of K terms is itself rounded K times, growing like sqrt(K) u / 2: sums here
# have K < 1000 in outputs (16 u, twice in a row), and tokens x width < 10000 in gradients (50 u).
TOLERANCE = {
    (torch.float64, FORWARD): 32 * 2**-53,  # 3.6e-15
    (torch.float64, BACKWARD): 64 * 2**-53,  # 7.1e-15
    (torch.float32, FORWARD): 32 * 2**-24,  # 1.9e-6
    (torch.float32, BACKWARD): 64 * 2**-24,  # 3.8e-6
    (torch.bfloat16, FORWARD): 2 * 2**-8,  # 7.8e-3: 1.8 u
    (torch.bfloat16, BACKWARD): 4 * 2**-8,  # 1.6e-2: 2.5 u, and what cancels
    (torch.float16, FORWARD): 2 * 2**-11,  # 9.8e-4
    (torch.float16, BACKWARD): 4 * 2**-11,  # 2.0e-3
}

# Eager in the same dtype makes the same kind of error in another order, so ours must not be larger;
# two draws of it differ by a few percent, and other CPUs round elsewhere.
EAGER_FACTOR = {FORWARD: 1.25, BACKWARD: 1.25}
FEW = 8
CANCELLED = 1e-12  # rms of the oracle's own rounding where the true value is 0


def rms_error(got: torch.Tensor, want: torch.Tensor, typical: torch.Tensor | None = None) -> float:
    """rms(got - want) / rms(want) in fp64, inf for a NaN. Where terms of order 1 cancel to 0 the
    error is absolute; what must be exactly 0 is tested by itself. ``typical`` is the size these
    sums have when their terms do not cancel: where it is larger, it is what the error is of."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.numel() == 0:
        return 0.0
    scale, error = want.square().mean().sqrt(), (got - want).square().mean().sqrt()
    if typical is not None:
        scale = scale.maximum(typical.double().square().mean().sqrt().to(scale))
    if not torch.isfinite(error):
        return float("inf")
    return float(error / scale if scale > CANCELLED else error)


def slack(want: torch.Tensor) -> float:
    """4 where the expected values are but a few numbers, else 1: a sum of terms of both signs can
    come out much smaller than its terms, and only over many sums does that average out."""
    return 4.0 if int(want.count_nonzero()) <= FEW else 1.0
