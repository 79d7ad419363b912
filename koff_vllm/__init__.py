"""koff's memories in vLLM: LoRA and learned keys and values, chosen request by request.

``koff serve`` uses it. Offline:

    llm = LLM(**koff_vllm.options("out"))
    llm.generate(prompts, sampling, lora_request=koff_vllm.memory("out", "fr"))

vLLM finds it by an entry point (``vllm.general_plugins``) and calls ``register`` in each of its
processes; it changes nothing for a model that koff did not save. It imports neither koff nor peft:
vLLM wants another transformers than koff does.

    saved.py      a saved folder, and a memory laid out for vLLM
    configs.py    backbones whose layers differ in width: their configs,
    models.py     and vLLM's models with such layers (qwen3_5.py, transformers_models.py: of
                  families that need more)
    connector.py  learned keys and values on their way into vLLM's cache
    plugin.py     what of vLLM is hooked, and when
    requests.py   what a request with a memory must be
    samples.py    what koff goes on with, for a server to compare with
    server.py     memories that come, go and change while a server runs
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plugin import register
from .saved import LINEARS, SavedModel

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

__all__ = ["memory", "options", "register"]

# Ranks that vLLM makes room for (``vllm.config.lora.MaxLoRARanks``).
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Room in vLLM's buffers for memories that one batch uses at the same time; each holds one LoRA of
# the largest rank for every layer. The rest waits in the host's memory.
_AT_ONCE = 8
_MORE = 16  # memories that may come while a server runs before the host's memory forgets any


def options(directory: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the arguments that a saved model needs: ``LLM(**koff_vllm.options("out"))``.

    Any of them may be overridden (``max_loras``: memories of one batch; ``max_cpu_loras``: memories
    kept in the host's memory; ``max_lora_rank``), and all others of vLLM added.

    Args:
        directory: that ``koff.save`` wrote.
        verify: compare the hashes of backbone and tokenizer with koff.json.

    Returns:
        Keyword arguments of ``vllm.LLM`` and ``AsyncEngineArgs``.

    Raises:
        FileNotFoundError, ValueError: no saved model, or a damaged one.
    """
    saved = SavedModel(directory)
    saved.check_family()
    if verify:
        saved.verify()
    ranks = [saved.rank(name) for name in saved.memories]
    largest = max([16, *ranks])
    if largest > _RANKS[-1]:
        raise ValueError(
            f"koff_vllm: vLLM takes LoRA up to rank {_RANKS[-1]}, got {largest}; retrain the memory"
        )
    at_once = min(max(len(ranks), 1), _AT_ONCE)
    found = {
        "model": str(saved.path.absolute()),
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= largest),
        "max_loras": at_once,
        "max_cpu_loras": max(len(ranks), at_once) + _MORE,
        # No room for LoRA on embedding and head, which no memory has.
        "lora_target_modules": list(LINEARS),
    }
    if not saved.is_recurrent():
        found["kv_transfer_config"] = {
            "kv_connector": "MemoryConnector",
            "kv_connector_module_path": "koff_vllm.connector",
            "kv_role": "kv_consumer",
            # Recomputing would be to take placeholders for text.
            "kv_load_failure_policy": "fail",
        }
    return found


def memory(directory: str | Path, name: str | None) -> LoRARequest | None:
    """Return a memory as ``llm.generate(..., lora_request=)`` takes it.

    Args:
        directory: that ``koff.save`` wrote.
        name: of the memory; None: no memory.

    Returns:
        A request for exactly this content: if the memory is trained again, ask again.

    Raises:
        KeyError, FileNotFoundError, ValueError: no such memory, or a damaged one.
    """
    if name is None:
        return None
    from vllm.lora.request import LoRARequest

    staged, path = SavedModel(directory).stage(name)
    return LoRARequest(staged.label, staged.lora_id, str(path))
