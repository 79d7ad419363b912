"""The demo's base model at a size that takes seconds."""

import copy

from koff.demo import base_model as demo_base

SMALL = copy.deepcopy(demo_base.SETTINGS) | {
    "vocab_size": 300,
    "block_size": 32,
    "batch_size": 3,
    "steps": 3,
    "warmup_steps": 1,
}
SMALL["model"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
