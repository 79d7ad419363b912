"""Models with one MLP width per layer: how they load, and what never runs."""

import json
import sys

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.damage import edit, reseal
from support.imports import ROOT, imports_of, top
from support.models import ARCHITECTURES, attached, tokens
from support.widths import spread
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import koff
from koff.commands.saved import generate_text
from koff.model import arch, modeling_koff
from koff.model import narrow as modeling

pytestmark = pytest.mark.usefixtures("no_real_fsync")

PLANTED = """
from pathlib import Path
Path(r"{marker}").write_text("ran")
"""


@pytest.fixture(params=ARCHITECTURES)
def saved(request, tmp_path):
    model = spread(attached(request.param, target_sparsity=0.4))
    koff.binarize(model, multiple_of=8)
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    return koff.save(koff.compact(model, inplace=True), tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_koff_imported_means_koffs_own_classes(saved, trust):
    before = {name for name in sys.modules if name.startswith("transformers_modules.")}
    config = AutoConfig.from_pretrained(saved, **trust)
    assert type(config).__module__ == "koff.model.modeling_koff"
    model = AutoModelForCausalLM.from_pretrained(saved, **trust)
    assert type(model).__module__ == "koff.model.modeling_koff"
    assert not {n for n in sys.modules if n.startswith("transformers_modules.")} - before
    assert torch.equal(model(tokens()).logits, koff.load(saved)(tokens()).logits)
    base = AutoModel.from_pretrained(saved, **trust)
    assert type(base).__module__ == "koff.model.modeling_koff"
    assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_the_file_beside_the_model_is_ours_and_stands_alone(saved):
    source = ROOT / "koff" / "model" / modeling.REMOTE_FILE
    assert (saved / modeling.REMOTE_FILE).read_bytes() == source.read_bytes()
    assert top(imports_of(source)) <= {"__future__", "copy", "torch", "transformers"}
    config = json.loads((saved / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert f"{module}.py" == modeling.REMOTE_FILE and hasattr(modeling_koff, name)


def test_every_architecture_is_in_the_file():
    for name in arch.ARCHITECTURES:
        config, model = modeling.narrow_classes(name)
        assert config.model_type == arch.NARROW_PREFIX + name and model.config_class is config


def test_code_in_a_folder_never_runs(saved, tmp_path):
    marker = tmp_path / "marker"
    wanted = koff.load(saved)(tokens(), memory="en").logits
    (saved / modeling.REMOTE_FILE).write_text(PLANTED.format(marker=marker))
    assert torch.equal(koff.load(saved)(tokens(), memory="en").logits, wanted)
    generate_text(saved, "abc", memory="en", max_new_tokens=2, device="cpu")
    planted = {"AutoTokenizer": [None, "modeling_koff.KoffTokenizer"]}
    edit(saved / "tokenizer_config.json", auto_map=planted, tokenizer_class="KoffTokenizer")
    uses = (
        lambda: generate_text(saved, "abc", memory="en", max_new_tokens=2, device="cpu"),
        lambda: koff.export_merged(saved, "en", tmp_path / "exported"),
    )
    for use in uses:
        with pytest.raises(ValueError, match="tokenizer_config.json must have the sha256"):
            use()
    reseal(saved)  # by someone who knows how
    for use in uses:
        with pytest.raises(ValueError, match="contains custom code"):
            use()
    assert not marker.exists()
    edit(saved / "config.json", model_type="someone_elses")
    with pytest.raises(ValueError, match="the model type must be one of"):
        koff.load(saved)
    assert not marker.exists()


def test_saved_by_transformers_alone_it_loads_again(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert (tmp_path / "again" / modeling.REMOTE_FILE).is_file()


def test_a_new_model_of_a_config_is_initialised_like_transformers_own(saved):
    config = AutoConfig.from_pretrained(saved)
    config.initializer_range = 0.5
    model = AutoModelForCausalLM.from_config(config)
    assert arch.widths(model) == config.intermediate_sizes
    for module in arch.mlps(model):
        for weight in arch.mlp_weights(module):
            assert float(weight.detach().std()) == pytest.approx(
                0.5, rel=0.2
            )  # hundreds of draws or more


@pytest.mark.parametrize("sizes", [None, 8, [8, 8], [8, 8, 0], [8, 8, 9999], [8, 8, "8"]])
def test_wrong_widths_are_refused(saved, sizes):
    edit(saved / "config.json", intermediate_sizes=sizes)
    with pytest.raises((ValueError, TypeError), match="intermediate_sizes"):
        AutoModelForCausalLM.from_pretrained(saved)
