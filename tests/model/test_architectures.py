"""What must be true of an architecture for koff to be right on it, for every entry of arch.py."""

import copy

import pytest
import torch
from peft import CartridgeConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import activation_checkpointing, bare
from support.character_tokenizer import make_tokenizer
from support.models import NAMES, attached, tiny, tokens
from support.trainings import LORA, trainer
from support.widths import compacted, spread
from transformers import AutoModelForCausalLM

import koff
from koff.model import arch
from koff.model.prefill import fill_from_tokens

pytestmark = [
    pytest.mark.usefixtures("no_real_fsync"),
    pytest.mark.parametrize("architecture", arch.ARCHITECTURES),
]

FP32 = 1e-5  # sums of up to ~100 products in another order, three layers deep, logits of size ~1
MEMORIES = ("en", None, ["es", None, "keys"])
# Initial weights of transformers' usual 0.02 make attention nearly uniform, and a key that stands
# in the wrong place would go unnoticed: it moves logits by 1e-3, with these by 0.3 and more.
SHARP = {"initializer_range": 0.1}


@torch.no_grad()
def test_a_cache_taken_over_as_a_memory_gives_the_logits_of_its_tokens(architecture):
    """The learned cache stands where the tokens stood: rotation, scaling, masks, all of it."""
    base, ids, before = tiny(architecture, **SHARP), tokens(), tokens(1, 7, seed=9)
    text = torch.cat([before.expand(3, -1), ids], 1)
    wanted, alone = base(text).logits[:, 7:], base(ids).logits
    wanted_tokens = base.generate(text, max_new_tokens=6, do_sample=False)[:, 7:]
    config = koff.KoffConfig(("a",), target_sparsity=0, lora=None, kv=koff.KVConfig(7))
    model = koff.attach(base, config).eval()
    fill_from_tokens(model, "a", before)
    assert (model(ids, memory="a").logits - wanted).abs().max() < FP32
    assert (wanted - alone).abs().max() > 0.1
    for cache in (None, "static"):
        asked = dict(max_new_tokens=6, do_sample=False, cache_implementation=cache)
        assert torch.equal(model.generate(ids, memory="a", **asked), wanted_tokens)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(15) >= 4).long().expand(3, -1)
    got = model(padded, attention_mask=mask, memory="a").logits[:, 4:]
    assert (got - wanted).abs().max() < FP32


def test_attach_changes_no_bit_and_detach_gives_the_base_back(architecture):
    base, model, ids = tiny(architecture), tiny(architecture), tokens()
    wanted, state = base(ids).logits, base.state_dict()
    koff.attach(model, koff.KoffConfig(("en",), kv=koff.KVConfig(5, init="tokens"))).eval()
    assert torch.equal(model(ids).logits, wanted)
    assert (model(ids, memory="en").logits - wanted).abs().max() > 0.01
    koff.binarize(spread(model), target=0.4, multiple_of=1)
    assert (model(ids).logits - wanted).abs().max() > 1e-3
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith("koff.")}
    for found in (kept, koff.detach(model).state_dict()):
        assert found.keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in found.items())
    assert torch.equal(model(ids).logits, wanted) and type(model) is type(base)


def test_masked_equals_compacted_and_mixed_equals_single(architecture, tmp_path):
    masked, ids = spread(attached(architecture, target_sparsity=0.4)), tokens()
    koff.binarize(masked, multiple_of=1)
    small = koff.compact(masked)
    assert len(set(arch.widths(small))) > 1
    for module in arch.mlps(small):
        for linear in arch.mlp_linears(module).values():
            assert linear.weight.shape == (linear.out_features, linear.in_features)
    for memory in MEMORIES:
        wanted = masked(ids, memory=memory).logits
        assert (small(ids, memory=memory).logits - wanted).abs().max() < FP32
    for row, name in enumerate(MEMORIES[-1]):
        single = masked(ids[row : row + 1], memory=name).logits[0]
        assert (wanted[row] - single).abs().max() < FP32
    assert (wanted - masked(ids).logits)[[0, 2]].abs().amax((1, 2)).min() > 0.01
    koff.save(small, tmp_path / "out")
    loaded = koff.load(tmp_path / "out")
    for memory in MEMORIES:
        assert torch.equal(loaded(ids, memory=memory).logits, small(ids, memory=memory).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(plain(ids).logits, small(ids).logits)


def test_equal_widths_give_a_stock_model(architecture, tmp_path):
    model = spread(attached(architecture, target_sparsity=0.4, kv=None))
    koff.binarize(model, per_layer="uniform", multiple_of=8)
    small = koff.compact(model, inplace=True)
    assert small.config.model_type == architecture
    koff.export_merged(small, "en", tmp_path / "en")
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "en", output_loading_info=True)
    assert type(stock) is arch.stock_classes(architecture)[1]
    assert not any(report.values())
    wanted = small(tokens(), memory="en").logits
    assert (stock(tokens()).logits - wanted).abs().max() < FP32


@torch.no_grad()
def test_an_adapter_of_somebody_else_on_the_mlp_counts(architecture):
    model, ids, memory = spread(attached(architecture, target_sparsity=0.4)), tokens(), MEMORIES[-1]
    koff.binarize(model, multiple_of=1)
    bare = model(ids, memory=memory).logits
    names = list(arch.ARCHITECTURES[architecture].mlp_linears)
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    under = wrapped(ids, memory=memory).logits  # its layers are called one by one
    merged = wrapped.merge_and_unload()(ids, memory=memory).logits
    assert (merged - under).abs().max() < FP32
    assert (under - bare).abs().max() > 1e-3


def test_it_trains_is_pruned_on_the_way_and_learns(architecture, tmp_path):
    base = tiny(architecture, initializer_range=0.3)
    config = koff.KoffConfig(NAMES, target_sparsity=0.3, lora=LORA, kv=koff.KVConfig(3))
    model = koff.attach(base, config)
    before = {name: p.detach().clone() for name, p in model.koff.named_parameters()}
    run = trainer(
        tmp_path, model, max_steps=4, fix_mask_at=0.5, **activation_checkpointing.arguments()
    )
    run.train()
    assert model.koff.gates.fixed and model.koff.gates.kept_first
    for name, p in model.koff.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
    wanted = model.eval()(tokens(), memory="es").logits
    small = koff.compact(model)
    assert (small(tokens(), memory="es").logits - wanted).abs().max() < FP32 * wanted.abs().max()


def loss_of(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits.square().mean()


def compare(ours, theirs, exact=None):
    """Gradients side by side; where they are known in fp64, ours may also be as far from them as
    twice what theirs are: both are sums in some order, and behind a norm of q and k they cancel."""
    assert ours.keys() == theirs.keys() and ours
    for name, grad in ours.items():
        scale = theirs[name].abs().max()
        assert scale > 0, name
        if exact is None:
            assert (grad - theirs[name]).abs().max() < 2e-5 * scale, name
        else:
            rounding = (theirs[name] - exact[name]).abs().max()
            assert (grad - exact[name]).abs().max() < max(2e-5 * scale, 2 * rounding), name


def peft_lora(architecture):
    """A LoRA of the dense base as PEFT has it, on every linear layer."""
    names = list(arch.ARCHITECTURES[architecture].linears)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(tiny(architecture), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    return model


def test_a_lora_of_peft_computes_and_learns_the_same_here(architecture, tmp_path):
    theirs, ids = peft_lora(architecture), tokens()
    theirs.save_pretrained(tmp_path / "lora")
    model = koff.attach(tiny(architecture), koff.KoffConfig(("x",), target_sparsity=0)).eval()
    koff.import_memory(model, "de", lora=tmp_path / "lora")
    assert (model(ids, memory="de").logits - theirs(ids).logits).abs().max() < FP32
    loss_of(model, ids, memory="de").backward()
    exact = copy.deepcopy(theirs).double()
    loss_of(theirs, ids).backward()
    loss_of(exact, ids).backward()
    grads = {}
    for site, weights in model.koff.memories["de"].sites():
        path = f"base_model.model.{arch.site_path(site, model)}"
        layers = theirs.get_submodule(path), exact.get_submodule(path)
        for part, p in (("lora_A", weights.a), ("lora_B", weights.b)):
            others = [getattr(layer, part).default.weight.grad for layer in layers]
            grads[f"{site} {part}"] = p.grad, *others
    compare(*({name: three[i] for name, three in grads.items()} for i in range(3)))


@torch.no_grad()
def test_a_lora_of_the_dense_base_is_cut_to_the_kept_neurons(architecture, tmp_path):
    theirs, ids = peft_lora(architecture), tokens()
    theirs.save_pretrained(tmp_path / "lora")
    masked = spread(attached(architecture, target_sparsity=0.4, kv=None))
    koff.binarize(masked, multiple_of=1)
    small = koff.compact(masked)
    for model in (masked, small):
        koff.import_memory(model, "de", lora=tmp_path / "lora")
    wanted = masked(ids, memory="de").logits
    assert (small(ids, memory="de").logits - wanted).abs().max() < FP32
    assert (wanted - theirs(ids).logits).abs().max() > 1e-3  # pruned is not dense


def test_a_cartridge_of_peft_computes_and_learns_the_same_here(architecture, tmp_path):
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=0)
    theirs, ids = get_peft_model(tiny(architecture, **SHARP), config).eval(), tokens()
    (learned,) = [p for p in theirs.prompt_encoder.parameters() if p.requires_grad]
    with torch.no_grad():
        learned.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / "kv")
    base = tiny(architecture, **SHARP)
    model = koff.attach(base, koff.KoffConfig(("x",), target_sparsity=0)).eval()
    if arch.is_hybrid(model):
        with pytest.raises(ValueError, match="got a CARTRIDGE; it has no states for them"):
            koff.import_memory(model, "de", kv=tmp_path / "kv")
        return
    koff.import_memory(model, "de", kv=tmp_path / "kv")
    got = model(ids, memory="de").logits
    want = theirs(ids, attention_mask=torch.ones_like(ids)).logits
    assert (got - want).abs().max() < FP32
    got.square().mean().backward()
    want.square().mean().backward()
    # PEFT's layout is [P, layers, key and value, kv heads, head width].
    parts = [p.grad.transpose(0, 1) for kv in model.koff.memories["de"].kv for p in (kv.k, kv.v)]
    ours = torch.stack(parts, 1).reshape(5, -1)
    compare({"cache": ours}, {"cache": learned.grad})


@pytest.fixture(scope="module")
def without_koff(tmp_path_factory, bare_python):
    """A pruned model of each architecture, and what transformers and PEFT alone compute of it."""
    place, tokenizer = tmp_path_factory.mktemp("folders"), make_tokenizer(bos_token="<s>")
    ids = tokenizer(["abc de", "fgh aX"], return_tensors="pt").input_ids
    save_file({"ids": ids}, place / "inputs.safetensors")
    jobs, found = [], {}
    for architecture in arch.ARCHITECTURES:
        changes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": None}
        # The learned cache of a model with recurrent layers needs koff.
        lora_alone = {"kv": None} if arch.ARCHITECTURES[architecture].recurrent else {}
        small = compacted(architecture, memories=("en",), changes=changes, **lora_alone)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", lambda handle: None)
            folder = koff.save(small, place / architecture, tokenizer=tokenizer)
        home = folder / "memories/en"
        parts = {p: str(home / p) if (home / p).is_dir() else None for p in ("lora", "kv")}
        output = place / f"{architecture}.safetensors"
        files = {"inputs": str(place / "inputs.safetensors"), "output": str(output)}
        jobs.append({"folder": str(folder), "narrow": True, **parts, **files})
        found[architecture] = small, ids, output
    bare.compute(bare_python, jobs, place / "child")
    return found


@torch.no_grad()
def test_transformers_and_peft_open_it_without_koff(architecture, without_koff):
    model, ids, output = without_koff[architecture]
    logits = load_file(output)["logits"]
    assert (logits - model(ids, memory="en").logits).abs().max() < FP32
    assert (logits - model(ids).logits).abs().max() > 0.01
