"""Random arguments of the kernels, as named tensors (see oracle.py), and the plain eager way."""

import torch
import torch.nn.functional as F
from torch import Tensor

from koffkernels import GatedMLPLoRA, LoRA, Prefix, RowBounds
from koffkernels.reference import visible_keys

FP = (torch.float64, torch.float32)
LOW = (torch.bfloat16, torch.float16)
ALL = FP + LOW


def normal(*shape: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def master(dtype: torch.dtype) -> torch.dtype:
    """Memories and gates are kept in fp32 whatever the base's dtype (fp64 in fp64 tests)."""
    return torch.promote_types(dtype, torch.float32)


def ids_of(kind: str, rows: int, memories: int) -> Tensor | None:
    """memory_ids: none (None), off (all -1), one (all the last), mixed (all, and -1, in turn)."""
    if kind == "none":
        return None
    if kind in ("off", "one"):
        return torch.full((rows,), -1 if kind == "off" else memories - 1)
    return torch.arange(rows) * 7 % (memories + 1) - 1


def lora_tensors(name: str, n: int, r: int, k: int, out: int, dtype: torch.dtype) -> dict:
    """a, b and scaling such that the delta is about as large as the base output."""
    return {
        f"{name}.a": normal(n, r, k, dtype=dtype, scale=max(k, 1) ** -0.5),
        f"{name}.b": normal(n, out, r, dtype=dtype, scale=r**-0.5),
        f"{name}.scaling": torch.linspace(0.5, 1.5, n, dtype=dtype),
    }


def lora_from(tensors: dict, name: str) -> LoRA | None:
    if f"{name}.a" not in tensors:
        return None
    return LoRA(*(tensors[f"{name}.{part}"] for part in LoRA._fields))


def of_one_memory(tensors: dict) -> dict:
    """The same tensors with each LoRA of the only memory without that dimension: [r, K], [N, r]."""
    return {n: t[0] if n.endswith((".a", ".b")) else t for n, t in tensors.items()}


def mlp_lora_from(tensors: dict) -> GatedMLPLoRA | None:
    parts = [lora_from(tensors, name) for name in GatedMLPLoRA._fields]
    return GatedMLPLoRA(*parts) if any(part is not None for part in parts) else None


def eager_linear(x: Tensor, w: Tensor, lora: LoRA | None, ids: Tensor | None) -> Tensor:
    """What one writes without this library: every memory on every row, selected by a mask."""
    y = F.linear(x, w.to(x.dtype))
    for m in range(lora.a.shape[0] if lora is not None else 0):
        delta = F.linear(F.linear(x, lora.a[m].to(x.dtype)), lora.b[m].to(x.dtype))
        delta = delta * lora.scaling[m].to(x.dtype)
        if ids is not None:
            rows = (ids == m).view(-1, *(1,) * (x.dim() - 1))
            delta = delta.where(rows, 0.0)
        y = y + delta
    return y


def eager_mlp(x, weights, gates, lora, ids, activation) -> Tensor:
    lora = lora or GatedMLPLoRA()
    g, u = (eager_linear(x, weights[i], lora[i], ids) for i in (0, 1))
    act = {"silu": F.silu, "gelu": F.gelu}[activation](g)
    h = act * u if gates is None else act * u * gates.to(x.dtype)
    return eager_linear(h, weights[2], lora.down, ids)


def eager_attention(q, k, v, prefix: Prefix | None, ids, bounds) -> Tensor:
    """Row by row, concatenated, by torch's attention with a mask, in q's dtype."""
    visible = visible_keys(q.shape[0], q.shape[2], k.shape[2], bounds, q.device)
    out = []
    for b in range(q.shape[0]):
        m = -1 if prefix is None else 0 if ids is None else int(ids[b])
        length = 0 if m < 0 else int(prefix.lengths[m])
        keys, values = k[b], v[b]
        if length:
            keys = torch.cat([prefix.k[m, :, :length].to(q.dtype), keys], 1)
            values = torch.cat([prefix.v[m, :, :length].to(q.dtype), values], 1)
        mask = torch.cat([visible.new_ones(q.shape[2], length), visible[b]], 1)
        nothing = ~mask.any(-1, keepdim=True)
        o = F.scaled_dot_product_attention(
            *(x[None] for x in (q[b], keys, values)), attn_mask=mask | nothing, enable_gqa=True
        )
        out.append(o[0].masked_fill(nothing, 0.0))
    return torch.stack(out)


def attention_tensors(shape: dict, dtype: torch.dtype) -> dict:
    """q, k, v and, with n, a prefix of n memories; shape has B, Hq, Hkv, T, S, D and n, P."""
    b, heads, kv, t, s, d = (shape[x] for x in ("B", "Hq", "Hkv", "T", "S", "D"))
    tensors = {
        "q": normal(b, heads, t, d, dtype=dtype),
        "k": normal(b, kv, s, d, dtype=dtype),
        "v": normal(b, kv, s, d, dtype=dtype),
    }
    if shape.get("n"):
        sizes = (shape["n"], kv, shape["P"], d)
        tensors["prefix.k"] = normal(*sizes, dtype=master(dtype))
        tensors["prefix.v"] = normal(*sizes, dtype=master(dtype))
    return tensors


def prefix_from(tensors: dict, lengths: Tensor) -> Prefix | None:
    if "prefix.k" not in tensors:
        return None
    return Prefix(tensors["prefix.k"], tensors["prefix.v"], lengths)


def padded(rows: int, queries: int, keys: int, unwritten: int = 0) -> RowBounds:
    """Bounds of a batch that is padded on the left by 0, 1, 2, ... keys, with ``unwritten`` keys
    behind the queries."""
    end = keys - unwritten
    start = (torch.arange(rows) * 3) % max(1, end)
    return RowBounds(start, torch.full((rows,), end), torch.full((rows,), end - queries))
