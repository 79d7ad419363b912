"""generate: mixed memories equal one at a time, in every decoding mode."""

import pytest
import torch
from models import ARCHITECTURES, attached, tokens

import koff

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
