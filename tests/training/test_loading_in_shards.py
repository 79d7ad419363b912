"""A base that is loaded in shards is whole in no process."""

import re

import pytest
from support.distributed import launch
from support.models import tiny

pytestmark = pytest.mark.slow


def peaks(base, how):
    """Bytes of each of two processes."""
    return [int(n) for n in re.findall(r"peak (\d+)", launch(2, "shards_worker.py", base, how))]


def test_no_process_holds_the_whole_base(tmp_path):
    base = tiny("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    size = 2 * sum(p.numel() for p in base.parameters())  # in bf16
    base.save_pretrained(tmp_path)
    whole, shards = peaks(tmp_path, "whole"), peaks(tmp_path, "shards")
    print(f"base {size}; peaks {whole} whole, {shards} in shards")
    assert len(whole) == len(shards) == 2
    # A half of it, and what is read on the way; that of the other way shows that this can fail.
    assert min(whole) > size and max(shards) < 0.75 * size, (size, whole, shards)
