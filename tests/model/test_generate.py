"""generate: mixed memories equal one at a time, in every decoding mode."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.models import ARCHITECTURES, attached, tiny, tokens

import koff
from koff.model.forward_context import ACTIVE

MIX = ["es", None, "keys"]
NEW = 8


def generate(model, ids, memory, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, memory=memory, **kwargs)


def equals_one_at_a_time(got, model, ids, **kwargs):
    """Each row of ``got`` is what its memory alone generates; rows that end early are padded."""
    for row, name in enumerate(MIX):
        alone = generate(model, ids[row : row + 1], name, **kwargs)[0]
        if not torch.equal(got[row, : len(alone)], alone):
            return False
    return True


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return attached(request.param)


def test_greedy_mixed_equals_one_at_a_time(model):
    ids = tokens()
    got = generate(model, ids, MIX)
    assert equals_one_at_a_time(got, model, ids)
    plain = generate(model, ids, None)
    assert not torch.equal(got, plain)


def test_generated_text_is_the_argmax_of_forward(model):
    ids = tokens()
    got = generate(model, ids, MIX, min_new_tokens=NEW)
    logits = model(got[:, :-1], memory=MIX).logits[:, ids.shape[1] - 1 :]
    logits[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), got[:, ids.shape[1] :])


def test_static_cache_equals_dynamic(model):
    ids = tokens()
    static = generate(model, ids, MIX, cache_implementation="static")
    assert torch.equal(static, generate(model, ids, MIX))


def test_beams_equal_one_at_a_time(model):
    ids = tokens()
    got = generate(model, ids, MIX, num_beams=3)
    assert equals_one_at_a_time(got, model, ids, num_beams=3)
    several = generate(model, ids, MIX, num_beams=3, num_return_sequences=2)
    assert several.shape[0] == 6 and torch.equal(several[::2, : got.shape[1]], got)


def test_left_padding_equals_no_padding(model):
    ids = tokens()
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(16) >= 5).long().expand(3, -1)
    wanted = generate(model, ids, MIX)
    for cache in ("dynamic", "static"):
        kwargs = {} if cache == "dynamic" else {"cache_implementation": cache}
        got = generate(model, padded, MIX, attention_mask=mask, **kwargs)
        assert torch.equal(got[:, 5:], wanted)


def test_rows_padded_differently_equal_rows_alone(model):
    rows = [tokens(1, n, seed=n)[0] for n in (3, 9, 6)]
    padded = torch.stack([torch.nn.functional.pad(r, (9 - len(r), 0)) for r in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - len(r)).long() for r in rows])
    got = generate(model, padded, MIX, attention_mask=mask)
    for row, (ids, name) in enumerate(zip(rows, MIX, strict=True)):
        alone = generate(model, ids[None], name)[0]
        assert torch.equal(got[row, 9 - len(ids) :][: len(alone)], alone)


def test_sampling_repeats_under_a_seed_and_uses_the_memory(model):
    ids = tokens(1).expand(4, -1)

    def sample(memory):
        torch.manual_seed(11)
        return generate(model, ids, memory, do_sample=True, min_new_tokens=NEW)

    assert torch.equal(sample("en"), sample(["en"] * 4))
    assert not torch.equal(sample("en"), sample("es"))


def test_use_memory_reaches_generate(model):
    ids = tokens()
    with koff.use_memory(model, MIX):
        got = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, generate(model, ids, MIX))


def test_assisted_and_plain_generation_agree_without_memory(model):
    ids = tokens()
    got = generate(model, ids, None)
    assert torch.equal(got, model.generate(ids, max_new_tokens=NEW, do_sample=False))


def test_one_memory_in_a_list_is_that_memory(model):
    """Also where transformers runs forwards of its own, or a second model."""
    ids = tokens(1)
    for kwargs in (dict(guidance_scale=2.0), dict(assistant_model=tiny("llama"))):
        wanted = generate(model, ids, "en", **kwargs)
        assert torch.equal(generate(model, ids, ["en"], **kwargs), wanted)
        assert not torch.equal(generate(model, ids, None, **kwargs), wanted)


def test_guidance_needs_one_memory(model):
    with pytest.raises(ValueError, match="guidance_scale must be 1 or None.*got 2.0"):
        generate(model, tokens(), MIX, guidance_scale=2.0)
    config = copy.deepcopy(model.generation_config)
    config.guidance_scale = 1.5
    with pytest.raises(ValueError, match="guidance_scale must be 1 or None.*got 1.5"):
        generate(model, tokens(), MIX, generation_config=config)


def test_threads_generate_side_by_side():
    model, ids = attached("llama"), tokens()
    names = ["en", "es", MIX, None] * 3
    wanted = [generate(model, ids, name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda name: generate(model, ids, name), names))
    assert all(map(torch.equal, got, wanted))
    with koff.use_memory(copy.deepcopy(model), "en") as other:  # which says nothing to the model
        assert torch.equal(generate(other, ids, ACTIVE), wanted[0])
        assert torch.equal(generate(model, ids, ACTIVE), wanted[3])


def test_another_attention_that_would_drop_the_cache_is_refused(model):
    wanted = model(tokens(), memory="en").logits
    model.set_attn_implementation("sdpa")
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match="attention implementation must be 'koff'.*got sdpa"):
        model(tokens(), memory="en")
    model.set_attn_implementation("koff")
    assert torch.equal(model(tokens(), memory="en").logits, wanted)
    without = attached("llama", kv=None)
    without.set_attn_implementation("eager")
    assert without(tokens(), memory="en").logits.isfinite().all()


def test_models_made_in_inference_mode_generate(tmp_path):
    folder = koff.save(koff.compact(attached("llama", target_sparsity=0.2)), tmp_path / "out")
    wanted = generate(koff.load(folder), tokens(), MIX)
    with torch.inference_mode():
        assert torch.equal(generate(koff.load(folder), tokens(), MIX), wanted)


def test_right_padding_is_refused(model):
    ids = tokens()
    ids[0, -2:] = 0
    mask = (ids != 0).long()
    for kwargs in ({"attention_mask": mask}, {}):
        with pytest.raises(ValueError, match="must be padded on the left, got rows that end in"):
            generate(model, ids, MIX, **kwargs)


def test_wrong_memories_are_refused(model):
    with pytest.raises(KeyError, match="must be one of the model's"):
        generate(model, tokens(), "de")
    with pytest.raises(ValueError, match=r"must have one entry per row \(3\), got 2"):
        generate(model, tokens(), ["en", "es"])
    with pytest.raises(ValueError, match="memroy"):
        model.generate(tokens(), memroy="en", max_new_tokens=2)
