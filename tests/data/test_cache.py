"""Blocks on the disk: made once whatever the kind of the files, shared, and never half."""

import errno
import json
import logging
import shutil
import threading

import datasets
import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.mapped import mapped_from

from koff.data import blocks as module
from koff.data import cache
from koff.data.blocks import pack
from koff.data.sources import DataSource, load_documents

TEXTS = [f"{'abcdefgh'[i % 8 :]} é{i % 3 * 'X'}" for i in range(60)] + ["007", "NA", '"a",\nb']
RECORDS = [{"text": text, "n": str(i)} for i, text in enumerate(TEXTS)]


@pytest.fixture
def tokenizer():
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blocks"


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), "utf-8")
    return path


def same(packed, other):
    for name in ("blocks", "labelled", "lengths"):
        one, two = getattr(packed, name), getattr(other, name)
        assert one.dtype == two.dtype and torch.equal(one, two), name
    for name in ("tokens_per_byte", "num_documents", "num_tokens", "id_range"):
        assert getattr(packed, name) == getattr(other, name), name
    return True


def entries(folder):
    """What there is of entries, without their locks."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


@pytest.fixture
def counted(monkeypatch):
    """How often something was tokenised."""
    calls = []
    encode = module.encode

    def counting(*args):
        calls.append(args)
        return encode(*args)

    monkeypatch.setattr(module, "encode", counting)
    return calls


def test_every_kind_of_file_gives_the_same_blocks(tmp_path, tokenizer):
    place = tmp_path / "of [all] kinds"  # what means something in a pattern
    place.mkdir()
    rows = datasets.Dataset.from_list(RECORDS)
    rows.to_parquet(place / "a.parquet", batch_size=7)
    rows.to_csv(place / "a.csv", index=False)
    rows.to_csv(place / "a.tsv", index=False, sep="\t")
    rows.to_json(place / "a.jsonl")
    rows.save_to_disk(place / "saved")
    expected = pack(TEXTS, tokenizer, 8)
    for name in ("a.parquet", "a.csv", "a.tsv", "a.jsonl", "saved"):
        assert load_documents(DataSource(path=place / name)) == TEXTS, name
        assert same(pack(DataSource(path=place / name), tokenizer, 8), expected), name
        part = DataSource(path=place / name, skip=5, limit=9, field="{n} {text}")
        assert load_documents(part) == [f"{r['n']} {r['text']}" for r in RECORDS[5:14]], name


def test_chats_and_token_ids_come_from_parquet_too(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    for kind, record in {
        "chat": {"messages": chat},
        "completion": {"prompt": "ab", "completion": "cde"},
        "ids": {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
    }.items():
        path = tmp_path / f"{kind}.parquet"
        datasets.Dataset.from_list([record] * 6).to_parquet(path)
        assert same(pack(DataSource(path=path), tokenizer, 4), pack([record] * 6, tokenizer, 4))


def test_several_files_are_one_source(tmp_path, tokenizer):
    place = tmp_path / "parts"
    (place / "below").mkdir(parents=True)
    (place / ".copies").mkdir()
    for name in ("1.jsonl", "0.jsonl", "below/2.jsonl", ".copies/3.jsonl"):
        (place / name).write_text(json.dumps({"text": f"ab {name[-7]}"}) + "\n")
    got = [["ab 0", "ab 1"], ["ab 1", "ab 0"], ["ab 0", "ab 1", "ab 2"]]
    paths = (place / "?.jsonl", (place / "1.jsonl", place / "0.jsonl"), place)
    for path, texts in zip(paths, got, strict=True):
        assert load_documents(DataSource(path=path)) == texts
        assert same(pack(DataSource(path=path), tokenizer, 3), pack(texts, tokenizer, 3))
    both = DataSource(path=paths[1], skip=1, limit=1)
    assert load_documents(both) == ["ab 0"]
    (place / "notes.txt").write_text("about the data")
    with pytest.raises(
        ValueError, match=r"of one kind, got \.jsonl and \.txt; name those you mean"
    ):
        load_documents(DataSource(path=place))
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        load_documents(DataSource(path=place / "*.parquet"))


def test_blocks_are_made_once_and_mapped(lines, tokenizer, counted, folder):
    first = pack(DataSource(path=lines), tokenizer, 8)
    assert len(counted) == 1 and same(first, pack(TEXTS, tokenizer, 8))
    counted.clear()
    moved = lines.rename(lines.with_name("moved.jsonl"))
    copied = shutil.copyfile(moved, lines)  # another name, another time, the same bytes
    tokenizer("abcdef", truncation=True, max_length=4)  # which a tokenizer remembers
    for path in (moved, copied):
        assert same(pack(DataSource(path=path), tokenizer, 8), first)
    assert not counted and len(entries(folder)) == 1
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    assert mapped_from(first.blocks) == str(entry / "blocks.safetensors")
    first.labels(slice(None))  # nothing writes to what is mapped
    assert same(pack(DataSource(path=lines), tokenizer, 8), pack(TEXTS, tokenizer, 8))


def test_another_content_tokenizer_or_setting_is_another_entry(lines, tokenizer, folder):
    def count(source=None, tokenizer=tokenizer, size=8):
        pack(source or DataSource(path=lines), tokenizer, size)
        return len(entries(folder))

    assert count() == 1
    assert count(size=4) == 2
    assert count(tokenizer=make_tokenizer(eos_token="</s>")) == 3
    assert count(DataSource(path=lines, skip=1)) == 4
    assert count(DataSource(path=lines, limit=20)) == 5
    assert count(DataSource(path=lines, field="{text}{n}")) == 6
    tokenizer.chat_template = "{{ messages }}"
    assert count() == 7
    lines.write_text(lines.read_text().replace("abc", "cba"))
    assert count() == 8
    lines.write_text(lines.read_text())
    assert count() == 8


@pytest.mark.parametrize("damage", ["short", "gone", "other", "facts", "tokenizer"])
def test_a_damaged_entry_is_made_anew_and_said(lines, tokenizer, folder, caplog, damage):
    first = pack(DataSource(path=lines), tokenizer, 8)
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    stored = entry / "blocks.safetensors"
    if damage == "short":
        stored.write_bytes(stored.read_bytes()[:-8])
    elif damage == "gone":
        stored.unlink()
    elif damage == "other":
        stored.write_bytes(stored.read_bytes() + bytes(8))
    elif damage == "facts":
        (entry / "entry.json").write_text("{")
    else:  # one that was made with another tokenizer has got this one's name
        pack(DataSource(path=lines), make_tokenizer(), 8)
        (other,) = (p for p in folder.iterdir() if p.is_dir() and p != entry)
        shutil.rmtree(entry)
        other.rename(entry)
    with caplog.at_level(logging.WARNING, logger="koff"):
        assert same(pack(DataSource(path=lines), tokenizer, 8), pack(TEXTS, tokenizer, 8))
    (record,) = caplog.records
    assert "must be as it was written, got" in record.getMessage()
    assert len(first) and "\n" not in record.getMessage()
    caplog.clear()
    pack(DataSource(path=lines), tokenizer, 8)
    assert not caplog.records


def test_what_a_killed_process_left_is_no_entry(lines, tokenizer, folder):
    expected = pack(DataSource(path=lines), tokenizer, 8)
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    staging = entry.rename(folder / f".staging-{entry.name}")
    (staging / "entry.json").unlink()
    assert same(pack(DataSource(path=lines), tokenizer, 8), expected)
    assert entries(folder) == [entry.name]


def test_a_full_disk_leaves_nothing(lines, tokenizer, folder, monkeypatch):
    finish = cache.finish_tensor

    def full(file, name, *args):
        if name == "labelled":
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(file, name, *args)

    monkeypatch.setattr(cache, "finish_tensor", full)
    with pytest.raises(
        OSError, match="must have room for the blocks of x, got a disk that is full"
    ):
        pack(DataSource(path=lines), tokenizer, 8, name="x")
    assert entries(folder) == []
    monkeypatch.setattr(cache, "finish_tensor", finish)
    assert same(pack(DataSource(path=lines), tokenizer, 8), pack(TEXTS, tokenizer, 8))


def test_one_makes_it_and_the_others_wait(lines, tokenizer, counted):
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(pack(DataSource(path=lines), make_copy(), 8))
        )
        for _ in range(4)
    ]

    def make_copy():
        return make_tokenizer(bos_token="<s>", eos_token="</s>")

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1 and len(results) == 4
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_column_that_the_third_file_lacks(tmp_path, tokenizer, folder, suffix):
    for number in range(3):
        column = "text" if number < 2 else "body"
        rows = datasets.Dataset.from_dict({column: ["abc"] * 3, "n": [1, 2, 3]})
        getattr(rows, f"to_{suffix.replace('jsonl', 'json')}")(tmp_path / f"{number}.{suffix}")
    wanted = rf"2\.{suffix} (record|line) 1 must have the field 'text', got \['body', 'n'\]"
    with pytest.raises(KeyError, match=wanted):
        pack(DataSource(path=tmp_path / f"*.{suffix}"), tokenizer, 8)
    assert entries(folder) == []


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b'text,b\n"a' if suffix == "csv" else b"PAR1 nothing of the kind")
    with pytest.raises(
        ValueError, match=rf"a\.{suffix} must be readable by `datasets`, got"
    ) as got:
        load_documents(DataSource(path=path))
    assert "\n" not in str(got.value)


@pytest.mark.slow
def test_several_processes_tokenise_the_same(tmp_path, tokenizer):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": t * 3}) + "\n" for t in TEXTS * 40), "utf-8")
    together = pack(DataSource(path=path), tokenizer, 8, num_proc=2)
    assert same(together, pack(load_documents(path), tokenizer, 8))
    path.write_text(path.read_text("utf-8") + '{"text": 3}\n', "utf-8")
    with pytest.raises(KeyError, match="line 2521 must have the field 'text'"):
        pack(DataSource(path=path), tokenizer, 8, num_proc=2)
    ids = [{"input_ids": [3, 4]}] * 600 + [{"input_ids": [-1]}]
    with pytest.raises(ValueError, match="input_ids of document 600 of x must be at least 0"):
        pack(ids, tokenizer, 8, num_proc=2, name="x")
