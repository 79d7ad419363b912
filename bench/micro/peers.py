"""The operations, and what a user would run instead of each: same tensors, same numbers.

A peer is made from a problem of ``bench.gpu.smoke`` and is a function of its tensors by name, so
that ``test_operations`` can check its result, and its gradients, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from koffkernels import hard_concrete

from ..gpu import smoke
from ..gpu.context import Bench, pruned
from ..gpu.smoke import Call, Problem
from ..peers.lora_mlp import lora_mlp
from ..peers.peft_mlp import liger_mlp

MLP = ("gate", "up", "down")
RANK, PREFIX = 16, 128


def problem(bench: Bench, operation: str, rows: int, tokens: int, memories: int) -> Problem:
    """Inputs of one operation at a model's shape.

    Args:
        bench: device, dtype and shape.
        operation: name of a public function of koffkernels.
        rows, tokens: of the batch; one token is decode, behind a cache of 512.
        memories: 1, or several that the rows use in turn.
    """
    shape = bench.shape
    if operation == "lora_linear":
        return smoke.linear(bench, (rows, tokens), shape.hidden, shape.hidden, memories, RANK)
    if operation == "gated_mlp":
        width = pruned(shape.intermediate)
        return smoke.mlp(bench, (rows, tokens), width, memories, RANK, gates=False)
    if operation == "prefix_attention":
        keys = 512 if tokens == 1 else tokens
        size = smoke.Attention(
            rows, shape.heads, shape.kv_heads, tokens, keys, PREFIX, shape.head_dim, memories
        )
        return smoke.attention(bench, size)
    width = shape.intermediate
    log_alpha = bench.normal(width, dtype=torch.float32)
    u = torch.rand(width, device=bench.device).clamp(1e-6, 1 - 1e-6)

    def plain(t: dict[str, Tensor]) -> Tensor:
        s = torch.sigmoid((torch.logit(t["u"]) + t["log_alpha"]) / (2 / 3))
        return (s * 1.2 - 0.1).clamp(0.0, 1.0)

    def ours(t: dict[str, Tensor]) -> Tensor:
        return hard_concrete(t["log_alpha"], sample=True, u=t["u"])

    return Problem({"log_alpha": log_alpha, "u": u}, ours, plain, ("u",))


def peers(operation: str, found: Problem, memories: int) -> dict[str, Callable[[], Call]]:
    """Name -> what makes the peer: koffkernels, and everything it is compared with."""
    made: dict[str, Callable[[], Call]] = {
        "koff": lambda: found.ours,
        "eager": lambda: found.plain,
        "compiled": lambda: torch.compile(found.plain, dynamic=False),
    }
    if operation == "lora_linear":
        made["peft"] = lambda: _peft_linear(found, memories)
    if operation == "gated_mlp":
        made["peft"] = lambda: _peft_mlp(found, memories, LlamaMLP)
        if liger_mlp() is not None and torch.cuda.is_available():
            made["peft-liger"] = lambda: _peft_mlp(found, memories, liger_mlp())
        if memories == 1:
            made["hand-written"] = lambda: _hand_written_mlp(found)
    if operation == "prefix_attention":
        made["concatenated"] = lambda: _concatenated(found, memories)
        made["flex"] = lambda: _flex(found, memories)
    return made


def _adapter_names(rows: int, memories: int) -> list[str] | None:
    """The memory of each row in PEFT's words; None for one adapter on every row, which PEFT runs
    faster."""
    if memories == 1:
        return None
    return ["__base__" if m < 0 else f"m{m}" for m in smoke.row_memories(rows, memories)]


def _with_adapters(module: nn.Module, targets: list[str], memories: int) -> nn.Module:
    for m in range(memories):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
        module = inject_adapter_in_model(config, module, adapter_name=f"m{m}")
    return module


def _use(layer: nn.Module, t: dict[str, Tensor], prefix: str, memories: int) -> None:
    """Let a PEFT layer's adapters be this call's tensors, gradients included."""
    scaling = [float(s) for s in t[f"{prefix}.s"]]
    for m in range(memories):
        name = f"m{m}"
        for part, key in ((layer.lora_A[name], "a"), (layer.lora_B[name], "b")):
            part._parameters.pop("weight", None)
            part.weight = t[f"{prefix}.{key}"][m]
        layer.scaling[name] = scaling[m]


def _peft_linear(found: Problem, memories: int) -> Call:
    """PEFT's LoRA layer, unmerged, or its mixed batch."""
    out, width = found.tensors["w"].shape
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(width, out, bias=False))
    model = _with_adapters(model, ["0"], memories).eval()
    layer = model[0]
    layer.base_layer.weight = nn.Parameter(found.tensors["w"], requires_grad=False)
    names = _adapter_names(found.tensors["x"].shape[0], memories)
    rest = {} if names is None else {"adapter_names": names}

    def call(t: dict[str, Tensor]) -> Tensor:
        _use(layer, t, "lora", memories)
        return layer(t["x"], **rest)

    return call


def _peft_mlp(found: Problem, memories: int, kind: type[nn.Module]) -> Call:
    """An MLP of transformers, or Liger's, with PEFT's LoRA layers in it."""
    t = found.tensors
    width, hidden = t["gate"].shape
    with torch.device("meta"):
        mlp = kind(LlamaConfig(hidden_size=hidden, intermediate_size=width, mlp_bias=False))
    mlp = _with_adapters(mlp, [f"{name}_proj" for name in MLP], memories).eval()
    linears = {name: getattr(mlp, f"{name}_proj") for name in MLP}
    for name, layer in linears.items():
        layer.base_layer.weight = nn.Parameter(t[name], requires_grad=False)
    names = _adapter_names(t["x"].shape[0], memories)
    rest = {} if names is None else {"adapter_names": names}

    # PEFT's hooks would say so: an MLP passes nothing on to its layers.
    if names is not None:
        for layer in linears.values():
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: (args, rest), with_kwargs=True
            )

    def call(t: dict[str, Tensor]) -> Tensor:
        for name, layer in linears.items():
            _use(layer, t, f"{name}.lora", memories)
        return mlp(t["x"])

    return call


def _hand_written_mlp(found: Problem) -> Call:
    """One autograd function for the whole MLP, as fine-tuning libraries write it."""
    scaling = float(found.tensors["gate.lora.s"][0])

    def call(t: dict[str, Tensor]) -> Tensor:
        lora = [t[f"{name}.lora.{part}"][0].to(t["x"].dtype) for name in MLP for part in "ab"]
        return lora_mlp(t["x"], tuple(t[name] for name in MLP), lora, scaling)

    return call


def _prefix_lengths(found: Problem, memories: int) -> tuple[Tensor, Tensor]:
    """Of each row: its memory (0 for none), and how many learned keys it sees, int64 [B]."""
    q = found.tensors["q"]
    ids = torch.tensor(smoke.row_memories(q.shape[0], memories), device=q.device)
    lengths = torch.tensor(smoke.prefix_lengths(PREFIX, memories), device=q.device)
    chosen = ids.clamp(min=0)
    return chosen, torch.where(ids < 0, 0, lengths[chosen])


def _joined(t: dict[str, Tensor], chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with each row's prefix repeated in front of them."""
    keys = torch.cat([t["pk"].to(t["k"].dtype)[chosen], t["k"]], 2)
    return keys, torch.cat([t["pv"].to(t["v"].dtype)[chosen], t["v"]], 2)


def _concatenated(found: Problem, memories: int) -> Call:
    """The prefix of each row in front of its keys, and torch's attention."""
    q, k = found.tensors["q"], found.tensors["k"]
    rows, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    chosen, length = _prefix_lengths(found, memories)
    before = torch.arange(PREFIX, device=q.device) < length[:, None]  # [B, P]
    causal = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)
    mask = torch.cat([before[:, None].expand(-1, tokens, -1), causal.expand(rows, -1, -1)], 2)
    # Decode with one memory sees all: no mask, torch's fastest path.
    mask = None if bool(mask.all()) else mask[:, None]

    def call(t: dict[str, Tensor]) -> Tensor:
        keys, values = _joined(t, chosen)
        return F.scaled_dot_product_attention(t["q"], keys, values, attn_mask=mask, enable_gqa=True)

    return call


def _flex(found: Problem, memories: int) -> Call:
    """The same concatenation under torch's FlexAttention, compiled, with a block mask."""
    q, k = found.tensors["q"], found.tensors["k"]
    rows, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    chosen, length = _prefix_lengths(found, memories)
    first = keys - tokens

    def visible(b, h, i, j):
        return torch.where(j < PREFIX, j < length[b], j - PREFIX <= i + first)

    mask = create_block_mask(visible, rows, None, tokens, PREFIX + keys, device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)

    def call(t: dict[str, Tensor]) -> Tensor:
        keys, values = _joined(t, chosen)
        return attend(t["q"], keys, values, block_mask=mask, enable_gqa=True)

    return call
