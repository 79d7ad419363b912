"""A base that is loaded in shards is whole in no process, and takes there what `koff plan` says."""

import json
import re

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


def saved_base(folder, tied):
    """A base on the disk, and its sizes in bf16."""
    base = tiny("llama", tie_word_embeddings=tied, **SIZE)
    base.save_pretrained(folder)
    return base.config, sizes_of(base.config, KOFF, torch.bfloat16)


def measured(base, how):
    """What the two processes said."""
    # Not line by line: transformers' bars go to the same place, and have no end of line.
    texts = re.findall(r"\{[^{}]*\}", launch(2, "shards_worker.py", base, how))
    found = [json.loads(text) for text in texts]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_process_holds_its_shard_and_what_runs(tied, tmp_path):
    config, sizes = saved_base(tmp_path, tied)
    shape = StepShape(1, 4, distils=False)
    counted = count_step(config, KOFF, torch.bfloat16, shape)
    setting = Setting(sizes, shape, counted, devices=2, sharded=True)
    there = setting.shard + setting.learned + setting.optimiser
    found = measured(tmp_path, "shards")
    print(f"base {sizes.weights}: {found}")
    for process in found:
        # Each dimension is even here, so the shards are halves exactly.
        assert process["stays"] == setting.shard == sizes.weights // 2
        # A half of it, gates and LoRA, and what is read on the way.
        assert process["loading"] < 0.75 * sizes.weights
        # Beside what is there before. A process that runs ahead has asked for one layer more before
        # gloo has let go of the one before it.
        planned = setting.peaks.step - there
        assert 0.98 * planned < process["step"] < 1.02 * planned + sizes.layer


def test_a_process_that_does_not_share_takes_the_whole(tmp_path):
    """So the test above can fail."""
    _, sizes = saved_base(tmp_path, tied=False)
    found = measured(tmp_path, "whole")
    print(f"base {sizes.weights}: {found}")
    for process in found:
        assert process["stays"] == sizes.weights < process["loading"]
