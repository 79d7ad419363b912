"""What a document is: a text, token ids, a chat, or a prompt with its completion; and which part of
it counts.

Losses and perplexities are means over the tokens that count. All of a text does. Of a chat only the
assistant's turns do, of a prompt with its completion only the completion, and of token ids with
labels those whose label is not -100: what comes before them is given, and never to be written.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import asker

# What transformers, PEFT and TRL write for a token that no loss counts.
IGNORED = -100

# The columns that say what a record is. Token ids come first where there are others too: they are
# what somebody made of those.
FORMS = (("input_ids",), ("text",), ("messages",), ("prompt", "completion"))

# Columns that TRL lays beside token ids, 1 at those that count.
_MASKS = ("completion_mask", "assistant_masks")

# As transformers looks for it: the part of a template that the model itself is to write.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Ids are at least 0; far beyond any vocabulary, a tokenizer cannot even decode one.
_MOST_ID = (1 << 31) - 1


@dataclass(frozen=True)
class Text:
    """A document that is still to be tokenised.

    Args:
        text: what it says.
        spans: first and one past the last of the characters that count, of each part; None: all
            tokens count, those around the text too.
        framed: whether BOS and EOS go around it; a chat template writes its own.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    framed: bool = True

    def parts(self) -> list[str]:
        """Return what counts of the text."""
        whole = ((0, len(self.text)),)
        return [
            self.text[first:end] for first, end in (whole if self.spans is None else self.spans)
        ]


@dataclass(frozen=True)
class Tokens:
    """A document of token ids.

    Args:
        ids: int64.
        labelled: 1 at the tokens that count; None: all do.
    """

    ids: array
    labelled: bytes | None = None


def check_ids(who: str, what: str, low: int, high: int, vocabulary: int) -> None:
    """Refuse token ids that a model has no embedding of.

    Args:
        who: asked, for the error.
        what: has these ids, for the error.
        low, high: the lowest and the highest of them.
        vocabulary: how many the model knows.

    Raises:
        ValueError: an id beyond the vocabulary.
    """
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{who}: {what} must have token ids in 0..{vocabulary - 1}, got {low}..{high}; use the "
            "model's own tokenizer"
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer, such as the name of one; None is none.

    Raises:
        TypeError: so.
    """
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(
            f"{asker()}: the tokenizer must be one of transformers, got {tokenizer!r}; load it "
            "with AutoTokenizer.from_pretrained"
        )


def form_of(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the columns that say what a record is; None if it has none of ``FORMS``.

    Raises:
        ValueError: a record of two kinds; the message says what it got, and the next step.
    """
    # Arrow, and so every data set of the hub, has null for a column that some record lacks.
    there = [form for form in FORMS if all(record.get(column) is not None for column in form)]
    if len(there) > 1 and there[0] != ("input_ids",):
        kinds = " and ".join("/".join(form) for form in there)
        raise ValueError(f"both {kinds}; leave all but one out")
    return there[0] if there else None


def read_document(document: Any, tokenizer: Any, place: str) -> Text | Tokens:
    """Return what a document says, and what of it counts.

    Args:
        document: a text, or a record with the columns of one of ``FORMS``.
        tokenizer: of the model, or None if documents are token ids.
        place: what to call the document in errors.

    Raises:
        TypeError, ValueError: a document of another kind, or one that contradicts itself.
    """
    if isinstance(document, str):
        return Text(_unicode(document, place))
    if not isinstance(document, Mapping):
        raise TypeError(
            f"pack: {place} must be a text or a record, got {type(document).__name__}; {_FORMS_ARE}"
        )
    try:
        form = form_of(document)
    except ValueError as error:
        raise ValueError(f"pack: {place} must be of one kind, got {error}") from None
    if form is None:
        raise TypeError(
            f"pack: {place} must be a text or a record of a known kind, got "
            f"{describe(document)}; {_FORMS_ARE}"
        )
    if form == ("input_ids",):
        return _tokens(document, place)
    if form == ("text",):
        return Text(_unicode(_text(document, "text", place), place))
    if form == ("messages",):
        return _chat(document, tokenizer, place)
    if isinstance(document["prompt"], list | tuple):
        return _completed_chat(document, tokenizer, place)
    prompt = _text(document, "prompt", place)
    whole = prompt + _text(document, "completion", place)
    return Text(_unicode(whole, place), spans=((len(prompt), len(whole)),))


_FORMS_ARE = (
    "write a text, {'text': ...}, {'prompt': ..., 'completion': ...}, {'messages': [...]} or "
    "{'input_ids': [...], 'labels': [...]}"
)


def describe(record: Mapping[str, Any]) -> str:
    """Say what columns a record has, for errors."""
    empty = sorted(str(name) for name, value in record.items() if value is None)
    said = f"a record with {sorted(map(str, record))}"
    return f"{said} and null in {empty}" if empty else said


def _text(record: Mapping[str, Any], column: str, place: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise TypeError(
            f"pack: {column!r} of {place} must be a text, got {type(value).__name__}; correct it"
        )
    return value


def _unicode(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate, as broken JSON escapes leave it
        raise ValueError(
            f"pack: {place} must be valid Unicode, got {error.reason} at character {error.start}; "
            "correct or remove it"
        ) from None
    return text


# ---- token ids ----


def _tokens(record: Mapping[str, Any], place: str) -> Tokens:
    """Return the token ids of a record without its padding, and which of them count."""
    ids = _integers(record["input_ids"], f"input_ids of {place}")
    if ids and not 0 <= min(ids) <= max(ids) <= _MOST_ID:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"pack: input_ids of {place} must be at least 0 and below 2^31, got {wrong}; "
            "-100 belongs into 'labels' alone"
        )
    columns = {
        name: _integers(record[name], f"{name} of {place}")
        for name in ("labels", "attention_mask", *_MASKS)
        if record.get(name) is not None
    }
    for name, values in columns.items():
        if len(values) != len(ids):
            raise ValueError(
                f"pack: {name} of {place} must have one entry per token, got {len(values)} for "
                f"{len(ids)}; tokenize it again"
            )
    labels = columns.get("labels", ids)
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (token, IGNORED):
            raise ValueError(
                f"pack: labels of {place} must be the tokens themselves or {IGNORED}, got {label} "
                f"where the token is {token} (position {position}); do not shift them, koff does"
            )
    masks = [columns[name] for name in _MASKS if name in columns]
    labelled = None
    if "labels" in columns or masks:
        rows = zip(labels, *masks, strict=True)
        labelled = bytes(label != IGNORED and all(rest) for label, *rest in rows)
    if "attention_mask" in columns:
        real = columns["attention_mask"]
        ids = array("q", itertools.compress(ids, real))
        labelled = None if labelled is None else bytes(itertools.compress(labelled, real))
    return Tokens(ids, labelled)


def _integers(values: Any, what: str) -> array:
    try:
        if isinstance(values, bytes | bytearray):  # an array would take them for its own memory
            raise TypeError
        return array("q", values)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"pack: {what} must be a list of whole numbers, got {str(values)[:40]}; tokenize it "
            "again"
        ) from None


# ---- chats ----


def _chat(record: Mapping[str, Any], tokenizer: Any, place: str) -> Text | Tokens:
    """Return a conversation as the tokenizer's template writes it; the assistant's turns count."""
    messages = _messages(record["messages"], f"messages of {place}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"pack: messages of {place} must have a turn of the assistant, got the roles "
            f"{[message['role'] for message in messages]}; nothing else counts"
        )
    template = _Template(tokenizer, record, place)
    if template.marks_generation:
        ids, masks = template.tokens(messages)
        return Tokens(ids, masks)
    whole, spans = template.text(messages), []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.text(messages[:turn], add_generation_prompt=True)
            after = template.text(messages[: turn + 1])
            spans.append(_span(whole, before, after, place))
    return Text(_unicode(whole, place), tuple(spans), framed=False)


def _completed_chat(record: Mapping[str, Any], tokenizer: Any, place: str) -> Text:
    """Return a conversation of which all that comes after the prompt's messages counts."""
    prompt, completion = (
        _messages(record[name], f"{name} of {place}") for name in ("prompt", "completion")
    )
    template = _Template(tokenizer, record, place)
    before = template.text(prompt, add_generation_prompt=True)
    whole = template.text([*prompt, *completion])
    return Text(_unicode(whole, place), (_span(whole, before, whole, place),), framed=False)


def _span(whole: str, before: str, after: str, place: str) -> tuple[int, int]:
    """Return where a turn stands: between what the template writes before it and with it."""
    if not (whole.startswith(after) and after.startswith(before)):
        # Some templates write a turn differently once others follow, without its reasoning for
        # one. Then nobody but the template can say where a turn begins and ends.
        raise ValueError(
            f"pack: the chat template must write the turns of {place} one after the other, got one "
            "that changes what it wrote before; use a template with {% generation %} around the "
            "assistant's turns, or give the last turn alone as 'completion' of a 'prompt'"
        )
    return len(before), len(after)


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    messages = value if isinstance(value, list | tuple) else ()
    if not messages or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str)
        for message in messages
    ):
        raise TypeError(
            f"pack: {what} must be a list of messages with 'role' and 'content', got "
            f"{str(value)[:60]}; convert it"
        )
    # Arrow gives every message all keys that some message has, and templates write its nulls out.
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


class _Template:
    """The tokenizer's chat template, with what a record says about its use.

    Args:
        tokenizer: with a chat template.
        record: may hold "tools" and "chat_template_kwargs", as TRL names them.
        place: of the record, for errors.
    """

    def __init__(self, tokenizer: Any, record: Mapping[str, Any], place: str):
        self.tokenizer, self.place = tokenizer, place
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"pack: the tokenizer must have a chat template to read {place}, got none; set "
                "tokenizer.chat_template, or give 'prompt' and 'completion' as texts"
            )
        self.settings = {"tools": record.get("tools"), **(record.get("chat_template_kwargs") or {})}
        chosen = tokenizer.get_chat_template(tools=self.settings["tools"])
        self.marks_generation = _GENERATION.search(chosen) is not None

    def text(self, messages: list[Mapping[str, Any]], **settings: Any) -> str:
        """Return what the template writes."""
        return self._apply(messages, tokenize=False, **settings)

    def tokens(self, messages: list[Mapping[str, Any]]) -> tuple[array, bytes]:
        """Return the tokens of what the template writes, and a mask of those it marks as the
        assistant's."""
        out = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        return array("q", out["input_ids"]), bytes(out["assistant_masks"])

    def _apply(self, messages: list[Mapping[str, Any]], **settings: Any) -> Any:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, **self.settings, **settings)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(
                f"pack: the chat template must be able to write {self.place}, got "
                f"{type(error).__name__}: {error}; correct the messages"
            ) from error
