"""A koff model as lm-eval calls one: log-likelihoods and generation, under one memory or none.

Only this file and ``koff/commands/tasks.py`` need lm-eval (the extra ``koff[tasks]``).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from ..data.losses import Head, logits_in_pieces
from ..data.records import IGNORED
from ..model.head import measured
from .perplexity import check_sizes, evaluating

logger = logging.getLogger("koff")

_NEW_TOKENS = 256  # of an answer, where the task does not say; lm-eval's own number
_STOPS_WITHIN = 64  # tokens: no stop text of a task is longer


class KoffLM(TemplateLM):
    """A model with one memory for all requests.

    Texts are tokenized as in training: BOS first, where the tokenizer has one. What does not fit
    the model's positions beside the memory's learned keys is cut at its beginning, as lm-eval's own
    models do, and counted in a warning.

    Args:
        model: a koff model, or any causal LM of transformers.
        tokenizer: the model's.
        memory: name, or None; of a plain model None.
        batch_size: rows per forward.

    Raises:
        KeyError, TypeError, ValueError: an unknown memory, several at once, or no row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        memory: str | None = None,
        batch_size: int = 8,
    ):
        super().__init__()
        state = getattr(model, "koff", None)
        if memory is not None and not isinstance(memory, str):
            raise TypeError(
                f"KoffLM: memory must be one name or None, got {memory!r}; a task is measured with "
                "one memory at a time"
            )
        names = () if state is None else tuple(state.memory_names)
        if memory is not None and memory not in names:
            raise KeyError(
                f"KoffLM: memory must be one of {list(names)} or None, got {memory!r}; correct it"
            )
        prefix = 0
        if memory is not None:
            state.memories[memory].check_filled("KoffLM")
            prefix = state.memories[memory].length
        check_sizes(model, 1, batch_size, prefix=prefix)
        self.model, self.tokenizer = model, tokenizer
        self.memory, self.batch_size = memory, batch_size
        self._argument = {} if state is None else {"memory": memory}
        limit = getattr(model.config, "max_position_embeddings", None) or 2048
        self.max_length = limit - prefix
        self._device = next(model.parameters()).device

    # ---- tokens ----

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text, BOS first unless ``add_special_tokens`` is False."""
        # Added by hand, as everywhere in koff: many tokenizers add none, or EOS too.
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if add_special_tokens is False or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    # ---- log-likelihoods ----

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return log q(continuation | context) in nats, and whether greedy decoding gives it.

        Args:
            requests: (ignored, tokens of the context, tokens of the continuation).
        """
        rows = [context + continuation for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for row, (_, _, continuation) in zip(rows, requests, strict=True):
            if not len(continuation) < self.max_length or len(row) == len(continuation):
                raise ValueError(
                    "KoffLM: a continuation must have at least one token before it and fit "
                    f"{self.max_length} positions with it, got {len(continuation)} tokens after "
                    f"{len(row) - len(continuation)}; shorten it"
                )
        self._warn_of_cuts([len(row) for row in rows], self.max_length)
        # The longest first: rows of a batch are about as long, and too large a batch fails at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with evaluating(self.model), torch.inference_mode():
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                scored = self._score(
                    [rows[i][-self.max_length :] for i in batch],
                    [len(requests[i][2]) for i in batch],
                )
                for i, result in zip(batch, scored, strict=True):
                    found[i] = result
        return found

    def _score(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, greedy) of the last ``counts`` tokens of each row."""
        longest = max(map(len, rows))
        # Filled up behind: attention is causal, and recurrent layers go forward, so what stands
        # there reaches no token before it, and no mask is needed.
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, len(row) - count : len(row)] = ids[i, len(row) - count : len(row)]
        asked = labels[:, 1:] != IGNORED
        nats, greedy = measured(
            self.model,
            functools.partial(_nats_and_greedy, targets=labels[:, 1:][asked], asked=asked),
            input_ids=ids.to(self._device),
            use_cache=False,
            **self._argument,
        )
        of_rows = asked.sum(1).tolist()
        return [
            (-own.double().sum().item(), bool(right.all()))
            for own, right in zip(nats.split(of_rows), greedy.split(of_rows), strict=True)
        ]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in windows as long as the model bears."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                # A window and the token that it predicts last.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
        return found

    # ---- generation ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to the first stop text."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for key, members in groups.items():
            contexts = {i: self.tok_encode(requests[i].args[0]) for i in members}
            options, until = self._options(json.loads(key))
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"KoffLM: max_gen_toks must be below the {self.max_length} positions that are "
                    f"left, got {options['max_new_tokens']}; lower it"
                )
            self._warn_of_cuts([len(ids) for ids in contexts.values()], room)
            order = sorted(members, key=lambda i: -len(contexts[i]))
            with evaluating(self.model), torch.inference_mode():
                for first in range(0, len(order), self.batch_size):
                    batch = order[first : first + self.batch_size]
                    texts = self._generate([contexts[i][-room:] for i in batch], options, until)
                    for i, text in zip(batch, texts, strict=True):
                        found[i] = text
        return found

    def _options(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return a task's generation settings in transformers' words, and its stop texts."""
        until = asked.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        tokens = asked.pop("max_gen_toks", asked.pop("max_new_tokens", _NEW_TOKENS))
        asked.setdefault("do_sample", bool(asked.get("temperature")))
        if not asked["do_sample"]:  # transformers warns of what is not used
            asked = {name: v for name, v in asked.items() if name not in _OF_SAMPLING}
        return asked | {"max_new_tokens": int(tokens)}, until

    def _generate(
        self, rows: list[list[int]], options: dict[str, Any], until: list[str]
    ) -> list[str]:
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = self.eot_token_id if pad is None else pad
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):  # on the left: what is written follows the text
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        output = self.model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            pad_token_id=pad,
            stopping_criteria=[_Stops(self.tokenizer, until, longest)],
            **self._argument,
            **options,
        )
        texts = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [_before(text, until) for text in texts]

    def _warn_of_cuts(self, lengths: Iterable[int], most: int) -> None:
        cut = [length for length in lengths if length > most]
        if cut:
            logger.warning(
                "koff: %d texts of a task have more than the %d tokens there is room for (up to "
                "%d): they are cut at their beginning",
                len(cut),
                most,
                max(cut),
            )


def _nats_and_greedy(
    states: Tensor, head: Head | None, targets: Tensor, asked: Tensor
) -> tuple[Tensor, Tensor]:
    """Return of each token that is asked for its nats, and whether it is the most likely one, on
    the CPU.

    Args:
        states, head: as ``measured`` gives them.
        targets: int64 [n], the tokens.
        asked: bool [B, T - 1], at which positions of ``states`` they come next.
    """
    nats, greedy = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
    states, targets = states[:, :-1][asked.to(states.device)], targets.to(states.device)
    for rows, logits in logits_in_pieces(states, head):
        nats[rows] = F.cross_entropy(logits.float(), targets[rows], reduction="none").cpu()
        greedy[rows] = (logits.argmax(-1) == targets[rows]).cpu()
    return nats, greedy


_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class _Stops(StoppingCriteria):
    """Ends each row at a stop text, which may be written in several tokens.

    Args:
        tokenizer: of the model.
        until: the stop texts.
        start: position of the first new token.
    """

    def __init__(self, tokenizer: Any, until: list[str], start: int):
        self.tokenizer, self.until, self.start = tokenizer, until, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        new = input_ids[:, max(self.start, input_ids.shape[1] - _STOPS_WITHIN) :]
        texts = self.tokenizer.batch_decode(new) if self.until else [""] * len(new)
        done = [any(stop in text for stop in self.until if stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _before(text: str, until: list[str]) -> str:
    """Return the text before its first stop text."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
