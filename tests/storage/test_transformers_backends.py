"""What the Transformers backends of vLLM and SGLang do with a saved backbone: build its base model
without memory, put their own linear layers and attention into it, and load the weights by name.

vLLM itself does it in tests/vllm; here is the contract alone, without koff, for every family.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import bare
from support.models import tokens
from support.widths import compacted

import koff
from koff.model import arch

pytestmark = pytest.mark.usefixtures("no_real_fsync")

# transformers says of its models with recurrent layers that these backends cannot have them.
FAMILIES = [name for name, entry in arch.ARCHITECTURES.items() if entry.recurrent is None]

ENGINE = """
import json, sys
from pathlib import Path
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

calls = []


class EngineLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        size = linear.out_features, linear.in_features
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.empty(size[0]), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    calls.append(module.layer_idx)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS["engine"] = attention
for folder in map(Path, sys.argv[1:]):
    calls.clear()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = "engine"
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, trust_remote_code=True).eval()
    assert type(model).__module__.split(".")[0] == "transformers_modules"
    assert model.is_backend_compatible()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, EngineLinear(module))
    weights = load_file(folder / "model.safetensors")
    own = {name.removeprefix("model."): t for name, t in weights.items()}
    head = own.pop("lm_head.weight", own["embed_tokens.weight"])
    model.load_state_dict(own, assign=True)
    ids = load_file(folder / "ids.safetensors")["ids"]
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden = model(ids, position_ids=positions, use_cache=False, return_dict=False)[0]
    logits = hidden @ head.T / getattr(config, "logits_scaling", 1.0)
    save_file({"logits": logits}, folder / "logits.safetensors")
    (folder / "calls.json").write_text(json.dumps(calls))
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory, bare_python):
    """Architecture -> (folder, what koff computes); the engine has run on each."""
    place, found = tmp_path_factory.mktemp("backends"), {}
    for architecture in FAMILIES:
        model = compacted(architecture, memories=("en",))
        folder = koff.save(model, place / architecture)
        save_file({"ids": tokens()}, folder / "ids.safetensors")
        with torch.no_grad():
            found[architecture] = folder, model, model(tokens()).logits
    folders = [folder for folder, *_ in found.values()]
    bare.run(bare_python, bare.NO_KOFF + ENGINE, *folders, cwd=place)
    return found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_engine_builds_the_base_model_with_its_own_layers(engine, architecture):
    folder, model, wanted = engine[architecture]
    assert len(set(arch.widths(model))) > 1
    got = load_file(folder / "logits.safetensors")["logits"]
    assert (got - wanted).abs().max() < 1e-5
    assert json.loads((folder / "calls.json").read_text()) == [0, 1, 2]  # each layer's attention
