"""koffkernels as a kernel of the Hugging Face hub: copied, loaded under other names, twice."""

import ast
import sys
import uuid

import kernels
import pytest
import torch
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from support.hub import variant
from support.imports import ROOT
from support.kernel_inputs import normal
from support.models import tiny
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

import koffkernels


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Two copies of one version in one process, each under a name of its own."""
    folder = tmp_path_factory.mktemp("hub")
    # Names that this process has not seen: Python would take a name's modules from the first one.
    names = [f"_koffkernels_cpu_{uuid.uuid4().hex}" for _ in range(2)]
    return [kernels.get_local_kernel(variant(folder, name)) for name in names]


def test_hub_copies_compute_the_same_and_are_not_the_installed_package(copies):
    x, weights = normal(2, 5, 8), (normal(12, 8), normal(12, 8), normal(8, 12))
    want = koffkernels.gated_mlp(x, *weights)
    for copy in copies:
        assert copy.gated_mlp is not koffkernels.gated_mlp
        assert torch.equal(copy.gated_mlp(x, *weights), want)
        lora = copy.LoRA(normal(1, 3, 8), normal(1, 12, 3), torch.ones(1))
        mine = koffkernels.LoRA(*lora)
        assert torch.equal(
            copy.lora_linear(x, weights[0], lora=lora),
            koffkernels.lora_linear(x, weights[0], lora=mine),
        )
    with copies[0].force_backend("reference"):
        used = [copy.dispatch.choose("gated_mlp").backend for copy in (*copies, koffkernels)]
    assert used == ["reference", "torch", "torch"]


def test_hub_every_public_name_is_there(copies):
    for copy in copies:
        assert copy.__all__ == koffkernels.__all__
        assert all(hasattr(copy, name) for name in copy.__all__)


def test_hub_layers_replace_the_forwards_of_transformers(tmp_path, monkeypatch):
    path = variant(tmp_path, "_koffkernels_cpu_a41bb90")
    model = tiny("llama").requires_grad_(False)
    gemma = GemmaMLP(GemmaConfig(hidden_size=16, intermediate_size=24)).requires_grad_(False)
    model.gemma = gemma
    ids, x = torch.arange(3, 15).view(2, 6), normal(2, 5, 16)
    want, want_gemma = model(ids).logits, gemma(x)
    mapping = {}
    for cls, layer in ((LlamaMLP, "SiluGatedMLP"), (GemmaMLP, "GeluTanhGatedMLP")):
        for name in ("kernel_layer_name", "kernel_condition"):  # what kernels puts on the class
            monkeypatch.setattr(cls, name, None, raising=False)
        kernels.replace_kernel_forward_from_hub(cls, layer)
        repository = LocalLayerRepository(path, layer_name=layer)
        mapping[layer] = {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: repository}}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=False)
    homes = {m.forward.__func__.__module__ for m in (*(b.mlp for b in model.model.layers), gemma)}
    assert homes == {"_koffkernels_cpu_a41bb90.layers"}
    # The same products in fp32, added up in another order.
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gemma(x), want_gemma, rtol=1e-5, atol=1e-5)


def test_hub_layers_refuse_weights_that_are_trained(copies):
    mlp = tiny("llama").model.layers[0].mlp
    with pytest.raises(ValueError, match="w_gate must be frozen"):
        copies[0].layers.SiluGatedMLP.forward(mlp, normal(1, 2, 64))


def test_hub_package_names_nothing_but_torch_and_triton():
    """A copy has another name: an absolute import of koffkernels would load the installed one."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted((ROOT / "koffkernels").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        named |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0}
        assert {name.partition(".")[0] for name in named} <= allowed, path
