"""Which vendor's attention runs for the own keys, and that cuDNN's place in it is right: cuDNN is
played by plain torch, with its shapes and what it demands of layouts."""

import pytest
import torch
from support.oracle import assert_same, compare, cotangent_for, leaves_of, run
from support.prefix_attention_cases import Case
from support.tolerances import BACKWARD

from koffkernels import Prefix
from koffkernels._triton.attention import op as ops
from koffkernels._triton.attention import vendor

SIZES = (3, 4, 2, 33, 33, 64, 2, 20)
SMALL = (2, 2, 1, 17, 17, 64, 2, 9)


class Cudnn:
    """torch.ops.aten with cuDNN's attention. ``error`` is raised by every call; ``calls`` are the
    names of those that were made."""

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.calls: list[str] = []

    def _scores(self, q, k, scale):
        """(q, k as wide as q, scaled scores under the causal mask), in fp32."""
        q, k = q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        masked = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return q, k, (scale * q @ k.mT).masked_fill(masked, -torch.inf)

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, want_lse, dropout, causal, *, scale
    ):
        self.calls.append("forward")
        if self.error is not None:
            raise self.error
        assert bias is None and want_lse and dropout == 0.0 and causal
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[2] == k.shape[2]
        score = self._scores(q, k, scale)[2]
        v = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
        o = torch.empty_like(q).copy_(score.softmax(-1) @ v)  # in q's layout
        lse = score.logsumexp(-1, keepdim=True)
        state = torch.empty((), dtype=torch.int64)
        return o, lse, None, None, q.shape[2], k.shape[2], state, state, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, do, q, k, v, o, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal,
        *, scale,
    ):  # fmt: skip
        self.calls.append("backward")
        if self.error is not None:
            raise self.error
        assert bias is cum_q is cum_k is None and dropout == 0.0 and causal
        assert max_q == max_k == q.shape[2] and seed.dtype == offset.dtype == torch.int64
        assert do.stride() == o.stride() == torch.empty_like(q).stride()
        assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
        wide_q, wide_k, score = self._scores(q, k, scale)
        do, group = do.float(), q.shape[1] // k.shape[1]
        p = torch.exp(score - lse)
        dp = do @ v.float().repeat_interleave(group, 1).mT
        ds = scale * p * (dp - (do * o.float()).sum(-1, keepdim=True))
        dk, dv = (
            torch.empty_like(x).copy_(dx.unflatten(1, (-1, group)).sum(2))
            for x, dx in ((k, ds.mT @ wide_q), (v, p.mT @ do))
        )
        return torch.empty_like(q).copy_(ds @ wide_k), dk, dv


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN, and nothing else."""
    fake = Cudnn()
    monkeypatch.setattr(vendor, "_aten", fake)
    with vendor.forced("cudnn"):
        yield fake


@pytest.fixture
def preferred(monkeypatch):
    """The CPU as a device on which cuDNN is faster, a torch that says it takes every call, and no
    demand for equal bits."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(vendor, "_cudnn_is_faster", lambda device, choice: True)
    monkeypatch.setattr(vendor, "can_use_cudnn_attention", lambda params: True)
    monkeypatch.setattr(vendor, "_refused", set())


def by_vendor(case: Case):
    return lambda t: ops.run(*case.call(t), "vendor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:6], (1, 2, 2, 65, 65, 128, 1, 7)], ids=str)
def test_own_part_by_cudnn(sizes, dtype, cudnn):
    Case(sizes, dtype).check(lambda *args: ops.run(*args, "vendor"))
    assert cudnn.calls == ["forward", "backward"]


@pytest.mark.parametrize(
    "frozen", [["q"], ["q", "k", "v"], ["prefix.k", "prefix.v"], ["k", "v"]], ids=str
)
def test_own_part_by_cudnn_partly_frozen(frozen, cudnn):
    Case(SIZES, torch.float32).check(lambda *args: ops.run(*args, "vendor"), frozen)
    assert cudnn.calls == ["forward", *["backward"] * ("k" not in frozen or "q" not in frozen)]


def test_scale_goes_to_cudnn(cudnn):
    case = Case(SIZES, torch.float32)
    call = case.call(scale=0.3)
    got = ops.run(*call, "vendor")
    assert torch.allclose(got, ops.run(*call, "one_pass"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("upstream", ["heads first", "tokens first", "one number"])
def test_cudnn_gets_o_and_do_as_q_lies(tokens_first, upstream, cudnn):
    """The fake asserts it; a plan made for one layout gives wrong gradients for another."""
    case = Case(SIZES, torch.float32)

    def call(t):
        if tokens_first:
            q, k, v = (t[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv")
            t = t | {"q": q, "k": k, "v": v}
        return ops.run(*case.call(t), "vendor")

    leaves = leaves_of(case.tensors)
    o = call(leaves)
    do = cotangent_for(o)
    if upstream == "tokens first":
        do = do.transpose(1, 2).contiguous().transpose(1, 2)
    if upstream == "one number":
        do = torch.ones(1).expand_as(o)
    got = torch.autograd.grad(o, list(leaves.values()), do)
    others = leaves_of(case.tensors)
    with vendor.forced("flash"):
        want = torch.autograd.grad(by_vendor(case)(others), list(others.values()), do)
    for name, grad, other in zip(leaves, got, want, strict=True):
        compare(name, grad, other.double(), torch.float32, BACKWARD)
    assert cudnn.calls == ["forward", "backward"]


def test_few_queries_train_by_cudnn_from_the_decode_kernels_o(cudnn):
    """Whose o lies as the output projection reads it, whatever q's layout."""
    Case((3, 4, 2, 9, 9, 64, 2, 20), torch.float32).check(lambda *args: ops.run(*args, "vendor"))
    assert cudnn.calls == ["backward"]


def test_compiled_by_cudnn(cudnn):
    case = Case(SMALL, torch.float32)

    def call(q, k, v, pk, pv, lengths, ids):
        return ops.run(q, k, v, Prefix(pk, pv, lengths), ids, None, None, "vendor")

    fast = torch.compile(call, fullgraph=True, backend="aot_eager")

    def compiled(t):
        return fast(*t.values(), case.lengths, case.ids)

    assert list(case.tensors) == ["q", "k", "v", "prefix.k", "prefix.v"]
    want = run(by_vendor(case), case.tensors)
    assert_same(run(compiled, case.tensors), want)
    assert cudnn.calls == ["forward", "backward"] * 2


def test_opcheck_by_cudnn(cudnn):
    case = Case(SMALL, torch.float32)
    q, k, v, prefix, ids, _, scale = case.call(leaves_of(case.tensors))
    args = (q, k, v, *prefix, ids, None, None, None, scale, "vendor")
    torch.library.opcheck(ops._forward_op, args)
    with torch.no_grad():
        o, lse = ops._forward_op(*args)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    tests = ("test_schema", "test_faketensor")
    do = torch.ones_like(o)
    torch.library.opcheck(ops._backward_op, (do, o, lse, *plain, [True] * 5), test_utils=tests)
    assert set(cudnn.calls) == {"forward", "backward"}


def test_what_cudnn_refuses_once_it_is_not_asked_again(preferred, monkeypatch):
    """A second try could run the plan that was not made."""
    case = Case(SIZES, torch.float32)
    want = run(by_vendor(case), case.tensors)  # no cuDNN here: torch.ops.aten refuses as well
    fake = Cudnn(RuntimeError("no valid execution plans"))
    monkeypatch.setattr(vendor, "_aten", fake)
    vendor._refused.clear()
    for _ in range(2):
        assert_same(run(by_vendor(case), case.tensors), want)
    assert fake.calls == ["forward"]
    other = Case((3, 4, 1, 33, 33, 64, 2, 20), torch.float32)  # another number of heads
    run(by_vendor(other), other.tensors)
    assert fake.calls == ["forward"] * 2


def test_a_refused_backward_is_flash_attentions(preferred, monkeypatch):
    case = Case(SIZES, torch.float32)
    fake = Cudnn()
    monkeypatch.setattr(vendor, "_aten", fake)
    leaves = leaves_of(case.tensors)
    o = by_vendor(case)(leaves)
    fake.error = RuntimeError("no valid execution plans")
    o.backward(cotangent_for(o))
    assert fake.calls == ["forward", "backward"]
    _, want = case.oracle()
    for name, leaf in leaves.items():
        compare(name, leaf.grad, want[name], torch.float32, BACKWARD)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("lost")])
def test_other_errors_are_no_refusal(error, preferred, monkeypatch):
    monkeypatch.setattr(vendor, "_aten", Cudnn(error))
    case = Case(SMALL, torch.float32)
    with pytest.raises(type(error)):
        ops.run(*case.call(), "vendor")
    assert not vendor._refused


def test_forced_cudnn_hides_no_error(cudnn):
    cudnn.error = RuntimeError("no valid execution plans")
    with pytest.raises(RuntimeError, match="execution plans"):
        ops.run(*Case(SMALL, torch.float32).call(), "vendor")


def test_when_cudnn_is_asked(preferred, monkeypatch):
    q, k, v = Case(SMALL, torch.bfloat16).call()[:3]
    assert vendor._cudnn_takes(None, q, k, v)
    with vendor.forced("flash"):
        assert not vendor._cudnn_takes(None, q, k, v)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not vendor._cudnn_takes(None, q, k, v)
    torch.use_deterministic_algorithms(False)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert not vendor._cudnn_takes(None, shifted, k, v)
    monkeypatch.setattr(vendor, "can_use_cudnn_attention", lambda params: False)
    assert not vendor._cudnn_takes(None, q, k, v)


def test_torch_is_asked_with_the_call_itself(preferred, monkeypatch):
    seen = []
    monkeypatch.setattr(vendor, "can_use_cudnn_attention", seen.append)
    q, k, v = Case(SMALL, torch.bfloat16).call()[:3]
    assert not vendor._cudnn_takes(None, q, k, v)
    (asked,) = seen
    assert asked.query is q and asked.key is k and asked.value is v
    assert asked.attn_mask is None and asked.dropout == 0.0
    assert asked.is_causal and asked.enable_gqa


@pytest.mark.parametrize(
    "capability, version, hip, faster",
    [
        ((9, 0), 91900, None, True),
        ((10, 0), 91501, None, True),
        ((10, 3), 92000, None, True),
        ((9, 0), 91500, None, False),
        ((9, 0), None, None, False),
        ((8, 0), 91900, None, False),
        ((8, 9), 91900, None, False),
        ((12, 0), 91900, None, False),
        ((9, 4), 3005000, "7.0", False),  # an MI300 and MIOpen
    ],
    ids=str,
)
def test_where_cudnn_is_faster(capability, version, hip, faster, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.version, "hip", hip)
    find = vendor._cudnn_is_faster.__wrapped__  # without what it remembers of each device
    assert find(torch.device("cuda", 0), None) is faster
    assert find(torch.device("cpu"), None) is False


def test_a_table_may_choose_cudnn_where_it_is_sound(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    find, gpu = vendor._cudnn_is_faster.__wrapped__, torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for version, sound in ((91500, False), (91900, True)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda v=version: v)
        assert [find(gpu, name) for name in ("cudnn", "flash", None)] == [sound, False, False]
