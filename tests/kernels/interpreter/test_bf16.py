"""The interpreter's bf16, as installed for these tests, against torch's."""

import torch
from support import bf16


def test_bf16_rounds_as_torch_does():
    x = torch.cat([torch.randn(999), torch.randn(999) * 1e-39, torch.tensor([0.0, -0.0])])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), 3.4e38, 1.00390625, 1.01171875])])
    bits = torch.from_numpy(bf16.to_bf16(x.numpy()).view("int16"))
    assert torch.equal(bits, x.bfloat16().view(torch.int16))
    assert torch.equal(torch.from_numpy(bf16.from_bf16(bits.numpy())), x.bfloat16().float())
    nan = torch.tensor([float("nan")]).numpy()
    assert torch.from_numpy(bf16.from_bf16(bf16.to_bf16(nan))).isnan().all()
