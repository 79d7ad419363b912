"""Gated DeltaNet layers under a memory: the state that a text starts from is learned.

Such a layer has no keys and values to put a prefix before. All that it keeps of what it has read is
a state S [Hv, Dk, Dv] and the last K - 1 inputs of its convolution [C, K - 1]: these are what a
memory has for it, and the prefill of a text gives both, as it gives keys and values elsewhere.

transformers' own forward begins at zero whenever its cache is empty, and has no argument for
another beginning. So the steps of it are written out here, for the forwards that need one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule


class Start(NamedTuple):
    """What a recurrent layer begins with, one per memory or one per row.

    Args:
        state: [n, Hv, Dk, Dv].
        conv: [n, C, K - 1], the inputs of the convolution before the first token, oldest first.
    """

    state: Tensor
    conv: Tensor


class StateWeights(nn.Module):
    """Learned start of one recurrent layer: state [Hv, Dk, Dv], conv [C, K - 1].

    All of it is trained. The frozen tokens of a cache are there for attention that has nowhere to
    go; a state has none.
    """

    def __init__(self, state: tuple[int, ...], conv: tuple[int, ...], device: torch.device):
        super().__init__()
        self.state = nn.Parameter(torch.zeros(state, device=device))
        self.conv = nn.Parameter(torch.zeros(conv, device=device))

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by the names that they have on disk."""
        return {"state": self.state, "conv": self.conv}

    @torch.no_grad()
    def fill_(self, state: Tensor, conv: Tensor) -> None:
        """Copy a state [Hv, Dk, Dv] and inputs of the convolution [C, K - 1] into the parameters,
        in place."""
        self.state.copy_(state)
        self.conv.copy_(conv)

    def draw_(self, std: float, generator: torch.Generator) -> None:
        """Fill with N(0, std), in place."""
        shapes = (self.state.shape, self.conv.shape)
        self.fill_(*(torch.randn(shape, generator=generator) * std for shape in shapes))

    def take_(self, layer: Any) -> None:
        """Take over what a cache of one row kept of this layer, in place."""
        # The cache has K inputs of the convolution, the oldest of which no later token sees.
        self.fill_(layer.recurrent_states[0][0], layer.conv_states[0][0, :, 1:])


def start_of_rows(start: Start, ids: Tensor | None, rows: int) -> Start:
    """Return what each row begins with.

    Args:
        start: of the memories in use.
        ids: int64 [B], each row's memory or -1 for none, which begins at zero; None: all rows have
            the one memory.
        rows: B.
    """
    if ids is None:
        return Start(*(t.expand(rows, *t.shape[1:]) for t in start))
    picked = (t[ids.clamp(min=0)] for t in start)
    return Start(*(t.masked_fill((ids < 0).view(-1, *[1] * (t.dim() - 1)), 0) for t in picked))


def put_before(conv: Tensor, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return a convolution's inputs with those of an earlier text before the first real token of
    each row.

    Args:
        conv: [B, C, K - 1].
        inputs: [B, C, T], zero at padding.
        mask: [B, T], 0 at padding; None: there is none.

    Returns:
        [B, C, K - 1 + T].
    """
    whole = torch.cat([conv, inputs], -1)
    if mask is None:
        return whole
    # The padding of a row and ``conv`` change places: the p zeros come first.
    t = torch.arange(whole.shape[-1], device=whole.device)
    last, padding = conv.shape[-1], (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    swapped = torch.where(t < padding, t + last, t - padding)
    index = torch.where(t < padding + last, swapped, t)
    return whole.gather(-1, index[:, None].expand(whole.shape))


def run_from(
    module: nn.Module,
    hidden_states: Tensor,
    start: Start,
    cache: Cache | None,
    mask: Tensor | None,
) -> Tensor:
    """Return what a Gated DeltaNet layer computes for a text that another one preceded.

    D_t = exp(g_t) S_{t-1},  S_t = D_t + k_t (beta_t (v_t - D_t^T k_t))^T,  o_t = S_t^T q_t Dk^-0.5

    with S_0 and the convolution's first inputs from ``start``. Padding leaves both as they are.

    Args:
        module: transformers' layer.
        hidden_states: [B, T, H].
        start: of each row; ``start.state`` in any floating dtype.
        cache: takes over what the layer keeps of the text; None: nothing is kept.
        mask: [B, T], 0 at padding; None: there is none.

    Returns:
        [B, T, H].

    Source: Gated Delta Networks (arXiv 2412.06464); the steps are those of transformers' Qwen3.5.
    """
    x = hidden_states if mask is None else hidden_states * mask[:, :, None].to(hidden_states.dtype)
    rows, tokens, _ = x.shape
    inputs = module.in_proj_qkv(x).transpose(1, 2)
    conv = put_before(start.conv.to(inputs.dtype), inputs, mask)
    weight = module.conv1d.weight
    mixed = F.conv1d(conv.to(weight.dtype), weight, groups=weight.shape[0])
    mixed = ACT2FN[module.activation](mixed).to(inputs.dtype)
    sizes = [module.key_dim, module.key_dim, module.value_dim]
    query, key, value = mixed.transpose(1, 2).split(sizes, -1)
    # Each head of queries and keys serves a group of value heads.
    group = module.num_v_heads // module.num_k_heads
    query, key = (
        t.reshape(rows, tokens, -1, module.head_k_dim).repeat_interleave(group, 2)
        for t in (query, key)
    )
    beta = module.in_proj_b(x).sigmoid()
    step = F.softplus(module.in_proj_a(x).float() + module.dt_bias)
    g = -module.A_log.float().exp() * step
    if mask is not None:
        # A state of zero is the same whatever decays it; this one is not.
        padding = mask[:, :, None] == 0
        beta, g = beta.masked_fill(padding, 0), g.masked_fill(padding, 0)
    y, state = torch_chunk_gated_delta_rule(
        query,
        key,
        value.reshape(rows, tokens, -1, module.head_v_dim),
        g=g,
        beta=beta,
        initial_state=start.state,
        output_final_state=cache is not None,
        use_qk_l2norm_in_kernel=True,
    )
    if cache is not None:
        _keep(module, cache, conv, state)
    gate = module.in_proj_z(x).reshape(-1, module.head_v_dim)
    y = module.norm(y.reshape(-1, module.head_v_dim), gate)
    return module.out_proj(y.reshape(rows, tokens, -1))


def _keep(module: nn.Module, cache: Cache, conv: Tensor, state: Tensor) -> None:
    index, size = module.layer_idx, module.conv_kernel_size
    if has_begun(module, cache):
        cache.layers[index].conv_states[0].copy_(conv[..., -size:])
    else:
        cache.update_conv_state(conv, index, conv_kernel_size=size)
    cache.update_recurrent_state(state, index)


def has_begun(module: nn.Module, cache: Cache | None) -> bool:
    """Return whether a cache holds something of a recurrent layer."""
    return cache is not None and bool(cache.has_previous_state(module.layer_idx))


def kept_in(module: nn.Module, cache: Cache) -> Start:
    """Return what a cache holds of a recurrent layer."""
    layer = cache.layers[module.layer_idx]
    return Start(
        layer.recurrent_states[0], layer.conv_states[0][..., 1 - module.conv_kernel_size :]
    )
