"""Random documents of every kind, the same for the same seed."""

import json
import random
from pathlib import Path

from support.character_tokenizer import make_tokenizer

from koff.data.sources import Completion, DataSource

TEMPLATE = (
    "{% for m in messages %}{{ 'é' if m.role == 'assistant' else 'X' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}é{% endif %}"
)


def words(rng, most=40):
    return "".join(rng.choices("abcdefgh é", k=rng.randrange(1, most)))


def ids(rng, most=40):
    return [rng.randrange(3, 12) for _ in range(rng.randrange(1, most))]


def chat(rng):
    roles = ["user", "assistant"] * rng.randrange(1, 3)
    return {"messages": [{"role": role, "content": words(rng, 8)} for role in roles]}


def labelled(rng):
    tokens = ids(rng)
    return {"input_ids": tokens, "labels": [t if rng.random() < 0.5 else -100 for t in tokens]}


def mixed(rng):
    kinds = (
        lambda rng: {"text": words(rng)},
        chat,
        labelled,
        lambda rng: {"prompt": words(rng, 9), "completion": words(rng, 9)},
        lambda rng: {"input_ids": ids(rng)},
        lambda rng: {"text": " "},
    )
    return rng.choice(kinds)(rng)


# Kind of the records, and the field.
KINDS = {
    "text": (lambda rng: {"text": words(rng)}, "text"),
    "template": (lambda rng: {"q": words(rng), "n": rng.random()}, "{q} {n}"),
    "completion": (lambda rng: {"q": words(rng, 9), "a": words(rng, 9)}, Completion("q", "a")),
    "chat": (chat, "text"),
    "ids": (lambda rng: {"input_ids": ids(rng)}, "text"),
    "labelled": (labelled, "text"),
    "mixed": (mixed, "text"),
}


def write(kind: str, folder: Path, count: int, **changes) -> DataSource:
    """A file of so many records of a kind."""
    make, field = KINDS[kind]
    rng = random.Random(kind)
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(count)), "utf-8")
    return DataSource(path=path, field=field, **changes)


def chatting_tokenizer():
    """One token per character, and a template for chats."""
    made = make_tokenizer(bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made
