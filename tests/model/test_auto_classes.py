"""transformers' Auto classes find the narrow models, whenever koff and they are imported."""

import copy
import pickle

import pytest
import torch
from support import bare
from support.models import tokens
from support.widths import compacted
from transformers import AutoConfig, AutoModelForCausalLM

import koff
from koff.model import arch, auto_classes, narrow

ORDERS = {
    "koff first": "import koff; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import koff",
    "peft first": "import peft; from transformers import AutoModelForCausalLM; import koff",
}
LOAD = """
import sys
assert "transformers.models.llama.modeling_llama" not in sys.modules or "peft" in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "koff.model.modeling_koff", type(model)
"""
# What a process does that gets a config from another one.
UNPICKLE = """
import pickle, sys
from pathlib import Path
config = pickle.loads(Path(sys.argv[1]).read_bytes())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(config)
assert type(model).__module__ == "koff.model.modeling_koff", type(model)
"""


def fresh(code: str, *arguments: object, cwd) -> str:
    return bare.run(bare.sys.executable, code, *arguments, cwd=cwd, PYTHONPATH=str(bare.ROOT))


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory):
    return koff.save(compacted("llama"), tmp_path_factory.mktemp("narrow") / "out")


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_narrow_model_loads_in_whatever_order_one_imports(narrow_folder, tmp_path, order):
    fresh(ORDERS[order] + LOAD, narrow_folder, cwd=tmp_path)


def test_an_unpickled_config_makes_its_model(narrow_folder, tmp_path):
    config = AutoConfig.from_pretrained(narrow_folder)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    fresh(UNPICKLE, tmp_path / "config.pkl", cwd=tmp_path)


def test_the_stand_ins_leave_no_trace_once_a_config_was_asked_for(narrow_folder, tmp_path):
    code = "import sys, koff; from transformers import AutoConfig, CONFIG_MAPPING as known\n"
    code += "before = [type(known[name]).__name__ for name in known if name.startswith('koff_')]\n"
    code += "AutoConfig.from_pretrained(sys.argv[1])\n"
    code += "print(*before, *(known[name].__name__ for name in known if name[:5] == 'koff_'))"
    classes = [f"Koff{entry.config}" for entry in arch.ARCHITECTURES.values()]
    stand_ins = ["_StandIn"] * len(classes)
    assert fresh(code, narrow_folder, cwd=tmp_path).split() == [*stand_ins, *classes]


@pytest.mark.parametrize("architecture", arch.ARCHITECTURES)
def test_a_stand_in_is_what_it_stands_for(architecture):
    config, _ = narrow.narrow_classes(architecture)
    stand_in = auto_classes._StandIn(architecture, config.__name__)
    assert stand_in.model_type == architecture and stand_in.__name__ == config.__name__
    assert stand_in.from_dict == config.from_dict
    values = {"intermediate_sizes": [1], "num_hidden_layers": 1}
    assert type(stand_in(**values)) is config
    for made in (copy.deepcopy(stand_in), pickle.loads(pickle.dumps(stand_in))):
        assert made.from_dict == config.from_dict


def test_loaded_either_way_it_computes_the_same(narrow_folder):
    stock, own = AutoModelForCausalLM.from_pretrained(narrow_folder), koff.load(narrow_folder)
    assert torch.equal(stock(tokens()).logits, own(tokens()).logits)
