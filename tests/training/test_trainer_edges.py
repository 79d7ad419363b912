"""What users of transformers' Trainer do with a KoffTrainer beside calling train once."""

import collections
import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from support import activation_checkpointing
from support.models import NAMES, VOCAB, tiny, tokens
from support.trainings import DOMAINS, GENERAL, arguments, fresh, learned, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import koff
from koff.training.optim import clip_groups


def test_resuming_before_the_mask_was_fixed_trains_the_gates_again(tmp_path):
    """On the trainer that has fixed it, and to the same end."""
    run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, fix_mask_at=0.5)
    run.train()
    first = learned(run.model)
    assert koff.sparsity(run.model).hard
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert koff.sparsity(run.model).hard
    assert koff.sparsity(run.model).mlp == pytest.approx(round(0.2 * 288) / 288)
    again = learned(run.model)
    assert all(torch.equal(again[name], t) for name, t in first.items())


@pytest.mark.parametrize(("every", "general"), [(0, None), (2, GENERAL), (4, GENERAL)])
def test_epochs_count_passes_over_the_domains(tmp_path, every, general):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, general_every=every)
    run = koff.KoffTrainer(fresh(), args, DOMAINS, general)
    rows = sum(len(source.blocks) for source in run.mixture.domains)
    steps = [batch[0][0] < len(NAMES) for batch in run.get_train_dataloader().batch_sampler]
    assert sum(steps) == math.ceil(2 * rows / 4) and steps[-1]
    few = {name: docs[:2] for name, docs in DOMAINS.items()}
    assert args.max_steps == -1  # the caller's own: the next trainer counts anew
    assert koff.KoffTrainer(fresh(), args, few, general).args.max_steps < run.args.max_steps


def test_mixed_precision_ends_with_the_training(tmp_path):
    run = trainer(tmp_path, bf16=True, max_steps=2)
    run.train()
    assert "forward" not in vars(run.model)
    again, ids = copy.deepcopy(run.model).eval(), tokens()
    assert torch.equal(again(ids, memory="en").logits, run.model.eval()(ids, memory="en").logits)
    koff.save(koff.compact(again, inplace=True), tmp_path / "out")
    loaded = koff.load(tmp_path / "out")
    assert torch.equal(loaded(ids, memory="en").logits, again(ids, memory="en").logits)
    seen = []
    run.model.model.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    run.train()  # once more, under autocast again
    other = trainer(tmp_path / "other", model=run.model, bf16=True, max_steps=2)
    other.train()
    assert len(seen) == 8 and all(seen)  # teacher and student of 2 steps, twice
    run.model(ids)
    assert not seen[-1] and "forward" not in vars(run.model)


def test_save_model_saves_what_koff_loads_or_says_how(tmp_path):
    run = trainer(tmp_path / "run", max_steps=2)
    run.train()
    with pytest.raises(ValueError, match=r"be without gates.*koff\.compact\(trainer\.model\)"):
        run.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    run = trainer(tmp_path / "dense", model=fresh(target_sparsity=0.0), max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "out"))
    want = run.model.eval()(tokens(), memory="en").logits
    assert torch.equal(koff.load(tmp_path / "out")(tokens(), memory="en").logits, want)


def test_gates_alone_end_with_a_checkpoint_and_an_evaluation(tmp_path):
    run = koff.KoffTrainer(
        fresh(memories=(), lora=None, kv=None),
        arguments(
            tmp_path,
            max_steps=8,
            save_strategy="steps",
            save_steps=100,
            eval_strategy="steps",
            eval_steps=100,
        ),
        DOMAINS,
        eval_datasets={"en": DOMAINS["en"][:4]},
    )
    run.train()
    steps = run.state.global_step
    assert steps < 8 and (tmp_path / f"checkpoint-{steps}").is_dir()
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [steps]


def test_evaluate_takes_domains_and_predict_is_refused(tmp_path):
    run = trainer(tmp_path, fresh(kv=koff.KVConfig(5, "normal")))
    assert run.evaluate({"en": DOMAINS["en"][:2]})["eval_en_perplexity"] > 1
    with pytest.raises(TypeError, match="eval_datasets must be a mapping, got list"):
        run.evaluate(DOMAINS["en"])
    with pytest.raises(ValueError, match="eval_datasets must be given, got none"):
        run.evaluate()
    with pytest.raises(ValueError, match="eval_datasets must name a domain, got none"):
        run.evaluate({})
    with pytest.raises(NotImplementedError, match="predict must not be called"):
        run.predict(DOMAINS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1),
            "lr_scheduler_type must be a function",
        ),
        (
            dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-4}),
            "min_lr of lr_scheduler_kwargs must not be set.*set min_lr_rate",
        ),
        (dict(save_strategy="epoch"), "save_strategy must be 'steps' or 'no'.*got 'epoch'"),
        (dict(eval_strategy="epoch"), "eval_strategy must be 'steps' or 'no'.*got 'epoch'"),
        (
            dict(ddp_find_unused_parameters=False),
            "ddp_find_unused_parameters must be True or left out .*, got False; leave it out",
        ),
        (dict(distractor_rows=1.5), "distractor_rows must lie in 0..1, got 1.5; change it"),
    ],
)
def test_settings_that_a_run_cannot_honour_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mask", ["learned", "magnitude"])
def test_a_multiple_by_which_nothing_can_be_removed_is_refused(tmp_path, mask):
    """Of an MLP with 96 neurons a multiple of 200 stays, or all."""
    with pytest.raises(
        ValueError,
        match=r"KoffTrainer: width_multiple_of must let 50 % of the MLP neurons go, got 200, by "
        r"which a layer can only keep 96; lower it, or change the target",
    ):
        trainer(tmp_path / "run", fresh(target_sparsity=0.5), width_multiple_of=200, mask=mask)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="width_multiple_of must let .* only keep 96; lower it"):
        model = fresh(target_sparsity=0.2, sparsity_scope="model")  # of all weights
        trainer(tmp_path / "run", model, width_multiple_of=200, mask=mask)
    # Where nothing is to be pruned, or by a caller who chooses another multiple then.
    trainer(tmp_path / "run", fresh(target_sparsity=0), width_multiple_of=200)
    own = dict(width_multiple_of=200, fix_mask_at=None)
    if mask == "learned":
        trainer(tmp_path / "run", fresh(target_sparsity=0.5), **own)


def test_a_share_of_each_rate_is_kept_by_cosine_with_min_lr_rate(tmp_path):
    kind = dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.5})
    run = trainer(tmp_path, max_steps=4, fix_mask_at=None, **kind)
    run.train()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == pytest.approx([0.5e-2, 0.5e-2, 0.1, 0.01])


def test_users_arguments_stay_as_they_are(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no")
    before = copy.deepcopy(args.to_dict())
    koff.KoffTrainer(fresh(kv=None), args, {n: d * 40 for n, d in DOMAINS.items()})
    assert args.to_dict() == before


@pytest.mark.parametrize(
    ("parallelism", "plugin", "message"),
    [
        ({"tp_size": 2}, None, "tp_size of parallelism_config must be 1, got a larger one; use D"),
        ({"cp_size": 2}, None, "cp_size of parallelism_config must be 1, got a larger one; use D"),
        ({"sp_size": 2}, None, "sp_size of parallelism_config must be 1, got a larger one; use D"),
        (None, dict(fsdp_version=1), "FSDP must be of version 2, got 1; set version to 2 in fsdp"),
        (
            {"dp_shard_size": 2},
            dict(fsdp_version=2, cpu_ram_efficient_loading=True),
            "cpu_ram_efficient_loading of FSDP must be False .*, got True; leave it out",
        ),
    ],
)
def test_ways_to_spread_a_model_that_koff_cannot_honour_are_refused(
    tmp_path, monkeypatch, parallelism, plugin, message
):
    """What transformers makes of a launcher's settings, most of which need GPUs, is put there."""

    def accelerated(run):
        config = parallelism and ParallelismConfig(**parallelism)
        run.accelerator = SimpleNamespace(
            parallelism_config=config, state=SimpleNamespace(fsdp_plugin=plugin)
        )
        run.is_fsdp_enabled = plugin is not None

    if plugin:
        plugin = SimpleNamespace(**{"cpu_ram_efficient_loading": False} | plugin)
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", accelerated)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arguments_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be TrainingArguments, got NoneType"):
        koff.KoffTrainer(fresh(), None, DOMAINS)
    with pytest.raises(TypeError, match="general_datasets must be a mapping, got list"):
        koff.KoffTrainer(fresh(), arguments(tmp_path), DOMAINS, [["a"]])
    with pytest.raises(TypeError, match=r"config must be a koff\.KoffConfig, got dict"):
        koff.attach(tiny("llama"), {"memories": ["en"]})
    alone, domains = fresh(memories=("en",)), {"en": DOMAINS["en"]}
    with pytest.raises(ValueError, match="distractor_rows must be 0 with fewer than two memories"):
        trainer(tmp_path / "run", alone, domains, distractor_rows=0.1)
    foreign = {**DOMAINS, "en": [{"input_ids": [VOCAB] * 40}]}
    with pytest.raises(ValueError, match=rf"text of 'en' must have token ids in 0..{VOCAB - 1}"):
        koff.KoffTrainer(fresh(), arguments(tmp_path / "run"), foreign)
    assert not (tmp_path / "run").exists()


class Reads(TorchDispatchMode):
    """Counts the values that Python reads from a tensor, by the trainer's function that asks."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __enter__(self):
        self.tolist = torch.Tensor.tolist  # reads all values at once, which is no operator here

        def counted(tensor):
            self.count(sys._getframe(1))
            return self.tolist(tensor)

        torch.Tensor.tolist = counted
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count(sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def count(self, frame):
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename.endswith("trainer.py"):
            self.counts[frame.f_code.co_name] += 1


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_reads_one_value_from_the_device(tmp_path, accumulation):
    """koff's trainer and transformers': on a GPU each reading waits for all that is queued."""
    settings = dict(max_steps=4, logging_steps=100, gradient_accumulation_steps=accumulation)
    run = trainer(tmp_path, fix_mask_at=None, **settings)
    with Reads() as reads:
        run.train()
    assert reads.counts == {"_saliency": 1, "training_step": 4, "_finalize_training": 1}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_is_learned_from_a_loss_that_is_not_finite(tmp_path, accumulation):
    model = fresh(kv=koff.KVConfig(5, "normal"))
    with torch.no_grad():
        model.koff.memories["en"].lora["0_q_proj"].b[0, 0] = float("inf")
    before = learned(model)
    run = trainer(tmp_path, model=model, gradient_accumulation_steps=accumulation)
    for _ in range(2):  # the second time on what the first has left
        with pytest.raises(ValueError, match="the loss at step 0 must be finite, got nan; lower"):
            run.train()
    assert all(torch.equal(t, before[name]) for name, t in learned(model).items())


@pytest.mark.parametrize(
    "unfreeze",
    [
        lambda m: m.model.embed_tokens.weight,
        lambda m: m.model.norm.weight,
        lambda m: m.model.layers[1].mlp.up_proj.weight,
    ],
    ids=["embedding", "norm", "linear"],
)
def test_what_would_not_be_trained_is_refused(tmp_path, unfreeze):
    model = fresh()
    unfreeze(model).requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"KoffTrainer: all but gates .* got requires_grad on \['m"
    ):
        trainer(tmp_path, model=model)
    unfreeze(model).requires_grad_(False)
    trainer(tmp_path, model=model)


def test_an_adapter_of_peft_is_refused_and_so_is_what_it_froze(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = fresh()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got requires_grad on .*lora_A.* and more; call"):
        trainer(tmp_path, model=model)
    wrapped.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"got all of them frozen; call model\.koff\.requires_grad_"
    ):
        trainer(tmp_path, model=model)
    wrapped.unload().koff.requires_grad_(True)
    trainer(tmp_path, model=model)


@pytest.mark.parametrize("base", [True, False])
def test_the_config_keeps_the_bases_use_cache(tmp_path, base):
    """transformers' Trainer switches it off, and it was saved so."""
    model = fresh()
    model.config.use_cache = base
    run = trainer(tmp_path, model=model, max_steps=1, **activation_checkpointing.arguments())
    run.train()
    assert model.config.use_cache is base
    koff.save(koff.compact(model, inplace=True), tmp_path / "out")
    assert koff.load(tmp_path / "out").config.use_cache is base


def test_the_norm_of_a_group_without_gradients_lies_with_the_others():
    """As that of the gates, once their mask is fixed; torch alone gives a zero on the CPU."""
    group = {"params": [torch.nn.Parameter(torch.zeros(2, device="meta"))]}
    assert clip_groups(["gates"], [group], 1.0)["gates"].device.type == "meta"
