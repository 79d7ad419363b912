"""What python -m koffkernels.tune measures is what a call of that shape asks for."""

import pytest
import torch

from koffkernels import routes, tune
from koffkernels._triton.lora import linear
from koffkernels.clock import WallClock

TINY = tune.ModelShape(32, (40,), 2, 1, 16)
KEYS = [key for key in tune.keys_of([TINY], rank=2) if key.op == "lora_linear"]
KEYS = list(dict.fromkeys(key._replace(m=8) for key in KEYS))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_call_asks_for_the_shape_that_was_measured(key, monkeypatch):
    """Among them q, k and v as one: the row that tune writes is at distance 0."""
    asked, real = [], routes.choose

    def choose(shape, device):
        asked.append(shape)
        return real(shape, device)

    monkeypatch.setattr(linear.routes, "choose", choose)
    machine = tune.Machine(torch.device("cpu"), torch.float32, WallClock(), 0)
    trains = key.direction == "backward"
    call, trained = tune._operation(machine, key, trains)
    with torch.set_grad_enabled(trains):
        ys = call()
    if trains:
        asked.clear()
        torch.autograd.grad(ys, trained, [torch.ones_like(y) for y in ys])
    assert set(asked) == {key.shape(torch.float32)}
    for other in KEYS:
        row = tune._row(machine, other, tune.Candidate("vendor", None))
        if row["pass"] == key.direction:
            assert (routes._distance(row, asked[0]) == 0) == (other == key)
