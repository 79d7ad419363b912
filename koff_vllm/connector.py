"""Learned keys and values on their way into vLLM's cache, as a KV connector.

The scheduler half says of a request with P learned keys that its first P tokens are computed
elsewhere; the worker half writes them into the blocks that these tokens were given, by the
attention backend's own function, before the forward that reads them. vLLM hashes a LoRA's name and
path into the keys of its blocks, so requests of one memory share these blocks and no others do.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from .plugin import check_hooks
from .requests import memory_of
from .saved import KV_FILE, staged_memory

logger = init_logger(__name__)


@dataclass
class Load:
    """Learned keys that one request needs in its blocks.

    Args:
        lora_path: of the memory.
        start: the first token that is not in the cache; those from here to P are written.
        block_ids: of the request's tokens from 0.
    """

    lora_path: str
    start: int
    block_ids: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """What the worker has to write before the next forward."""

    loads: list[Load] = field(default_factory=list)


class MemoryConnector(KVConnectorBase_V1):
    """Puts the learned keys and values of memories before the text of requests."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        if self._kv_transfer_config.kv_load_failure_policy != "fail":
            raise ValueError(
                "koff_vllm: kv_load_failure_policy must be 'fail', got "
                f"{self._kv_transfer_config.kv_load_failure_policy!r}: recomputing would take "
                "placeholders for text; leave it out"
            )
        self._block_size = vllm_config.cache_config.block_size
        if role is KVConnectorRole.SCHEDULER:
            check_hooks("vllm.v1.engine.core", "vllm.v1.core.sched.scheduler")
            self._prefixes: dict[str, int] = {}  # request -> P
            self._loads: list[Load] = []
        else:
            self._layers: dict[int, Attention] = {}
            self._caches: OrderedDict[str, Tensor] = OrderedDict()
            self._failed: set[int] = set()
            if current_platform.is_cpu():
                _leave_rows_without_lora_alone()

    # ---- scheduler ----

    def on_new_request(self, request: Any) -> None:
        """Remember how many tokens of a request are placeholders."""
        memory = memory_of(request)
        if memory is not None and memory.num_tokens:
            got = getattr(request, "koff_prefix", 0)
            if got != memory.num_tokens:
                raise RuntimeError(
                    f"koff_vllm: a request of memory {memory.label!r} must come with "
                    f"{memory.num_tokens} placeholders, got {got}; report this"
                )
            self._prefixes[request.request_id] = memory.num_tokens

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many learned keys are not in the cache yet, and that they are written at once
        and not between steps."""
        prefix = self._prefixes.get(request.request_id, 0)
        return max(prefix - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what is to be written into the blocks that a request was given."""
        prefix = self._prefixes.get(request.request_id, 0)
        if not prefix:
            return
        if num_external_tokens:
            (block_ids,) = blocks.get_block_ids()
            path = request.lora_request.lora_path
            self._loads.append(Load(path, prefix - num_external_tokens, list(block_ids)))
        stats = request.prefill_stats
        if stats is not None and request.num_preemptions == 0:
            # What people read as "cached tokens" are tokens of their text.
            stats.set(
                num_prompt_tokens=request.num_prompt_tokens - prefix,
                num_local_cached_tokens=max(stats.num_local_cached_tokens - prefix, 0),
                num_external_cached_tokens=0,
            )

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """Hand over what is to be written before this step.

        Raises:
            RuntimeError: a request would compute its placeholders as if they were text.
        """
        cached = scheduler_output.scheduled_cached_reqs
        new = scheduler_output.scheduled_new_reqs
        starts = {request.req_id: request.num_computed_tokens for request in new}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, prefix in self._prefixes.items():
            if starts.get(name, prefix) < prefix:
                raise RuntimeError(
                    f"koff_vllm: request {name} must start behind its {prefix} learned keys, "
                    f"got token {starts[name]}; report this"
                )
        loads, self._loads = self._loads, []
        return Loads(loads)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Forget a request."""
        self._prefixes.pop(request.request_id, None)
        return False, None

    # ---- worker ----

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Find the attention layers by their numbers."""
        known = self._vllm_config.compilation_config.static_forward_context
        for name in kv_caches:
            layer = known[name]
            if not isinstance(layer, Attention) or not hasattr(layer.impl, "do_kv_cache_update"):
                raise ValueError(
                    f"koff_vllm: {name} must be attention whose backend writes its cache by "
                    f"do_kv_cache_update, got {type(layer.impl).__name__}; choose another backend"
                )
            self._layers[extract_layer_index(name)] = layer

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write learned keys and values into the blocks of their requests."""
        for load in self._get_connector_metadata().loads:
            try:
                self._write(load)
            except Exception:
                # Only this memory's requests fail; the engine goes on.
                logger.exception("koff_vllm: the learned keys of %s did not load", load.lora_path)
                self._failed.update(load.block_ids[load.start // self._block_size :])

    def _write(self, load: Load) -> None:
        cache = self._cache(load.lora_path)
        positions = torch.arange(load.start, cache.shape[2])
        blocks = torch.tensor(load.block_ids)[positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        slots = slots.to(cache.device)
        for index, layer in self._layers.items():
            key, value = cache[index, :, load.start :].unbind()
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def _cache(self, lora_path: str) -> Tensor:
        """A memory's keys and values [L, 2, P, heads of this rank, D] on this worker's device."""
        if lora_path in self._caches:
            self._caches.move_to_end(lora_path)
            return self._caches[lora_path]
        from safetensors.torch import load_file

        memory = staged_memory(lora_path)
        (flat,) = load_file(str(Path(lora_path).parent / KV_FILE)).values()
        shape = (memory.num_tokens, memory.num_layers, 2, memory.num_heads, memory.head_dim)
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        heads = max(memory.num_heads // ranks, 1)  # fewer heads than ranks: some have the same one
        first = rank * memory.num_heads // ranks
        cache = flat.view(shape).permute(1, 2, 0, 3, 4)[..., first : first + heads, :]
        config = self._vllm_config.model_config
        device = next(iter(self._layers.values())).kv_cache.device
        cache = cache.to(device=device, dtype=config.dtype).contiguous()
        self._caches[lora_path] = cache
        # As many as vLLM keeps adapters.
        while len(self._caches) > self._vllm_config.lora_config.max_cpu_loras:
            self._caches.popitem(last=False)
        return cache

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that hold no learned keys though they should; their requests fail."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is on its way any more when a forward starts."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def _leave_rows_without_lora_alone() -> None:
    """Mend vLLM's LoRA on the CPU: it indexes by -1 where a row has none, and so gives it the
    last slot's (vLLM pull requests 48421 and 49656). What such a row takes through A becomes 0."""
    from vllm.lora.punica_wrapper import punica_cpu

    if hasattr(punica_cpu.bgmv_shrink, "_koff_vllm"):
        return
    bgmv, sgmv = punica_cpu.bgmv_shrink, punica_cpu.sgmv_shrink

    def bgmv_shrink(
        inputs: Tensor, weights: Tensor, out: Tensor, slots: Tensor, scaling: float = 1.0
    ) -> None:
        bgmv(inputs, weights, out, slots, scaling)
        out.masked_fill_((slots < 0).unsqueeze(1), 0)

    def sgmv_shrink(
        inputs: Tensor,
        weights: Tensor,
        out: Tensor,
        starts: Tensor,
        lengths: Tensor,
        slots: Tensor,
        *rest: Any,
    ) -> None:
        sgmv(inputs, weights, out, starts, lengths, slots, *rest)
        out.masked_fill_((torch.repeat_interleave(slots, lengths) < 0).unsqueeze(1), 0)

    bgmv_shrink._koff_vllm = True
    punica_cpu.bgmv_shrink, punica_cpu.sgmv_shrink = bgmv_shrink, sgmv_shrink
