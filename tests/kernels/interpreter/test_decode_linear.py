"""decode_linear: values against the fp64 oracle, memories that must not leak, and what is read."""

import pytest
import torch
from support.decode_inputs import DTYPES, KINDS, memories, reading, token_ids, variants, wide
from support.kernel_inputs import ids_of, normal
from support.oracle import compare
from support.tolerances import FORWARD

from koffkernels import LoRA, reference
from koffkernels._triton.lora.decode import CONFIGS, decode_linear
from koffkernels._triton.shared.config import Config
from koffkernels._triton.shared.decode import split_blocks, token_block
from koffkernels._triton.shared.launch import Rows, recording

# M, K, N, memories, rank: ones, primes, no tokens, the most tokens, 40 memories, ranks 1, 33 and
# several steps of ranks, K of several splits and steps, K and N that are multiples of every block.
SHAPES = [
    (1, 1, 1, 1, 1),
    (0, 8, 6, 2, 4),
    (3, 13, 11, 2, 1),
    (17, 1031, 67, 3, 33),
    (1, 1024, 128, 2, 16),
    (50, 96, 33, 40, 2),
    (64, 256, 130, 2, 70),
]


def make(shape, dtype, kind, bias=True):
    """x, weight, bias, LoRA and rows of a case."""
    m, k, out, n, r = shape
    n = 1 if kind == "none" else n
    x, weight = normal(m, k, dtype=dtype), normal(out, k, dtype=dtype, scale=k**-0.5)
    return (
        x,
        weight,
        normal(out, dtype=dtype) if bias else None,
        memories(n, r, k, out),
        Rows(ids_of(kind, m, n), 1),
    )


def check(x, weight, bias, lora, rows, config=None):
    """Compare with the oracle; the result."""
    got = decode_linear(x, weight, bias, lora, rows, config)
    ids = token_ids(rows, x.shape[0])
    wide_bias = None if bias is None else bias.double()
    want = reference.lora_linear(x.double(), weight.double(), wide_bias, wide(lora), ids)
    assert got.dtype == x.dtype
    compare("y", got, want, x.dtype, FORWARD)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_linear_oracle(shape, kind, dtype):
    check(*make(shape, dtype, kind, bias=kind != "one"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 1031, 67, 1, 1), (1, 37, 70, 1, 1)], ids=str)
def test_decode_linear_without_memories(shape, bias, dtype):
    x, weight, bias, _, _ = make(shape, dtype, "none", bias)
    check(x, weight, bias, None, Rows(None, 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_linear_every_config(name):
    for dtype in (torch.float32, torch.float16):
        check(*make((9, 777, 200, 3, 16), dtype, "mixed"), CONFIGS[name])


def test_decode_linear_views_and_rows_of_several_tokens():
    """Rows of x, W and ids with strides, and sequences of three tokens."""
    x, weight, bias, lora, _ = make((12, 300, 70, 3, 5), torch.float16, "mixed")
    wide_x, wide_w = torch.full((12, 3, 300), torch.nan), torch.full((140, 320), torch.nan)
    wide_x, wide_w = wide_x.half(), wide_w.half()
    wide_x[:, 1], wide_w[70:, :300] = x, weight
    rows = Rows(torch.tensor([2, -1, 0, 2]), 3)
    got = check(wide_x[:, 1], wide_w[70:, :300], bias, lora, rows)
    assert torch.equal(got, decode_linear(x, weight, bias, lora, rows))


def test_decode_linear_is_the_same_in_every_run():
    args = make((17, 1100, 70, 3, 16), torch.float16, "mixed")
    assert torch.equal(decode_linear(*args), decode_linear(*args))


def test_decode_linear_token_is_the_same_in_every_batch():
    """A tile of other tokens, other memories, or none leaves a token's bits alone."""
    x, weight, bias, lora, rows = make((15, 1100, 70, 3, 16), torch.float16, "mixed")
    whole = decode_linear(x, weight, bias, lora, rows)
    for i in range(15):
        alone = decode_linear(x[i : i + 1], weight, bias, lora, Rows(rows.ids[i : i + 1], 1))
        assert torch.equal(alone[0], whole[i])
    plain = decode_linear(x, weight, bias, None, rows)
    assert torch.equal(plain[rows.ids < 0], whole[rows.ids < 0])


@pytest.mark.parametrize("part", ["a", "b", "scaling"])
def test_decode_linear_memory_reaches_its_own_tokens_only(part):
    """Whatever finite numbers it holds; and one that no token has, whatever it holds."""
    x, weight, bias, lora, rows = make((9, 300, 70, 4, 5), torch.float32, "mixed")
    rows.ids[rows.ids == 2] = 3
    clean = decode_linear(x, weight, bias, lora, rows)
    getattr(lora, part)[1] = 1e35
    getattr(lora, part)[2] = torch.nan
    got = decode_linear(x, weight, bias, lora, rows)
    own = rows.ids == 1
    assert own.any() and torch.equal(got[~own], clean[~own])
    assert (got[own].abs() > 1e30).all()


def test_decode_linear_token_reaches_itself_only():
    x, weight, bias, lora, rows = make((9, 300, 70, 2, 5), torch.float32, "mixed")
    clean = decode_linear(x, weight, bias, lora, rows)
    x[4] = torch.nan
    got = decode_linear(x, weight, bias, lora, rows)
    others = torch.arange(9) != 4
    assert torch.equal(got[others], clean[others]) and got[4].isnan().all()


@pytest.mark.parametrize("k", [1100, 512])
def test_decode_linear_reads_weights_once_and_no_unused_memory(k):
    x, weight, bias, lora, _ = make((5, k, 70, 40, 16), torch.float16, "mixed")
    rows = Rows(torch.tensor([7, -1, 30, 7, -1]), 1)
    wide_x = torch.cat([x, torch.full_like(x, torch.nan)])
    with reading() as reads:
        decode_linear(wide_x[:5], weight, bias, lora, rows)
    assert (reads.of(weight) == 1).all()
    assert not reads.of(wide_x)[5:].any()
    used = torch.zeros(40, dtype=torch.int64)
    used[[7, 30]] = 1
    assert torch.equal(reads.of(lora.a), used[:, None, None].expand(lora.a.shape))
    assert torch.equal(reads.of(lora.b), used[:, None, None].expand(lora.b.shape))


def launches(m, k, out, lora=None, bias=None):
    x, weight = (torch.empty(*s, device="meta", dtype=torch.bfloat16) for s in ((m, k), (out, k)))
    ids = None if lora is None else torch.empty(m, dtype=torch.int64, device="meta")
    with recording() as found:
        decode_linear(x, weight, bias, lora, Rows(ids, 1))
    return found


def test_decode_linear_launches():
    """One launch where nothing is left to add, else two; nothing without tokens."""
    lora = LoRA(*(torch.empty(*s, device="meta") for s in ((8, 16, 4096), (8, 14336, 16), (8,))))
    assert len(launches(1, 4096, 128 * 132)) == 1
    assert len(launches(1, 4096, 1024)) == 2
    assert len(launches(64, 4096, 14336, lora)) == 2
    assert len(launches(0, 4096, 14336, lora)) == 0


def test_decode_linear_compiles_three_variants_at_most():
    lora = LoRA(*(torch.empty(*s, device="meta") for s in ((8, 16, 4096), (8, 1024, 16), (8,))))

    def call(m):
        x, weight = (
            torch.empty(*s, device="meta", dtype=torch.bfloat16) for s in ((m, 4096), (1024, 4096))
        )
        ids = torch.empty(m, dtype=torch.int64, device="meta")
        decode_linear(x, weight, None, lora, Rows(ids, 1))

    found = variants(call, range(1, 65))
    assert len(found) == 2 and all(len(kinds) <= 3 for kinds in found.values())


def test_token_block_is_the_smallest_that_fits():
    assert [token_block(m) for m in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]
    with pytest.raises(AssertionError):
        token_block(65)


@pytest.mark.parametrize("k", [1, 255, 1031, 4096, 14336])
@pytest.mark.parametrize("tiles", [1, 16, 64, 224, 2004])
def test_split_blocks_covers_k_once(tiles, k):
    """Every block in one split, no split empty; few tiles are split until the GPU is full."""
    config = Config(None, 64, 128, stages=4)
    splits, each = split_blocks(
        torch.empty(1, k, dtype=torch.float16, device="meta"), tiles, config
    )
    blocks = -(-k // 128)
    assert (splits - 1) * each < blocks <= splits * each
    assert k < 512 or tiles > 100 or splits > 1
