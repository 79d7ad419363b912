"""What a run says where its output is no terminal: its plan at once, its time after a few steps."""

import re

import pytest
from support.command_line import RECIPE, succeed

pytestmark = pytest.mark.usefixtures("no_data_root", "no_real_fsync")


def test_a_run_says_its_plan_first_and_its_time_after_three_steps(root, tmp_path):
    settings = ("--set", "train.logging_every=4", "--device", "cpu")
    text = succeed("train", root / "recipe.yaml", "--output", tmp_path / "out", *settings)
    lines = [line for line in text.splitlines() if line.startswith("training")]
    train = RECIPE["train"]
    rows, steps, size = train["batch_size"], train["steps"], train["block_size"]
    tokens = f"{steps} steps of {rows} x {size} tokens ({steps * rows * size} in all)"
    assert lines[0].startswith(f"training: {tokens}; ")
    # Two layers of LoRA (r 2) on q and o (32 + 32), k and v (32 + 16), the MLP (3 times 32 + 64);
    # a cache of 4 tokens, one of them frozen (2 heads of 8, twice); a gate for each of 64 neurons.
    lora, kv, gates = 2 * (2 * 64 + 2 * 48 + 3 * 96), 2 * 3 * 2 * 8, 64
    learned = 2 * (2 * (lora + kv) + gates) + 1  # and the multiplier
    assert f"; {learned:,} parameters learn, " in lines[0]
    assert re.fullmatch(r"training: [\d.e-]+ s a step, about \d:\d\d:\d\d left", lines[1])
    assert lines[2].startswith("training 4/4  loss ")
