"""Streams: bookmarks from which reading goes on, exactly and without what lies before."""

import dataclasses
import json

import datasets
import pytest
import torch
from support.documents import KINDS, chatting_tokenizer, write
from torch.utils.data import DataLoader

from koff.data.blocks import pack
from koff.data.sources import DataSource
from koff.data.stream import StreamedBlocks

SIZE = 16


@pytest.fixture(scope="module")
def tokenizer():
    return chatting_tokenizer()


def rows(stream, first, count):
    return [stream.row(number)[:2] for number in range(first, first + count)]


def same(some, others):
    return all(
        torch.equal(a, b)
        for s, o in zip(some, others, strict=True)
        for a, b in zip(s, o, strict=True)
    )


def resumed(stream, bookmark):
    """Another process's stream that reads on from a bookmark of ``stream``."""
    other = StreamedBlocks(stream.source, stream.tokenizer, stream.block_size)
    other.resume(json.loads(bookmark))
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_can_be_come_back_to(kind, tokenizer, tmp_path):
    stream = StreamedBlocks(write(kind, tmp_path, 70, streaming=True), tokenizer, SIZE)
    number_of_rows = len(pack(write(kind, tmp_path, 70), tokenizer, SIZE))
    expected = rows(stream, 0, number_of_rows + 9)
    for number in range(0, number_of_rows + 3, 2):
        once = resumed(stream, stream.row(number)[2])
        assert same(rows(once, number, 4), expected[number : number + 4])
        twice = resumed(once, once.row(number + 3)[2])  # and on again from there
        assert same(rows(twice, number + 3, 3), expected[number + 3 : number + 6])
    # Backwards too, to before where it was resumed.
    assert same(rows(twice, 0, 3), expected[:3])


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_other_files_can_be_come_back_to(suffix, tokenizer, tmp_path):
    for part in range(2):
        data = datasets.Dataset.from_dict({"text": [f"abc {'d' * i} é" for i in range(part, 40)]})
        if suffix == "arrow":
            data.save_to_disk(tmp_path / f"part-{part}")
        else:
            options = {"batch_size": 7} if suffix == "parquet" else {}
            getattr(data, f"to_{suffix}")(tmp_path / f"part-{part}.{suffix}", **options)
    source = DataSource(path=tmp_path, streaming=True, skip=3, limit=60)
    stream = StreamedBlocks(source, tokenizer, SIZE)
    packed = pack(dataclasses.replace(source, streaming=False), tokenizer, SIZE)
    expected = rows(stream, 0, len(packed))
    assert same(expected, [(packed.blocks[i], packed.labels(i)) for i in range(len(packed))])
    for number in range(0, len(packed) - 7, 5):
        once = resumed(stream, stream.row(number)[2])
        twice = resumed(once, once.row(number + 3)[2])
        assert same(rows(twice, number + 3, 4), expected[number + 3 : number + 7])


def test_what_lies_before_a_bookmark_is_not_read(tokenizer, tmp_path):
    source = write("text", tmp_path, 400, streaming=True)
    stream = StreamedBlocks(source, tokenizer, SIZE)
    expected = rows(stream, 300, 3)
    bookmark = stream.row(300)[2]
    before = json.loads(bookmark)[1][1]
    data = source.path.read_bytes()
    assert before > 1000
    source.path.write_bytes(b"#" * (before - 1) + b"\n" + data[before:])
    assert same(rows(resumed(stream, bookmark), 300, 3), expected)
    with pytest.raises(ValueError, match="line 1 must be valid JSON"):
        StreamedBlocks(source, tokenizer, SIZE).row(0)


def test_workers_read_each_for_itself(tokenizer, tmp_path):
    """They are forked from a process that has the file open already."""
    stream = StreamedBlocks(write("mixed", tmp_path, 300, streaming=True), tokenizer, SIZE)
    expected = rows(stream, 0, 80)

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, number):
            return stream.row(number)[:2]

        def __len__(self):
            return 80

    stream.row(3)
    loader = DataLoader(Rows(), batch_size=None, num_workers=2)
    assert same([tuple(row) for row in loader], expected)


def test_bad_data_and_bookmarks_are_refused(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n')
    with pytest.raises(ValueError, match="x must hold at least one block of 16 tokens"):
        StreamedBlocks(DataSource(path=path, streaming=True), tokenizer, SIZE, name="x").row(0)
    small = StreamedBlocks(DataSource(path=path, streaming=True), tokenizer, 2, vocabulary=4)
    with pytest.raises(ValueError, match=r"must have token ids in 0\.\.3, got"):
        small.row(1)
    for bookmark in ([1], [0, [0, None, 0, 0], -1], [0, [0, None, 0, 0], True], {}):
        with pytest.raises((TypeError, ValueError)):
            small.resume(bookmark)
