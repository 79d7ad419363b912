"""transformers' names for modules stand in one file, and a LoRA's place is written in one way."""

import ast

import pytest
from support.imports import ROOT, tree_of
from support.models import ARCHITECTURES, attached, tiny

from koff.model import arch

ALONE = ("arch.py", "modeling_koff.py")  # the second is saved beside models, and cannot ask
NAMES = {*arch.LINEARS, "self_attn", "rotary_emb"}


def test_no_other_file_knows_a_name_of_a_module():
    for path in sorted((ROOT / "koff").rglob("*.py")):
        if path.name in ALONE:
            continue
        for node in ast.walk(tree_of(path)):
            known = node.attr if isinstance(node, ast.Attribute) else None
            known = node.value if isinstance(node, ast.Constant) else known
            assert known not in NAMES, f"{path.relative_to(ROOT)}, line {node.lineno}: {known}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_site_is_where_its_path_says(architecture):
    model = tiny(architecture)
    sites = dict(arch.sites(model))
    assert len(sites) == len(arch.layers(model)) * len(arch.LINEARS)
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


def test_the_dimension_of_neurons_is_the_one_that_is_as_wide_as_the_mlp():
    module = arch.mlps(tiny("llama"))[0]
    weights = zip(arch.mlp_weights(module), arch.NEURON_DIM.items(), strict=True)
    for weight, (name, dim) in weights:
        assert getattr(module, name).weight is weight
        assert weight.shape[dim] == 96 != weight.shape[1 - dim]
