"""transformers' names for modules stand in one file, and a LoRA's place is written in one way."""

import ast

import pytest
import torch
from support.imports import ROOT, tree_of
from support.models import attached, tiny

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


@pytest.mark.parametrize("architecture", arch.ARCHITECTURES)
def test_a_site_is_where_its_path_says(architecture):
    model = tiny(architecture)
    sites = dict(arch.sites(model))
    assert len(sites) == len(arch.layers(model)) * len(arch.ARCHITECTURES[architecture].linears)
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
