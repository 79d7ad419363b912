"""Memories that come, go and change while a server runs.

A request names a memory ("fr"), or exactly one version of it ("fr@0123456789ab"). Before vLLM looks
the name up, the folder is looked at: if its koff.json is another one, the adapters that the server
knows become those of the folder. vLLM's own way, a LoRA resolver, is asked for unknown names only,
so that a memory that was trained again would never be seen; and the switch that it wants lets every
client load and unload adapters.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from .requests import backbone_of, check_lora_has_room, has_connector
from .samples import VARIABLE, read_samples
from .saved import COMMITTED, MARKER, SavedModel, StagedMemory, staged_memory

logger = logging.getLogger("vllm.koff")


class ServedFolder:
    """The saved model that a server serves, and which of its memories vLLM knows.

    Args:
        models: vLLM's ``OpenAIServingModels``.
    """

    def __init__(self, models: Any):
        self.models = models
        self.path = models.model_config.model
        self.backbone_sha256 = backbone_of(self.path)
        self._seen: tuple[tuple[int, ...] | None, ...] | None = None
        self._lock = asyncio.Lock()
        # Name -> why it is not served; tried again when the folder changes.
        self.refused: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """What a request may ask for, without the names of single versions."""
        served = [model.name for model in self.models.base_model_paths]
        return served + [name for name in self.models.lora_requests if "@" not in name]

    async def refresh(self) -> None:
        """Have the server know the memories that the folder holds now, and no others."""
        if self.backbone_sha256 is None or self._seen == self._stamp():
            return
        async with self._lock:
            stamp = self._stamp()
            if self._seen == stamp:
                return
            try:
                saved = await asyncio.to_thread(SavedModel, self.path)
            except (OSError, ValueError) as error:
                # Whatever is served stays: its files are copies.
                logger.warning("%s", error)
                return
            if saved.backbone_sha256 != self.backbone_sha256:
                logger.warning(
                    "koff_vllm: %s holds another backbone than was loaded; its memories are not "
                    "served before a restart",
                    self.path,
                )
            else:
                await self._take(saved)
            self._seen = stamp

    async def _take(self, saved: SavedModel) -> None:
        known, wanted = self.models.lora_requests, {}
        self.refused = {}
        for name in saved.memories:
            try:
                staged, path = await asyncio.to_thread(saved.stage, name)
                self._check(staged)
                request = known.get(staged.label) or await self._load(staged, path)
                wanted |= {name: request, staged.label: request}
            except Exception as error:  # of this memory; the others are served
                self.refused[name] = " ".join(str(error).split())
                logger.error("koff_vllm: memory %r is not served: %s", name, error)
        # Adapters that the user named on the command line stay; a label in a path is ours.
        mine = {name for name, request in known.items() if request.lora_name.count("@")}
        for name in mine - wanted.keys():
            del known[name]
        known.update(wanted)

    def _check(self, staged: StagedMemory) -> None:
        limit = self.models.model_config.max_model_len
        if staged.num_tokens + 1 >= limit:
            raise ValueError(
                f"koff_vllm: max_model_len must be more than {staged.num_tokens + 1}, the learned "
                f"keys of memory {staged.label!r} and one token of text, got {limit}; raise "
                "--max-model-len"
            )
        config = self.models.engine_client.vllm_config
        check_lora_has_room(config, staged)
        if staged.num_tokens and not has_connector(config):
            raise ValueError(
                f"koff_vllm: memory {staged.label!r} has learned keys, which need "
                "--kv-transfer-config, got a server without koff's; start it with `koff serve`"
            )

    async def _load(self, staged: StagedMemory, path: Path) -> Any:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(staged.label, staged.lora_id, str(path))
        await self.models.engine_client.add_lora(request)
        return request

    def _stamp(self) -> tuple[tuple[int, ...] | None, ...]:
        """What changes when koff.json is replaced, in its place or on the way there."""
        path = Path(self.path)
        top = path.parent if path.name == COMMITTED else path
        found = []
        for folder in (top, top / COMMITTED):
            try:
                stat = (folder / MARKER).stat()
                found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
            except OSError:
                found.append(None)
        return tuple(found)


def _folder(models: Any) -> ServedFolder:
    if not hasattr(models, "koff_folder"):
        models.koff_folder = ServedFolder(models)
    return models.koff_folder


async def check_samples(folder: ServedFolder) -> None:
    """Compare what the engine goes on with after a short prompt with what koff does.

    Args:
        folder: whose memories are loaded.

    Raises:
        ValueError: a difference beyond rounding.
    """
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    models = folder.models
    samples = read_samples(Path(os.environ[VARIABLE]))
    dtype = str(models.model_config.dtype).removeprefix("torch.")
    for name, sample in samples.items():
        request = models.lora_requests.get(name)
        if name and request is None:  # it came or went since
            continue
        memory = request and staged_memory(request.lora_path)
        length = len(sample.prompt) + len(sample.ids) + (memory.num_tokens if memory else 0)
        if length > models.model_config.max_model_len:
            continue
        greedy = SamplingParams(
            temperature=0, max_tokens=len(sample.ids), logprobs=0, ignore_eos=True, detokenize=False
        )
        ask = models.engine_client.generate(
            tokens_input(sample.prompt), greedy, f"koff-sample-{name}", lora_request=request
        )
        async for answer in ask:
            (got,) = answer.outputs
        ids = list(got.token_ids)
        logprobs = [each[token].logprob for each, token in zip(got.logprobs, ids, strict=True)]
        difference = sample.difference(ids, logprobs, sample.close(dtype))
        if difference:
            raise ValueError(
                f"koff_vllm: {name or 'the backbone'} must go on as koff does, got a difference: "
                f"{difference}; report it, and see docs/serving.md for what was tested "
                "(--no-check serves nevertheless)"
            )
    logger.info("koff_vllm: %d samples agree with koff", len(samples))


# ---- hooks: each takes the method of vLLM it stands before ----


async def init_static_loras(init: Callable[..., Any], self: Any) -> None:
    """Before a server takes requests: every memory is loaded, or none is and it stops."""
    await init(self)
    folder = _folder(self)
    await folder.refresh()
    if folder.refused:
        raise ValueError("; ".join(folder.refused.values()))
    if folder.backbone_sha256 is not None and VARIABLE in os.environ:
        await check_samples(folder)


async def show_available_models(show: Callable[..., Any], self: Any) -> Any:
    """``/v1/models``: the memories of now, each under the name that a request gives."""
    await _folder(self).refresh()
    listed = await show(self)
    for card, name in zip(reversed(listed.data), reversed(self.lora_requests), strict=False):
        card.id = name
    return listed


async def check_model(check: Callable[..., Any], self: Any, request: Any) -> Any:
    """Before a request's model is looked up; None if it is served, else vLLM's error."""
    if not hasattr(self.models, "engine_client"):  # a front end without an engine
        return await check(self, request)
    folder = _folder(self.models)
    await folder.refresh()
    found = await check(self, request)
    if found is None or folder.backbone_sha256 is None:
        return found
    why = folder.refused.get(request.model)
    message = f"the model must be one of {', '.join(folder.names)}, got {request.model!r}"
    return self.create_error_response(
        message=why or message,
        err_type="BadRequestError" if why else "NotFoundError",
        status_code=HTTPStatus.BAD_REQUEST if why else HTTPStatus.NOT_FOUND,
        param="model",
    )
