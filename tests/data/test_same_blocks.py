"""What koff has always made of documents: its blocks and the order of a mixture, bit for bit.

The digests were written down with koff 0.1, which read everything into memory. A run that is
resumed, or repeated by a later version, must see the same rows.
"""

import hashlib
import json
import random

import pytest
import torch
from support.character_tokenizer import make_tokenizer

from koff.data.blocks import pack
from koff.data.sources import Completion, DataSource, load_documents
from koff.training.schedule import Mixture, MixtureSampler, Source

SIZE = 16
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


# Kind of the records, field, and what koff 0.1 made of them.
KINDS = {
    "text": (lambda rng: {"text": words(rng)}, "text", "6de01200cb6cebbc"),
    "template": (lambda rng: {"q": words(rng), "n": rng.random()}, "{q} {n}", "0caa1cc850c7b753"),
    "completion": (
        lambda rng: {"q": words(rng, 9), "a": words(rng, 9)},
        Completion("q", "a"),
        "f715b11e5e3cc6a5",
    ),
    "chat": (chat, "text", "c468442cabf85515"),
    "ids": (lambda rng: {"input_ids": ids(rng)}, "text", "5b0c1bebd1342d64"),
    "labelled": (labelled, "text", "522caac36c8bf4ba"),
    "mixed": (mixed, "text", "2c478b8f242dbee8"),
}
ORDER = "897259287408a16d"


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer(bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def digest(packed):
    """Of everything that a block is, and of the statistics."""
    facts = [packed.num_documents, packed.num_tokens, round(packed.tokens_per_byte, 12)]
    hashed = hashlib.sha256(json.dumps(facts).encode())
    for tensor in (packed.blocks, packed.labelled, packed.lengths, packed.labels(slice(None))):
        assert tensor.dtype in (torch.int64, torch.bool)
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def source(kind, folder, count=1100):  # more than two calls of the tokenizer
    make, field, _ = KINDS[kind]
    rng = random.Random(kind)
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(count)), "utf-8")
    return DataSource(path=path, field=field)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_koff_0_1(kind, tokenizer, tmp_path):
    assert digest(pack(load_documents(source(kind, tmp_path)), tokenizer, SIZE)) == KINDS[kind][2]


def test_the_order_of_a_mixture_is_that_of_koff_0_1(tokenizer, tmp_path):
    rows = {k: pack(load_documents(source(k, tmp_path, 60)), tokenizer, SIZE) for k in KINDS}
    domains = [Source(k, rows[k], i) for i, k in enumerate(("text", "chat", "labelled"))]
    general = [Source(k, rows[k]) for k in ("mixed", "ids")]
    orders = []
    for batching in (True, False):
        mix = Mixture(domains, general, [0.7, 0.3], 3, 4, batching, 5, no_memory=0.3)
        orders += list(MixtureSampler(mix, 6, 20, 2, ranks=2, gate_steps=10))
    assert hashlib.sha256(json.dumps(orders).encode()).hexdigest()[:16] == ORDER
