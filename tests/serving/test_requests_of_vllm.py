"""What koff_vllm asks of a request, and what it puts before its text; vLLM is not needed here."""

import sys
from types import SimpleNamespace as Thing

import pytest
from support.widths import compacted

import koff
from koff_vllm import configs, plugin, requests
from koff_vllm.saved import LINEARS, SavedModel


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and no backbone remembered."""
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "_BACKBONES", {})


class Sampling(Thing):
    """What koff_vllm uses of vLLM's SamplingParams."""

    def clone(self):
        """A copy."""
        return Sampling(**vars(self))


def made(saved, memory="en", **changes):
    """(vLLM's config, a request) for a saved folder."""
    transfer = Thing(kv_connector="MemoryConnector", kv_connector_module_path="koff_vllm.connector")
    model = Thing(model=str(saved), max_model_len=32)
    staged, path = SavedModel(saved).stage(memory)
    request = Thing(
        lora_request=Thing(lora_name=staged.label, lora_path=str(path)),
        prompt_token_ids=[5, 6, 7],
        prompt_embeds=None,
        resumable=False,
        sampling_params=Sampling(skip_reading_prefix_cache=False, prompt_logprob_token_ids=None),
        cache_salt=None,
    )
    for name, value in changes.items():
        setattr(request, name, value)
    config = Thing(kv_transfer_config=transfer, model_config=model)
    config.lora_config = Thing(target_modules=list(LINEARS))
    return config, request


def another():
    """A model with another backbone."""
    return compacted("llama", memories=("en",), changes={"hidden_size": 32})


def test_a_request_gets_as_many_placeholders_as_learned_keys(saved):
    config, request = made(saved)
    requests.check_request(config, request)
    changed = requests.with_placeholders(request)
    assert changed.prompt_token_ids == [5] * 7 + [5, 6, 7]
    assert request.prompt_token_ids == [5, 6, 7] and changed.cache_salt is None


def test_prompt_logprobs_read_the_learned_keys_and_nothing_else(saved):
    _, request = made(saved)
    request.sampling_params.skip_reading_prefix_cache = True
    first, second = (requests.with_placeholders(request) for _ in range(2))
    assert not first.sampling_params.skip_reading_prefix_cache
    assert request.sampling_params.skip_reading_prefix_cache and request.cache_salt is None
    assert first.cache_salt and first.cache_salt != second.cache_salt


def test_a_request_without_a_memory_is_left_alone(saved):
    config, request = made(saved, lora_request=None)
    requests.check_request(config, request)
    stranger = Thing(lora_name="x", lora_path=str(saved))
    requests.check_request(config, made(saved, lora_request=stranger)[1])


REFUSED = {
    "embeddings": ({"prompt_embeds": object()}, "got prompt_embeds"),
    "streaming": ({"resumable": True}, "got streaming input"),
    "pooling": ({"sampling_params": None}, "got pooling"),
    "too long": ({"prompt_token_ids": [5] * 25}, "must leave room for a token in max_model_len"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_served_whole_is_refused(saved, case):
    changes, message = REFUSED[case]
    config, request = made(saved, **changes)
    with pytest.raises(ValueError, match=message):
        requests.check_request(config, request)


def test_the_longest_prompt_is_served(saved):
    config, request = made(saved, prompt_token_ids=[5] * 24)
    requests.check_request(config, request)


def test_an_engine_without_the_connector_is_refused(saved):
    config, request = made(saved)
    config.kv_transfer_config = None
    with pytest.raises(ValueError, match="has learned keys, which need kv_transfer_config"):
        requests.check_request(config, request)


def test_half_a_memory_is_refused(saved):
    path = str(saved / "memories/en/lora")
    config, request = made(saved, lora_request=Thing(lora_name="en", lora_path=path))
    with pytest.raises(ValueError, match="must be served with its learned keys, got its LoRA"):
        requests.check_request(config, request)


def test_a_memory_of_another_backbone_is_refused(saved, tmp_path):
    other = koff.save(another(), tmp_path / "other")
    config, request = made(saved)
    config.model_config.model = str(other)
    with pytest.raises(ValueError, match="must be served on its backbone, got another model"):
        requests.check_request(config, request)


def test_the_backbone_is_the_one_that_was_loaded(saved):
    config, request = made(saved)
    before = requests.backbone_of(str(saved))
    koff.save(another(), saved, overwrite=True)
    assert requests.backbone_of(str(saved)) == before
    later = made(saved)[1]
    with pytest.raises(ValueError, match="must be served on its backbone"):
        requests.check_request(config, later)


def test_a_lora_that_would_lose_a_part_is_refused(saved):
    config, request = made(saved)
    config.lora_config.target_modules = ["q_proj", "v_proj"]
    message = "must have all linear layers of memory 'en@.*', got none of down_proj, gate_proj, k_p"
    with pytest.raises(ValueError, match=message):
        requests.check_request(config, request)
    config.lora_config.target_modules = None  # vLLM's word for all
    requests.check_request(config, request)


def test_a_missing_hook_is_said_where_a_memory_is_served(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", Thing(__version__="9.9"))
    with pytest.raises(RuntimeError, match="must be one of 0.32 with the plugin koff, got 9.9"):
        plugin.check_hooks("vllm.v1.engine.core")


@pytest.mark.parametrize(
    ("sizes", "ranks"), [([8, 6], 4), ([8], 1)], ids=["not shared by ranks", "a layer short"]
)
def test_widths_that_do_not_fit_are_refused(monkeypatch, sizes, ranks):
    distributed = Thing(get_tensor_model_parallel_world_size=lambda: ranks)
    monkeypatch.setitem(sys.modules, "vllm", Thing(distributed=distributed))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    config = Thing(intermediate_sizes=sizes, num_hidden_layers=2)
    message = f"must hold 2 widths that {ranks} tensor-parallel ranks can share, got"
    with pytest.raises(ValueError, match=message):
        configs.widths_of(config)
    config.intermediate_sizes = [8, 4]
    assert configs.widths_of(config) == [8, 4]
