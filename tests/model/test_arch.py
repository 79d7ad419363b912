"""transformers' names for modules stand in one file, and a LoRA's place is written in one way."""

import ast

import pytest
import torch
from support.imports import ROOT, tree_of
from support.models import attached, tiny

from koff.model import arch

# The second is saved beside models, and cannot ask; the third writes the steps of a layer out.
ALONE = ("arch.py", "modeling_koff.py", "recurrent.py")
NAMES = {*arch.LINEARS, "self_attn", "linear_attn", "rotary_emb"}


def test_no_other_file_knows_a_name_of_a_module():
    for path in sorted((ROOT / "koff").rglob("*.py")):
        if path.name in ALONE:
            continue
        for node in ast.walk(tree_of(path)):
            known = node.attr if isinstance(node, ast.Attribute) else None
            known = node.value if isinstance(node, ast.Constant) else known
            assert known not in NAMES, f"{path.relative_to(ROOT)}, line {node.lineno}: {known}"


@pytest.mark.parametrize("architecture", arch.ARCHITECTURES)
def test_a_site_is_where_its_path_says(architecture):
    model = tiny(architecture)
    sites = dict(arch.sites(model))
    modules = arch.layers(model).modules()
    assert len(sites) == sum(isinstance(module, torch.nn.Linear) for module in modules)
    assert {site.linear for site in sites} == set(arch.ARCHITECTURES[architecture].linears)
    for site, linear in sites.items():
        assert model.get_submodule(arch.site_path(site, model)) is linear
        assert arch.site_of(arch.site_key(site)) == arch.site_of(str(site)) == site
    assert arch.count_layers(model.state_dict(), architecture) == len(arch.layers(model))


def test_a_memory_knows_its_sites():
    model = attached("llama")
    memory = model.koff.memories["en"]
    assert str(arch.Site(1, "up_proj")) == "1_up_proj" and "1_up_proj" in memory.lora
    found = dict(memory.sites())
    assert set(found) == set(dict(arch.sites(model)))
    assert all(memory.lora_at(site) is weights for site, weights in found.items())
    assert memory.lora_at(arch.Site(99, "up_proj")) is None


@pytest.mark.parametrize("architecture", arch.ARCHITECTURES)
def test_a_neuron_is_a_row_of_gate_and_up_and_a_column_of_down(architecture):
    model = tiny(architecture)
    module, hidden = arch.mlps(model)[0], model.config.hidden_size
    gate, up, down = arch.mlp_weights(module)
    width = model.config.intermediate_size
    assert gate.shape == up.shape == down.t().shape == (width, hidden) and width != hidden
    neurons = torch.tensor([3, 0, 7])
    parts = [gate[neurons], up[neurons], down[:, neurons].t()]
    found = []
    for name, linear in arch.mlp_linears(module).items():
        dim = arch.NEURON_DIM[name]
        rows = arch.along_neurons(name, neurons, width)
        found.append(
            linear.weight.index_select(dim, rows).reshape(-1, hidden)
            if dim == 0
            else linear.weight.index_select(dim, rows).t()
        )
    assert torch.equal(torch.cat(found), torch.cat(parts))


# config.json as published, but for the vocabulary and the number of layers; "kv" is what
# docs/models.md says of a learned cache: None, or why it is refused.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.3": dict(
        kv=None, model_type="mistral", hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768,
        rope_theta=1000000.0, sliding_window=None,
    ),
    "mistralai/Mistral-7B-v0.1": dict(
        kv="got sliding_window=4096", model_type="mistral", hidden_size=4096,
        intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=32768, rope_theta=10000.0, sliding_window=4096,
    ),
    "allenai/OLMo-2-1124-7B": dict(
        kv=None, model_type="olmo2", hidden_size=4096, intermediate_size=11008,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
        rope_scaling=None, rope_theta=500000,
    ),
    "ibm-granite/granite-3.1-2b-base": dict(
        kv=None, model_type="granite", hidden_size=2048, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rope_scaling=None, rope_theta=5000000.0, attention_dropout=0.1,
        attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0,
        residual_multiplier=0.22, mlp_bias=False, tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM3-3B-Base": dict(
        kv=None, model_type="smollm3", hidden_size=2048, intermediate_size=11008,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=65536,
        rope_scaling=None, rope_theta=5000000.0, no_rope_layer_interval=4, mlp_bias=False,
        sliding_window=None, use_sliding_window=False, max_window_layers=28,
    ),
    "microsoft/phi-4": dict(
        kv=None, model_type="phi3", hidden_size=5120, intermediate_size=17920,
        num_attention_heads=40, num_key_value_heads=10, max_position_embeddings=16384,
        original_max_position_embeddings=16384, rope_scaling=None, rope_theta=250000,
        sliding_window=None,
    ),
    "microsoft/Phi-3-mini-4k-instruct": dict(
        kv="got sliding_window=2047", model_type="phi3", hidden_size=3072, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
        original_max_position_embeddings=4096, rope_scaling=None, rope_theta=10000.0,
        sliding_window=2047,
    ),
    "microsoft/Phi-4-mini-instruct": dict(
        kv="got 'longrope'", model_type="phi3", hidden_size=3072, intermediate_size=8192,
        num_attention_heads=24, num_key_value_heads=8, max_position_embeddings=131072,
        original_max_position_embeddings=4096, partial_rotary_factor=0.75, rope_theta=10000.0,
        rope_scaling={"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48},
        sliding_window=262144, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_taken_or_refused_as_documented(name):
    values = dict(PUBLISHED[name], num_hidden_layers=4, vocab_size=64, pad_token_id=0)
    refused = values.pop("kv")
    config_class, model_class = arch.stock_classes(values.pop("model_type"))
    with torch.device("meta"):
        model = model_class(config_class.from_dict(values))
    arch.check_supported(model, with_kv=False)
    _, width = arch.kv_shape(model)
    assert width * values["num_attention_heads"] == values["hidden_size"]
    assert arch.widths(model) == [values["intermediate_size"]] * 4
    assert arch.layers_without_rope(model) == ({3} if "SmolLM3" in name else set())
    if refused is None:
        arch.check_prefix(model)
    else:
        with pytest.raises(ValueError, match=refused):
            arch.check_prefix(model)
