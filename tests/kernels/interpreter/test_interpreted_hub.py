"""Two copies of the kernels in one process: their operators do not collide."""

import kernels
import torch
from support.hub import variant
from support.kernel_inputs import normal

import koffkernels


def test_hub_copies_register_operators_of_their_own(tmp_path):
    names = ("_koffkernels_cpu_0c1d2e3", "_koffkernels_cpu_4f5a6b7")
    copies = [kernels.get_local_kernel(variant(tmp_path, name)) for name in names]
    x, weights = normal(1, 5, 16), (normal(24, 16), normal(24, 16), normal(16, 24))
    want = koffkernels.gated_mlp(x, *weights)
    for name, copy in zip(names, copies, strict=True):
        assert copy.dispatch.choose("gated_mlp").backend == "interpret"
        assert torch.equal(copy.gated_mlp(x, *weights), want)
        operators = getattr(torch.ops, name)
        assert operators.gated_mlp.default.name() == f"{name}::gated_mlp"
        assert operators.prefix_attention.default.name() == f"{name}::prefix_attention"
