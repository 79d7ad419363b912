"""A base that is loaded in shards is whole in no process, and takes there what `koff plan` says."""

import json

import pytest
import torch
from support.distributed import launch
from support.models import tiny

import koff
from koff.commands.plan import Setting
from koff.training.footprint import StepShape, count_step, sizes_of

pytestmark = pytest.mark.slow

KOFF = koff.KoffConfig(("en",), target_sparsity=0.2, kv=None)
# A head of two layers' size, which stays whole while they come and go.
SIZE = dict(vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)


def measured(base, how):
    """What the two processes said."""
    lines = launch(2, "shards_worker.py", base, how).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_process_holds_its_shard_and_what_runs(tied, tmp_path):
    base = tiny("llama", tie_word_embeddings=tied, **SIZE)
    base.save_pretrained(tmp_path)
    sizes = sizes_of(base.config, KOFF, torch.bfloat16)
    counted = count_step(base.config, KOFF, torch.bfloat16, StepShape(1, 4, distils=False))
    setting = Setting(sizes, StepShape(1, 4), counted, devices=2, sharded=True)
    whole, shards = measured(tmp_path, "whole"), measured(tmp_path, "shards")
    print(sizes, setting, whole, shards)
    assert len(whole) == len(shards) == 2
    # Each dimension is even here, so the shards are halves exactly.
    assert [found["stays"] for found in whole] == [sizes.weights] * 2
    assert [found["stays"] for found in shards] == [setting.shard] * 2 == [sizes.weights // 2] * 2
