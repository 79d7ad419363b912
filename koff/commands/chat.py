"""Talk to a saved model, or to a server of `koff serve`, with one memory."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import asker
from ..storage.saved_folder import open_saved
from .saved import check_saved, pick_device, saved_memories

Messages = list[dict[str, str]]
Answer = Callable[[Messages], Iterator[str]]


def talk(answer: Answer) -> None:
    """Read lines and print answers until the input ends; the conversation is kept.

    Args:
        answer: of ``with_folder`` or ``with_server``.
    """
    messages: Messages = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        parts = []
        for part in answer(messages):
            parts.append(part)
            print(part, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": "".join(parts)})


def with_folder(
    directory: str | Path, memory: str | None, max_new_tokens: int, device: str | None = None
) -> Answer:
    """Return what answers with a saved model in this process, greedily.

    Args:
        directory: of the saved model, or its id on the hub.
        memory: its name, or None.
        max_new_tokens: at most so many tokens an answer.
        device: where to run; None: as ``pick_device`` finds it.

    Raises:
        FileNotFoundError: no saved model. KeyError: an unknown memory. ValueError: a tokenizer
            without a chat template.
    """
    directory = check_saved(directory)
    names = saved_memories(directory)
    if memory is not None and memory not in names:
        raise KeyError(
            f"{asker()}: the memory must be one of {list(names)}, got {memory!r}; correct --memory"
        )

    import torch
    from transformers.utils import logging

    from ..storage.save_load import load

    logging.disable_progress_bar()
    tokenizer = open_saved(directory).load_tokenizer()
    if not tokenizer.chat_template:
        raise ValueError(
            f"{asker()}: the tokenizer must have a chat template, got one without; use `koff "
            "generate`, or the tokenizer of a model that was taught to chat"
        )
    model = load(directory, device=pick_device(device))

    def answer(messages: Messages) -> Iterator[str]:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.no_grad():
            output = model.generate(
                **ids,
                memory=memory,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        yield tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def with_server(url: str, memory: str | None, max_new_tokens: int) -> Answer:
    """Return what answers through an OpenAI-compatible server, as its text comes.

    Args:
        url: of `koff serve`, with or without "/v1".
        memory: its name; None: the backbone.
        max_new_tokens: at most so many tokens an answer.
    """
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    settings = {"model": memory or "backbone", "max_tokens": max_new_tokens, "temperature": 0}

    def answer(messages: Messages) -> Iterator[str]:
        body = json.dumps({**settings, "messages": messages, "stream": True}).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as lines:
                for line in lines:
                    text = line.decode().removeprefix("data: ").strip()
                    if text.startswith("{"):
                        yield _delta(json.loads(text))
        except urllib.error.HTTPError as error:
            raise ValueError(f"{asker()}: {_message(error)}") from None
        except OSError as error:
            raise ValueError(
                f"{asker()}: {url} must be a server of `koff serve`, got {error}; start it, or "
                "correct the address"
            ) from None

    return answer


def _delta(event: dict[str, Any]) -> str:
    """The new text in one event of a stream."""
    if "error" in event:
        raise ValueError(f"{asker()}: {event['error'].get('message')}")
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says of a request that it refused."""
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return str(error)
