"""What a request with a memory must be, and what stands in front of its text.

A memory's P learned keys take the positions 0..P-1, and the text follows at P, as in PEFT's
CARTRIDGE. In vLLM a position is a token's, so the engine (not its front end, which counts tokens
and shows them to people) puts P placeholders in front of the prompt; ``connector.py`` fills what
would have been computed for them. A placeholder repeats the prompt's own first token: penalties
look at which tokens a prompt has, and so see what they would without a memory.
"""

from __future__ import annotations

import copy
import uuid
from typing import TYPE_CHECKING, Any

from .saved import SavedModel, StagedMemory, is_inside_a_memory, staged_memory

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

CONNECTOR = ("MemoryConnector", "koff_vllm.connector")
_BACKBONES: dict[str, str | None] = {}


def backbone_of(model: str) -> str | None:
    """Return the sha256 of the backbone at a model's path as it was when first asked for: when its
    engine was made. None if koff did not save it."""
    if model not in _BACKBONES:
        try:
            _BACKBONES[model] = SavedModel(model).backbone_sha256
        except (OSError, ValueError):
            _BACKBONES[model] = None
    return _BACKBONES[model]


def memory_of(request: Any) -> StagedMemory | None:
    """Return the memory of a request of vLLM's; None if it has none of koff's."""
    lora = request.lora_request
    return None if lora is None else staged_memory(lora.lora_path)


def has_connector(config: VllmConfig) -> bool:
    """Whether learned keys have a way into this engine's cache."""
    transfer = config.kv_transfer_config
    named = transfer and (transfer.kv_connector, transfer.kv_connector_module_path)
    return named == CONNECTOR


def check_lora_has_room(config: VllmConfig, memory: StagedMemory) -> None:
    """Refuse a memory of whose LoRA this engine would leave a part out, and say nothing.

    Args:
        config: of the engine.
        memory: that a request asks for.

    Raises:
        ValueError: linear layers that ``lora_target_modules`` lacks.
    """
    room = config.lora_config.target_modules  # None: every layer
    missing = [] if room is None else sorted({*memory.linears} - {*room})
    if missing:
        raise ValueError(
            f"koff_vllm: lora_target_modules must have all linear layers of memory "
            f"{memory.label!r}, got none of {', '.join(missing)}; leave the option out"
        )


def check_request(config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse a request whose memory could not be served whole.

    Args:
        config: of the engine.
        request: before its placeholders.

    Raises:
        ValueError: what is missing.
    """
    if request.lora_request is None:
        return
    memory, name = memory_of(request), request.lora_request.lora_name
    if memory is None:
        if is_inside_a_memory(request.lora_request.lora_path):
            raise ValueError(
                f"koff_vllm: {name!r} must be served with its learned keys, got its LoRA alone "
                f"({request.lora_request.lora_path}); use `koff serve`, or koff_vllm.memory(OUT, "
                "NAME) instead of a LoRA's path"
            )
        return
    if memory.backbone_sha256 != backbone_of(config.model_config.model):
        raise ValueError(
            f"koff_vllm: memory {memory.label!r} must be served on its backbone, got another "
            f"model, {config.model_config.model}; give both from one folder"
        )
    check_lora_has_room(config, memory)
    if memory.num_tokens == 0:
        return
    if not has_connector(config):
        raise ValueError(
            f"koff_vllm: memory {memory.label!r} has learned keys, which need "
            "kv_transfer_config, got an engine without koff's; start it with `koff serve`, or "
            "LLM(**koff_vllm.options(OUT))"
        )
    sampling = request.sampling_params
    other = {
        "prompt_embeds": request.prompt_embeds is not None or request.prompt_token_ids is None,
        "streaming input": request.resumable,
        "pooling": sampling is None,
        "prompt_logprob_token_ids": getattr(sampling, "prompt_logprob_token_ids", None) is not None,
    }
    for what, asked in other.items():
        if asked:
            raise ValueError(
                f"koff_vllm: a request with learned keys must be text to go on from, got {what}; "
                "leave it out, or the memory"
            )
    tokens, limit = len(request.prompt_token_ids), config.model_config.max_model_len
    if memory.num_tokens + tokens >= limit:
        raise ValueError(
            f"koff_vllm: learned keys and prompt must leave room for a token in max_model_len "
            f"({limit}), got {memory.num_tokens} of memory {memory.label!r} and {tokens}; shorten "
            "the prompt, or raise --max-model-len"
        )


def with_placeholders(request: EngineCoreRequest) -> EngineCoreRequest:
    """Return a copy of a request as the engine computes it: P placeholders, then the prompt.

    Args:
        request: of a memory with learned keys. It stays as it is: in the process of an offline
            engine the front end holds it too.
    """
    ids = request.prompt_token_ids
    changed = copy.copy(request)
    changed.prompt_token_ids = [ids[0]] * memory_of(request).num_tokens + ids
    if request.sampling_params.skip_reading_prefix_cache:
        # Log-probabilities of the prompt are asked for, and vLLM leaves out the cache to compute
        # each token's: it would compute the placeholders as text. Instead the cache is read, but
        # under a salt of its own there is nothing in it but the learned keys.
        changed.sampling_params = request.sampling_params.clone()
        changed.sampling_params.skip_reading_prefix_cache = False
        changed.cache_salt = uuid.uuid4().hex
    return changed
