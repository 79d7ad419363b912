"""What koff has always made of documents: its blocks and the order of a mixture, bit for bit.

The digests were written down with koff 0.1, which read everything into memory. A run that is
resumed, or repeated by a later version, must see the same rows.
"""

import hashlib
import json

import pytest
import torch
from support.documents import KINDS, chatting_tokenizer, write

from koff.data.blocks import pack
from koff.data.sources import load_documents
from koff.data.stream import StreamedBlocks
from koff.training.schedule import Mixture, MixtureSampler, Source

SIZE = 16
COUNT = 1100  # more than two calls of the tokenizer
DIGESTS = {
    "text": "6de01200cb6cebbc",
    "template": "0caa1cc850c7b753",
    "completion": "f715b11e5e3cc6a5",
    "chat": "c468442cabf85515",
    "ids": "5b0c1bebd1342d64",
    "labelled": "522caac36c8bf4ba",
    "mixed": "2c478b8f242dbee8",
}
ORDER = "897259287408a16d"


@pytest.fixture(scope="module")
def tokenizer():
    return chatting_tokenizer()


def digest(packed):
    """Of everything that a block is, and of the statistics."""
    facts = [packed.num_documents, packed.num_tokens, round(packed.tokens_per_byte, 12)]
    hashed = hashlib.sha256(json.dumps(facts).encode())
    for tensor in (packed.blocks, packed.labelled, packed.lengths, packed.labels(slice(None))):
        assert tensor.dtype in (torch.int64, torch.bool)
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_koff_0_1(kind, tokenizer, tmp_path):
    source = write(kind, tmp_path, COUNT)
    in_memory, mapped = (pack(d, tokenizer, SIZE) for d in (load_documents(source), source))
    assert digest(in_memory) == digest(mapped) == DIGESTS[kind]
    # A stream gives the same rows, and after the last one the first again.
    stream = StreamedBlocks(write(kind, tmp_path, COUNT, streaming=True), tokenizer, SIZE)
    for number in range(len(mapped) + 3):
        ids, labels, _ = stream.row(number)
        again = number % len(mapped)
        assert torch.equal(ids, mapped.blocks[again]) and torch.equal(labels, mapped.labels(again))
    assert torch.equal(stream.opening(50), mapped.opening(50))


def test_the_order_of_a_mixture_is_that_of_koff_0_1(tokenizer, tmp_path):
    rows = {k: pack(write(k, tmp_path, 60), tokenizer, SIZE) for k in KINDS}
    domains = [Source(k, rows[k], i) for i, k in enumerate(("text", "chat", "labelled"))]
    general = [Source(k, rows[k]) for k in ("mixed", "ids")]
    orders = []
    for batching in (True, False):
        mix = Mixture(domains, general, [0.7, 0.3], 3, 4, batching, 5, no_memory=0.3)
        orders += list(MixtureSampler(mix, 6, 20, 2, ranks=2, gate_steps=10))
    assert hashlib.sha256(json.dumps(orders).encode()).hexdigest()[:16] == ORDER
