"""What users of transformers, PEFT, accelerate and torch do to a model out of habit: on an attached
one it does what they mean, or is refused."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.character_tokenizer import make_tokenizer
from support.models import VOCAB, attached, same, tiny, tokens
from support.trainings import DOMAINS, arguments, fresh
from support.widths import spread
from transformers import DynamicCache, EarlyStoppingCallback, TrainerCallback, pipeline

import koff

pytestmark = pytest.mark.usefixtures("no_real_fsync")

MIX = ["es", None, "keys"]
FP32 = 1e-5  # the same sums in another order


def soft():
    return spread(attached("llama", target_sparsity=0.4))


def masked():
    model = soft()
    koff.binarize(model, multiple_of=1)
    return model


STAGES = {"soft": soft, "masked": masked, "compacted": lambda: koff.compact(masked())}


@torch.no_grad()
def logits(model, memory=MIX, **kwargs):
    return model(tokens(), memory=memory, **kwargs).logits


@pytest.fixture(scope="module")
def small():
    return koff.compact(masked())


# ---- the model as an object ----


def test_attach_keeps_the_mode():
    """from_pretrained gives a model in evaluation mode; its gates must not draw samples there."""
    for training in (False, True):
        base, model = (tiny("llama").train(training) for _ in range(2))
        config = koff.KoffConfig(("en",), kv=koff.KVConfig(3, init="normal"))
        koff.attach(model, config)
        assert {module.training for module in model.modules()} == {training}
        if not training:
            assert torch.equal(model(tokens()).logits, base(tokens()).logits)


@pytest.mark.parametrize("stage", STAGES)
def test_half_and_back_is_near_and_keeps_what_is_learned(stage):
    model = STAGES[stage]()
    want, learned = logits(model), {n: p.clone() for n, p in model.koff.named_parameters()}
    for cast, u in (("half", 2**-11), ("bfloat16", 2**-8)):
        low = getattr(copy.deepcopy(model), cast)()
        assert same(dict(low.koff.named_parameters()), learned)
        got = logits(low).float()
        # Some twenty roundings one after another, each of at most u of values as large as these.
        assert 0 < (got - want).abs().max() < 20 * u * want.abs().max()
        assert torch.equal(logits(low.float()), logits(low))


@pytest.mark.parametrize("stage", STAGES)
def test_more_tokens_in_the_vocabulary(stage, tmp_path):
    model = STAGES[stage]()
    want = logits(model)
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "koff" not in n)
    assert (logits(model)[..., :VOCAB] - want).abs().max() < FP32
    if stage == "compacted":
        koff.save(model, tmp_path / "out")
        assert torch.equal(logits(koff.load(tmp_path / "out")), logits(model))
    assert koff.detach(model).lm_head.out_features == VOCAB + 5


def test_whoever_asks_for_gradients_of_the_base_is_told():
    model = soft().requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"weights\[0\] must be frozen .* got requires_grad=True; call"
    ):
        model(tokens(), memory="en")


@pytest.mark.parametrize("name", ["adapter_names", "memories"])
def test_the_words_of_others_for_the_memory_are_refused(small, name):
    """transformers drops what it does not know, and the rows would have no memory."""
    with pytest.raises(TypeError, match=f"must be given as memory, got {name}; pass memory="):
        small(tokens(), **{name: MIX})
    assert torch.equal(small(tokens(), **{name: None}).logits, small(tokens()).logits)


def test_calls_without_a_module(small):
    state = dict(small.named_parameters())
    out = torch.func.functional_call(small, state, (tokens(),), {"memory": MIX}).logits
    assert torch.equal(out, logits(small))


# ---- what lies around a model, or in the place of a part ----


def test_a_compiled_model_is_the_model_inside(tmp_path):
    """compact gave torch.compile's wrapper the class of a narrow model, and save then failed."""
    model = masked()
    compiled = torch.compile(model, backend="eager")
    narrow = koff.compact(compiled)
    assert type(compiled).__name__ == "OptimizedModule" and not hasattr(narrow, "_orig_mod")
    assert (logits(narrow) - logits(model)).abs().max() < FP32
    koff.save(torch.compile(narrow, backend="eager"), tmp_path / "out")
    assert torch.equal(logits(koff.load(tmp_path / "out")), logits(narrow))
    koff.export_merged(torch.compile(narrow, backend="eager"), "en", tmp_path / "merged")
    assert koff.detach(compiled) is model and not hasattr(model, "koff")


def test_another_wrapper_is_named(tmp_path):
    model = masked()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    around = "must be the one that koff was attached to, got a PeftModel around it; take it off"
    for name, call in {
        "compact": koff.compact,
        "detach": koff.detach,
        "koff.save": lambda model: koff.save(model, tmp_path / "out"),
        "koff.export_merged": lambda model: koff.export_merged(model, "en", tmp_path / "out"),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: the model {around}"):
            call(wrapped)
        with pytest.raises(ValueError, match=f"{name}: .*, got DataParallel; pass its .module"):
            call(torch.nn.DataParallel(model))
    assert type(wrapped).__name__ == "PeftModel" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_around_head_or_embeddings_is_refused_before_the_training(target):
    """It was seen by koff.save alone."""
    model = tiny("qwen2")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(TypeError, match=f"attach: .* no adapters, got one of PEFT's on .*{target}"):
        koff.attach(model, koff.KoffConfig(("en",)))
    koff.attach(wrapped.unload(), koff.KoffConfig(("en",)))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_linear_layer_in_the_place_of_koffs_is_refused(stage, name):
    """It would compute without any memory's LoRA, and with its neurons in another order."""
    model = STAGES[stage]()
    layer, own = model.model.layers[1], model.model.layers[1].get_submodule(name)
    layer.set_submodule(name, torch.nn.Linear(own.in_features, own.out_features, bias=False))
    with pytest.raises(TypeError, match=r"forward: .*_proj must be .* got a torch\.nn\..*Linear"):
        logits(model)
    layer.set_submodule(name, own)
    logits(model)


# ---- calls ----


def test_embeddings_in_the_place_of_ids(small):
    ids, embeddings = tokens(), small.get_input_embeddings()(tokens())
    assert torch.equal(small(inputs_embeds=embeddings, memory=MIX).logits, logits(small))
    asked = dict(memory=MIX, max_new_tokens=4, do_sample=False)
    got = small.generate(inputs_embeds=embeddings, **asked)
    assert torch.equal(got, small.generate(ids, **asked)[:, ids.shape[1] :])


def test_caches_that_users_cut_copy_and_rebuild(small):
    ids, want = tokens(), logits(small)
    with torch.no_grad():
        cache = small(ids[:, :6], memory=MIX, use_cache=True).past_key_values
        go_on = dict(memory=MIX, past_key_values=copy.deepcopy(cache))
        assert (small(ids[:, 6:], **go_on).logits - want[:, 6:]).abs().max() < FP32
        cut = copy.deepcopy(cache)
        cut.crop(-2)
        got = small(ids[:, 4:], memory=MIX, past_key_values=cut).logits
        assert (got - want[:, 4:]).abs().max() < FP32
        with pytest.raises(ValueError, match="must go on under the memory that they began with"):
            small(ids[:, 6:], past_key_values=cache)
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(ValueError, match="must be empty or come from this model"):
            small(ids[:, 6:], memory=MIX, past_key_values=rebuilt)


def test_sampled_and_returned_rows_have_the_memory_of_their_prompt(small):
    ids, asked = tokens(), dict(max_new_tokens=4, num_beams=4, num_return_sequences=2)
    got = small.generate(ids, memory=MIX, do_sample=False, **asked)
    for row, name in enumerate(MIX):
        one = small.generate(ids[row : row + 1], memory=name, do_sample=False, **asked)
        assert torch.equal(got[2 * row : 2 * row + 2, : one.shape[1]], one)
    with pytest.raises(ValueError, match=r"must have one entry per row \(3\), got 6"):
        small.generate(ids, memory=MIX * 2, num_return_sequences=2, do_sample=True)


def test_a_mode_that_is_switched_amid_a_generate_changes_nothing(small):
    model = copy.deepcopy(small).train()

    def switch(ids, scores, **kwargs):
        model.train(not model.training)
        return torch.zeros(len(ids), dtype=torch.bool)

    asked = dict(memory=MIX, max_new_tokens=5, do_sample=False)
    got = model.generate(tokens(), stopping_criteria=[switch], **asked)
    assert torch.equal(got, small.generate(tokens(), **asked))


def test_a_pipeline_passes_the_memory_on(small):
    tokenizer = make_tokenizer()
    tell = pipeline("text-generation", model=copy.deepcopy(small), tokenizer=tokenizer)
    asked = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    told = {name: tell("abc", memory=name, **asked) for name in ("es", None)}
    assert told["es"] != told[None] == tell("abc", **asked)
    with koff.use_memory(tell.model, "es"):
        assert tell("abc", **asked) == told["es"]


def test_attention_that_is_not_there_is_said(small):
    with pytest.warns(RuntimeWarning, match="output_attentions gives none; koff.prefix_attention_"):
        assert not small(tokens(), memory=MIX, output_attentions=True).attentions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(small)


# ---- trainings that end early ----


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_is_stopped_before_its_mask_was_fixed_can_be_compacted(tmp_path):
    model = fresh(target_sparsity=0.3)
    args = arguments(tmp_path, max_steps=6, fix_mask_at=0.9)
    run = koff.KoffTrainer(model, args, DOMAINS, callbacks=[Stop()])
    run.train()
    assert run.state.global_step == 2 and not model.koff.gates.fixed
    koff.binarize(model, multiple_of=1)
    assert (logits(koff.compact(model.eval())) - logits(model)).abs().max() < FP32


def test_early_stopping_by_the_loss_of_evaluations(tmp_path):
    settings = dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
    args = arguments(tmp_path, max_steps=6, greater_is_better=True, **settings)
    stop = EarlyStoppingCallback(1)  # told that more is better, it stops when the loss falls
    run = koff.KoffTrainer(fresh(), args, DOMAINS, eval_datasets=DOMAINS, callbacks=[stop])
    run.train()
    assert run.state.global_step < 6
