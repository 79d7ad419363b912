"""The traffic counter, on kernels whose loads and stores are known, and what must not be read."""

import pytest
import torch
from support.kernel_inputs import normal
from support.traffic_kernels import sum_kernel

from bench.gate.traffic import count_traffic
from koffkernels._triton.lora.shrink import shrink
from koffkernels._triton.shared.launch import Rows, launch


def run(x, y, programs=4, size=None, shift=0, atomic=False):
    with count_traffic() as traffic:
        args = {"x_ptr": x, "y_ptr": y, "size": len(x) if size is None else size}
        launch(sum_kernel, (programs,), **args, SHIFT=shift, ATOMIC=atomic)
    return traffic


def test_traffic_counts_lanes_of_known_kernels():
    """Four programs read 21 elements each; two write each element of y."""
    x, y = torch.arange(21.0), torch.zeros(3, dtype=torch.float16)
    traffic = run(x, y)
    assert y.tolist() == [210.0, 210.0, 0.0]
    assert (traffic.loads(x) == 4).all() and (traffic.stores(x) == 0).all()
    assert traffic.stores(y).tolist() == [2, 2, 0] and (traffic.loads(y) == 0).all()
    assert traffic.issued_bytes() == (4 * 21 * 4, 4 * 2)
    assert traffic.moved_bytes() == (21 * 4, 2 * 2)
    assert [one.kernel for one in traffic.launches] == ["sum_kernel"]
    assert (traffic.loads(torch.zeros(5)) == 0).all()  # of a tensor that no kernel knows


def test_traffic_of_views():
    """Only what the view holds, whatever else lies in its buffer."""
    wide, y = torch.arange(40.0).view(4, 10), torch.zeros(2)
    row = wide[2]
    traffic = run(row, y, programs=1)
    assert traffic.loads(wide).sum(1).tolist() == [0, 0, 10, 0]
    assert (traffic.loads(wide[2, ::3]) == 1).all() and (
        traffic.loads(wide[:, 2:4].t()[:, 0]) == 0
    ).all()


def test_traffic_refuses_what_lies_outside():
    """A load past the end is an error, also where the interpreter finds memory there."""
    buffer, y = torch.arange(64.0), torch.zeros(2)
    with pytest.raises(Exception, match="3 lanes load outside"):
        run(buffer[:32], y, shift=3)
    run(buffer[:32], y, size=29, shift=3)


def test_traffic_refuses_atomics():
    with pytest.raises(Exception, match="no atomics"):
        run(torch.ones(4), torch.zeros(1), atomic=True)
    x, y = torch.ones(4), torch.zeros(1)
    launch(sum_kernel, (1,), x_ptr=x, y_ptr=y, size=4, SHIFT=0, ATOMIC=True)
    assert y.item() == 4.0  # and outside of it nothing is changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traffic_of_the_shrink(dtype):
    """Unused memories and rows without one are not read, and every result has one writer."""
    x, a = normal(40, 70, dtype=dtype), normal(4, 5, 70)
    ids = torch.tensor([2, -1, 1, 2])
    with count_traffic() as traffic:
        s = shrink(x, [a], Rows(ids, 10))
    assert (traffic.stores(s) == 1).all()
    assert (traffic.loads(a[0]) == 0).all() and (traffic.loads(a[3]) == 0).all()
    assert (traffic.loads(a[1:3]) == 1).all()
    assert (traffic.loads(x)[10:20] == 0).all() and (traffic.loads(x)[:10] == 1).all()
