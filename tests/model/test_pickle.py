"""torch.save(model), pickle and deepcopy of an attached model, also in another process."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from support.models import ARCHITECTURES, attached, tokens
from support.widths import spread

import koff
from koff.model.forward_context import ACTIVE


def soft(architecture):
    return spread(attached(architecture, target_sparsity=0.4))


def masked(architecture):
    model = soft(architecture)
    koff.binarize(model, multiple_of=1)
    return model


STAGES = {"soft": soft, "masked": masked, "compacted": lambda a: koff.compact(masked(a))}


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def logits(model):
    return model(tokens(), memory=["es", None, "en"]).logits


@pytest.mark.parametrize("way", [lambda m: pickle.loads(pickle.dumps(m)), by_torch, copy.deepcopy])
@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_is_whole_and_its_own(stage, way):
    for architecture in ARCHITECTURES:
        model = STAGES[stage](architecture)
        want = logits(model)
        made = way(model)
        assert type(made) is type(model) and torch.equal(logits(made), want)
        with torch.no_grad():
            for p in made.koff.memories["en"].parameters():
                p.add_(1.0)
        assert torch.equal(logits(model), want) and not torch.equal(logits(made), want)
        logits(made).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        if stage == "soft":
            koff.compact(made)
        assert not hasattr(koff.detach(made), "koff")
        assert [m for m in made.modules() if hasattr(m, "_koff")] == []


def test_no_memory_given_stays_recognisable():
    for made in (pickle.loads(pickle.dumps(ACTIVE)), copy.copy(ACTIVE), copy.deepcopy(ACTIVE)):
        assert made is ACTIVE


def test_another_process_loads_it(tmp_path):
    model = STAGES["compacted"]("qwen3")
    torch.save(model, tmp_path / "model.pt")
    torch.save(logits(model), tmp_path / "want.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "want, ids = torch.load(sys.argv[1] + '/want.pt'), torch.tensor(eval(sys.argv[2]))\n"
        "assert torch.equal(model(ids, memory=['es', None, 'en']).logits, want)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(tokens().tolist())]
    subprocess.run(arguments, check=True, timeout=120)
