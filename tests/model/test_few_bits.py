"""A base in few bits: attach changes nothing, gradients are those of its dequantised weights, and
what koff does not know is refused."""

import pytest
import torch
from support import activation_checkpointing
from support.few_bits import FORMATS, checkpoint, dequantised, quantised, with_koff
from support.models import same, tiny, tokens
from torch import nn

import koff
from koff.model import arch
from koff.model.few_bits import dense_weight, kind
from koff.model.state import count_weights

pytestmark = pytest.mark.few_bits

MEMORIES = ["en", None, "fr"]
every_format = pytest.mark.parametrize("name", FORMATS)
# Whose forward is by its dequantised weights in eval mode, too.
weight_only = pytest.mark.parametrize("name", ["nf4", "int8"])


def logits(model, **options):
    with torch.no_grad():
        return model(tokens(), **options).logits


def gradients(model, seed=0):
    """Loss and gradients of all that is learned, with gates drawn alike."""
    model.train()
    torch.manual_seed(seed)
    loss = model(tokens(), labels=tokens(), memory=MEMORIES).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad for n, p in model.koff.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_format
def test_few_bits_attach_is_bit_equal(name, dtype, architecture):
    model = quantised(name, architecture, dtype)
    before, kinds = logits(model), [kind(linear) for _, linear in arch.sites(model)]
    koff.attach(model, koff.KoffConfig(memories=("en",), target_sparsity=0.3))
    assert None not in kinds
    with model.koff.gates.held_open():
        assert torch.equal(logits(model), before)
    koff.detach(model)
    assert [kind(linear) for _, linear in arch.sites(model)] == kinds
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "qwen3_5_text"])
@every_format
def test_few_bits_gradients_are_those_of_dequantised_weights(name, architecture):
    """Both compute in fp32. Sums are the same but for torchao's, which multiplies by a row's scale
    behind the product instead of before it: K + 1 more roundings, K the width of a layer."""
    model = with_koff(quantised(name, architecture))
    plain = with_koff(dequantised(quantised(name, architecture), architecture))
    plain.koff.load_state_dict(model.koff.state_dict())
    (loss, found), (wanted_loss, wanted) = gradients(model), gradients(plain)
    assert found.keys() == wanted.keys() and len(found) > 20
    assert torch.allclose(loss, wanted_loss, rtol=1e-5)
    for key, gradient in wanted.items():
        error = (found[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-4, (key, float(error))


@every_format
def test_few_bits_nothing_dequantised_is_kept_for_backward(name):
    def kept(model, **options):
        """Shapes of floating matrices that are as large as the weight of a layer."""
        sizes = {x.out_features * x.in_features for _, x in arch.sites(model)}
        found = set()

        def pack(tensor):
            if tensor.is_floating_point() and tensor.dim() == 2 and tensor.numel() in sizes:
                found.add(tuple(tensor.shape))
            return tensor

        embeds = model.get_input_embeddings()(tokens(1, 3)).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(inputs_embeds=embeds, **options)
        return found

    assert not kept(with_koff(quantised(name)), memory="en")
    if name == "int8":  # torchao's own forward keeps each weight in the dtype of the model
        assert kept(quantised(name))


def test_few_bits_training_after_an_evaluation_has_gradients():
    """bitsandbytes packs 4-bit layers anew in eval mode where a processor has AVX512-BF16; behind
    them nothing had a gradient any more."""
    model = quantised("nf4")
    for _, linear in arch.sites(model):
        linear.support_avx512bf16_for_cpu = True  # so that it would do it on every machine
    with_koff(model)
    wanted = gradients(model)[1]
    model.zero_grad()
    model.eval()
    logits(model, memory="en")
    found = gradients(model)[1]
    assert same(found, wanted)


def test_few_bits_a_layer_that_was_packed_anew_is_refused():
    model = quantised("nf4")
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="up_proj of layer 1 must be as it was loaded, got"):
        with_koff(model)


@weight_only
def test_few_bits_checkpointing_and_recomputing_give_the_same_gradients(name):
    import koffkernels

    model = with_koff(quantised(name))
    wanted = gradients(model)[1]
    model.zero_grad()
    with koffkernels.recompute_hidden():
        assert same(gradients(model)[1], wanted)
    model.zero_grad()
    activation_checkpointing.enable(model, False)
    assert same(gradients(model)[1], wanted)


@every_format
def test_few_bits_a_mask_multiplies_and_moves_nothing(name):
    model = with_koff(quantised(name))
    before = {site: dense_weight(linear, torch.float32) for site, linear in arch.sites(model)}
    koff.binarize(model, multiple_of=1, token_ids=tokens())
    assert same(
        {site: dense_weight(linear, torch.float32) for site, linear in arch.sites(model)}, before
    )
    plain = with_koff(dequantised(quantised(name)))
    plain.koff.load_state_dict(model.koff.state_dict())
    koff.binarize(plain, multiple_of=1)
    if name != "llm_int8":  # which rounds what goes into a layer, in eval mode
        found, wanted = (logits(m.eval(), memory=MEMORIES) for m in (model, plain))
        assert torch.allclose(found, wanted, atol=1e-5)


@weight_only
def test_few_bits_generates_as_its_dequantised_weights(name):
    model = with_koff(quantised(name)).eval()
    plain = with_koff(dequantised(quantised(name))).eval()
    plain.koff.load_state_dict(model.koff.state_dict())
    options = dict(memory=MEMORIES, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    assert torch.equal(model.generate(tokens(), **options), plain.generate(tokens(), **options))


@every_format
def test_few_bits_hooks_on_a_layer_are_called(name):
    model = with_koff(quantised(name))
    before, seen = logits(model, memory="en"), []
    linear = model.model.layers[0].mlp.up_proj
    hook = linear.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(logits(model, memory="en"), before, atol=0.5, rtol=0.5)
    hook.remove()
    assert seen


@every_format
def test_few_bits_weights_are_counted_as_weights(name):
    model = quantised(name)
    model.koff = None
    assert count_weights(model) == count_weights(tiny("llama"))


def test_few_bits_dequantised_by_transformers_are_the_same():
    """``dense_weight`` against transformers' own way."""
    for name in ("nf4", "llm_int8"):
        model, own = quantised(name), quantised(name).dequantize()
        for (site, linear), (_, plain) in zip(arch.sites(model), arch.sites(own), strict=True):
            wanted = plain.weight.float()
            torch.testing.assert_close(dense_weight(linear, torch.float32), wanted), site


# ---- what is refused ----


def test_few_bits_of_an_unknown_method_are_refused():
    for method in ("gptq", "awq", "fp8", "hqq"):
        model = tiny("llama")
        model.config.quantization_config = {"quant_method": method}
        with pytest.raises(ValueError, match=f"by bitsandbytes or torchao, got {method}; load it"):
            with_koff(model)


def test_few_bits_of_an_unknown_layer_are_refused():
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    model = quantised("int8")
    layer = nn.Linear(64, 96, bias=False)
    quantize_(layer, Float8WeightOnlyConfig())
    model.model.layers[2].mlp.gate_proj = layer
    with pytest.raises(TypeError, match="gate_proj of layer 2 must .* got torchao.*Float8Tensor"):
        with_koff(model)


def test_few_bits_that_train_and_a_quantised_head_are_refused():
    model = quantised("llm_int8")
    model.model.layers[0].self_attn.q_proj.state.has_fp16_weights = True
    with pytest.raises(ValueError, match="q_proj of layer 0 must hold int8 weights"):
        with_koff(model)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = quantised("int8", "qwen3")
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    with pytest.raises(ValueError, match="the output embeddings must not be quantised"):
        with_koff(model)


def test_few_bits_are_left_alone_by_apply_kernels():
    for name in FORMATS:
        with pytest.raises(ValueError, match="got none that fits"):
            koff.apply_kernels(quantised(name))


def test_few_bits_are_not_saved(tmp_path):
    config = koff.KoffConfig(memories=("en",), kv=None, target_sparsity=0)
    model = koff.attach(quantised("nf4"), config)
    said = "must be plain, got one in few bits; call koff.compact"
    with pytest.raises(ValueError, match=f"koff.save: the base {said}"):
        koff.save(model, tmp_path / "out")
    for export in (koff.export_merged, koff.export_gguf):
        with pytest.raises(ValueError, match=said):
            export(model, *(["en"] if export is koff.export_merged else []), tmp_path / "out")
    assert not (tmp_path / "out").exists() and checkpoint().exists()
