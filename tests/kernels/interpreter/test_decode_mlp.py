"""decode_mlp_up: values against the fp64 oracle, gates, memories that must not leak, and reads."""

import pytest
import torch
from support.decode_inputs import DTYPES, KINDS, memories, reading, token_ids, variants, wide
from support.kernel_inputs import ids_of, normal
from support.oracle import compare
from support.tolerances import FORWARD

from koffkernels import LoRA, reference
from koffkernels._triton.mlp.decode import CONFIGS, decode_mlp_up
from koffkernels._triton.shared.launch import Rows, recording

# M, K, I, memories, ranks of gate and up (0: none): ones, primes, no tokens, the most tokens, 40
# memories, ranks 1, 33 and several steps, one LoRA alone, sizes that are multiples of every block.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (0, 8, 6, 2, 4, 4),
    (3, 13, 11, 2, 1, 33),
    (17, 523, 67, 3, 16, 0),
    (1, 1024, 128, 2, 16, 16),
    (50, 96, 33, 40, 2, 3),
    (64, 64, 130, 2, 0, 70),
]
GATES = ("none", "ones", "zeros", "mixed")


def gates_of(kind, size):
    """mixed: soft ones and zeros, and all 0 from neuron 64 on (a tile, where there are so many)."""
    if kind == "none":
        return None
    gates = torch.ones(size) if kind == "ones" else torch.zeros(size)
    if kind == "mixed":
        gates[:64] = torch.linspace(-0.3, 1.0, min(size, 64)).clamp(min=0.0)
    return gates


def make(shape, dtype, kind, gates="mixed"):
    """The arguments of decode_mlp_up but the activation."""
    m, k, inner, n, r_gate, r_up = shape
    n = 1 if kind == "none" else n
    return (
        normal(m, k, dtype=dtype),
        normal(inner, k, dtype=dtype, scale=k**-0.5),
        normal(inner, k, dtype=dtype, scale=k**-0.5),
        gates_of(gates, inner),
        memories(n, r_gate, k, inner) if r_gate else None,
        memories(n, r_up, k, inner) if r_up else None,
        Rows(ids_of(kind, m, n), 1),
    )


def check(x, w_gate, w_up, gates, lora_gate, lora_up, rows, activation="silu", config=None):
    """Compare with the oracle; the result."""
    got = decode_mlp_up(x, w_gate, w_up, gates, lora_gate, lora_up, rows, activation, config)
    ids, wide_x = token_ids(rows, x.shape[0]), x.double()
    g, u = (
        reference.lora_linear(wide_x, weight.double(), None, wide(lora), ids)
        for weight, lora in ((w_gate, lora_gate), (w_up, lora_up))
    )
    want = reference.ACTIVATIONS[activation](g) * u
    want = want if gates is None else want * gates.double()
    assert got.dtype == x.dtype
    compare("h", got, want, x.dtype, FORWARD)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_mlp_up_oracle(shape, kind, dtype):
    check(*make(shape, dtype, kind, GATES[KINDS.index(kind)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gates", GATES)
def test_decode_mlp_up_gates_and_activations(gates, activation, dtype):
    """Also without memories."""
    x, w_gate, w_up, gates, _, _, rows = make((5, 101, 150, 1, 0, 0), dtype, "none", gates)
    check(x, w_gate, w_up, gates, None, None, rows, activation)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_mlp_up_every_config(name):
    for dtype in (torch.float32, torch.float16):
        check(*make((9, 391, 200, 3, 16, 4), dtype, "mixed"), "silu", CONFIGS[name])


def test_decode_mlp_up_views_and_rows_of_several_tokens():
    """Both weights in one wide buffer, x with strides, and sequences of three tokens."""
    x, w_gate, w_up, gates, lora_gate, lora_up, _ = make(
        (12, 300, 70, 3, 5, 4), torch.float16, "mixed"
    )
    wide_x, wide_w = (torch.full(s, torch.nan).half() for s in ((12, 3, 300), (140, 320)))
    wide_x[:, 1], wide_w[:70, :300], wide_w[70:, :300] = x, w_gate, w_up
    rest = gates, lora_gate, lora_up, Rows(torch.tensor([2, -1, 0, 2]), 3)
    got = check(wide_x[:, 1], wide_w[:70, :300], wide_w[70:, :300], *rest)
    assert torch.equal(got, decode_mlp_up(x, w_gate, w_up, *rest, "silu"))


def test_decode_mlp_up_is_the_same_in_every_run():
    args = make((17, 1100, 70, 3, 16, 8), torch.float16, "mixed")
    assert torch.equal(decode_mlp_up(*args, "silu"), decode_mlp_up(*args, "silu"))


def test_decode_mlp_up_token_is_the_same_in_every_batch():
    """Other tokens, and more memories beside its own, leave a token's bits alone."""
    x, w_gate, w_up, gates, *loras, rows = make((6, 1100, 70, 40, 16, 8), torch.float16, "mixed")
    whole = decode_mlp_up(x, w_gate, w_up, gates, *loras, rows, "silu")
    for i, m in enumerate(rows.ids.tolist()):
        own = [type(lora)(*(t[m : m + 1] for t in lora)) if m >= 0 else None for lora in loras]
        alone = decode_mlp_up(x[i : i + 1], w_gate, w_up, gates, *own, Rows(None, 1), "silu")
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_decode_mlp_up_closed_neurons_give_zero(bad):
    """Whatever x, weights and memories hold, in a tile that is skipped and in one that is not."""
    x, w_gate, w_up, gates, lora_gate, lora_up, rows = make(
        (5, 40, 200, 2, 4, 4), torch.float16, "mixed", "mixed"
    )
    closed = gates == 0
    for t in (w_gate, w_up):
        t[closed] = bad
    for lora in (lora_gate, lora_up):
        lora.b[:, closed] = bad
    assert closed[:64].any()
    h = check_finite(decode_mlp_up(x, w_gate, w_up, gates, lora_gate, lora_up, rows, "silu"))
    assert (h[:, closed] == 0).all() and (h[:, ~closed] != 0).any()
    x[:] = bad
    h = decode_mlp_up(x, w_gate, w_up, gates, lora_gate, lora_up, rows, "silu")
    assert (h[:, closed] == 0).all() and not torch.isfinite(h[:, ~closed]).any()


def check_finite(h):
    assert torch.isfinite(h).all()
    return h


@pytest.mark.parametrize("which", [4, 5])
@pytest.mark.parametrize("part", ["a", "b", "scaling"])
def test_decode_mlp_up_memory_reaches_its_own_tokens_only(part, which):
    """Whatever finite numbers it holds."""
    args = make((9, 300, 70, 3, 5, 4), torch.float32, "mixed", "ones")
    clean = decode_mlp_up(*args, "silu")
    getattr(args[which], part)[1] = 1e35
    got = decode_mlp_up(*args, "silu")
    own = args[-1].ids == 1
    assert own.any() and torch.equal(got[~own], clean[~own]) and (got[own] != clean[own]).all()


def test_decode_mlp_up_token_reaches_itself_only():
    args = make((9, 300, 70, 2, 5, 4), torch.float32, "mixed", "ones")
    clean = decode_mlp_up(*args, "silu")
    args[0][4] = torch.nan
    got = decode_mlp_up(*args, "silu")
    others = torch.arange(9) != 4
    assert torch.equal(got[others], clean[others]) and got[4].isnan().all()


@pytest.mark.parametrize("k", [300, 256])
def test_decode_mlp_up_reads_open_tiles_once_and_no_unused_memory(k):
    x, w_gate, w_up, gates, lora_gate, lora_up, _ = make(
        (5, k, 200, 40, 16, 4), torch.float16, "mixed", "mixed"
    )
    gates[130] = 0.5  # tiles: open, closed, open, closed
    rows = Rows(torch.tensor([7, -1, 30, 7, -1]), 1)
    wide_x = torch.cat([x, torch.full_like(x, torch.nan)])
    with reading() as reads:
        decode_mlp_up(wide_x[:5], w_gate, w_up, gates, lora_gate, lora_up, rows, "silu")
    read = torch.tensor([1, 0, 1, 0]).repeat_interleave(64)[:200]
    assert not reads.of(wide_x)[5:].any()
    used = torch.zeros(40, dtype=torch.int64)
    used[[7, 30]] = 1
    for weight in (w_gate, w_up):
        assert torch.equal(reads.of(weight), read[:, None].expand(weight.shape))
    for a, b, _ in (lora_gate, lora_up):
        assert torch.equal(reads.of(a), used[:, None, None].expand(a.shape))
        assert torch.equal(reads.of(b), (used[:, None] * read)[:, :, None].expand(b.shape))


def on_meta(m, lora=True):
    """Launch at real sizes, on tensors without data."""
    x = torch.empty(m, 4096, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(14336, 4096, device="meta", dtype=torch.bfloat16)
    gates = torch.empty(14336, device="meta")
    sizes = (8, 16, 4096), (8, 14336, 16), (8,)
    matrices = LoRA(*(torch.empty(*size, device="meta") for size in sizes))
    matrices = matrices if lora else None
    ids = torch.empty(m, dtype=torch.int64, device="meta")
    decode_mlp_up(x, weight, weight, gates, matrices, matrices, Rows(ids, 1), "silu")


def test_decode_mlp_up_launches():
    for m, lora, want in ((1, True, 2), (64, True, 2), (1, False, 1), (0, True, 0)):
        with recording() as found:
            on_meta(m, lora)
        assert len(found) == want


def test_decode_mlp_up_compiles_three_variants_at_most():
    found = variants(on_meta, range(1, 65))
    assert len(found) == 2 and all(len(kinds) <= 3 for kinds in found.values())
