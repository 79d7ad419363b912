"""Which memories a server knows: those of the folder now, each whole or not at all."""

import asyncio
import sys
from types import SimpleNamespace as Thing

import pytest
from support.widths import compacted

import koff
from koff_vllm import requests, server


class LoRARequest:
    """What koff_vllm uses of vLLM's."""

    def __init__(self, lora_name, lora_int_id, lora_path):
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


class Models:
    """What koff_vllm uses of vLLM's OpenAIServingModels."""

    def __init__(self, folder, max_model_len=64, connector=True, target_modules=None):
        named = requests.CONNECTOR if connector else (None, None)
        transfer = Thing(kv_connector=named[0], kv_connector_module_path=named[1])
        self.loaded = []
        self.engine_client = Thing(
            add_lora=self.add_lora,
            vllm_config=Thing(
                kv_transfer_config=transfer, lora_config=Thing(target_modules=target_modules)
            ),
        )
        self.model_config = Thing(model=str(folder), max_model_len=max_model_len)
        self.base_model_paths = [Thing(name="backbone")]
        self.lora_requests = {}

    async def add_lora(self, request):
        """As vLLM: the adapter is loaded when this returns."""
        self.loaded.append(request.lora_name)


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """A cache of the test's own, no backbone remembered, and the one class of vLLM's."""
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KOFF_VLLM_SAMPLES", raising=False)
    monkeypatch.setattr(requests, "_BACKBONES", {})
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, Thing(LoRARequest=LoRARequest))


def start(models):
    """What happens before a server takes requests."""

    async def nothing(self):
        """vLLM's own part."""

    asyncio.run(server.init_static_loras(nothing, models))


def ask(models, name):
    """The error for a request's model, or None."""
    answers = Thing(create_error_response=lambda **error: error, models=models)

    async def known(self, request):
        served = request.model == "backbone" or request.model in models.lora_requests
        return None if served else "vLLM's own error"

    return asyncio.run(server.check_model(known, answers, Thing(model=name)))


def test_every_memory_is_served_under_two_names(saved):
    models = Models(saved)
    start(models)
    assert [name for name in models.lora_requests if "@" not in name] == ["en", "keys", "es"]
    assert models.loaded == [name for name in models.lora_requests if "@" in name]
    assert models.lora_requests["en"] is models.lora_requests[models.loaded[0]]
    assert ask(models, "en") is None and ask(models, "backbone") is None
    assert len(models.loaded) == 3  # koff.json is as it was: nothing is done again


def test_an_unknown_name_is_answered_with_those_that_are_known(saved):
    models = Models(saved)
    start(models)
    error = ask(models, "xx")
    assert error["status_code"] == 404
    assert error["message"] == "the model must be one of backbone, en, keys, es, got 'xx'"


def test_memories_come_go_and_change(saved):
    models = Models(saved)
    start(models)
    first = models.lora_requests["en"]
    koff.import_memory(saved, "new", kv=saved / "memories/es/kv")
    koff.remove_memory(saved, "es")
    assert ask(models, "new") is None and ask(models, "es")["status_code"] == 404
    assert models.lora_requests["en"] is first and len(models.loaded) == 4
    koff.import_memory(saved, "other", lora=saved / "memories/keys/lora")
    koff.remove_memory(saved, "en")
    koff.import_memory(saved, "en", lora=saved / "memories/keys/lora")
    assert ask(models, "en") is None
    assert models.lora_requests["en"].lora_name != first.lora_name
    assert ask(models, first.lora_name)["status_code"] == 404


def test_adapters_of_the_users_own_stay(saved):
    models = Models(saved)
    models.lora_requests["mine"] = LoRARequest("mine", 1, "/somewhere")
    start(models)
    koff.remove_memory(saved, "es")
    assert ask(models, "mine") is None


REFUSED = {
    "a part of the LoRA": (
        {"target_modules": ["q_proj"]},
        "lora_target_modules must have all linear layers of memory",
    ),
    "little room": ({"max_model_len": 8}, "max_model_len must be more than 8"),
    "no connector": ({"connector": False}, "has learned keys, which need --kv-transfer-config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_memory_that_cannot_be_served_whole_stops_the_start(saved, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        start(Models(saved, **settings))


def test_a_memory_that_cannot_be_served_later_is_said_when_it_is_asked_for(saved):
    koff.import_memory(saved, "short", lora=saved / "memories/en/lora")
    for name in ("en", "keys", "es"):
        koff.remove_memory(saved, name)
    models = Models(saved, max_model_len=8)
    start(models)
    other = compacted("llama")
    koff.save(other, saved.with_name("other"))
    koff.import_memory(saved, "long", kv=saved.with_name("other") / "memories/en/kv")
    error = ask(models, "long")
    assert error["status_code"] == 400 and "max_model_len must be more than 8" in error["message"]
    assert ask(models, "short") is None


def test_another_backbone_is_not_served_before_a_restart(saved, caplog):
    models = Models(saved)
    start(models)
    before = dict(models.lora_requests)
    another = compacted("llama", memories=("en",), changes={"hidden_size": 32})
    koff.save(another, saved, overwrite=True)
    assert ask(models, "en") is None and models.lora_requests == before
    assert "holds another backbone than was loaded" in caplog.text


def test_a_folder_in_pieces_changes_nothing(saved):
    models = Models(saved)
    start(models)
    (saved / "koff.json").write_text("{")
    assert ask(models, "en") is None and len(models.lora_requests) == 6


def test_a_model_that_koff_did_not_save_is_left_alone(tmp_path):
    models = Models(tmp_path)
    start(models)
    assert ask(models, "xx") == "vLLM's own error" and models.lora_requests == {}
