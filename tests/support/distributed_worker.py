"""One rank of tests/training/test_distributed.py.

Usage: distributed_worker.py FOLDER ddp|fsdp, alone or under torchrun. Each of the runs in ``RUNS``
trains with gates, fixes the mask on the way, compacts and saves; rank 0 writes what came out, and
every rank makes sure that it has the same.
"""

import faulthandler
import gc
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from support import activation_checkpointing
from support.models import NAMES, tiny, tokens
from support.trainings import ANSWERS, DOMAINS, GENERAL, LORA, arguments
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainerCallback

import koff
from koff.data.losses import Head
from koff.model import arch
from koff.model.head import measured
from koff.model.sharding import in_shards, is_sharded
from koff.storage.space import bytes_of
from koff.training.optim import average_gradients

ROWS = 12  # of a micro-batch, over all ranks
STEPS = 4
EVALUATED = {name: DOMAINS[name][:3] for name in ("en", "es")}

RUNS = {
    # Gates that start at the target hardly move the multiplier.
    "mixed": dict(saliency_batches=0),
    "accumulated": dict(gradient_accumulation_steps=2, batching="single"),
    # Rows count differently, and so do micro-batches and ranks.
    "labelled": dict(gradient_accumulation_steps=2, domains=ANSWERS),
    "checkpointed": activation_checkpointing.arguments()
    | dict(fix_mask_at=0.75, max_grad_norm=0.1),
}


ACCELERATES = AcceleratorState.__init__


def let_fsdp_shard_on_cpu() -> None:
    """accelerate shards on accelerators only. Its code runs as well over gloo, once its state says
    that it may."""

    def init(self, *args, fsdp_plugin=None, **kwargs):
        ACCELERATES(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = init


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))  # also before there is a process group


class DrawsAlone(TrainerCallback):
    """Takes random numbers on one rank, as a user's callback may that shows a few samples."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1:
            torch.rand(3)


def make(folder: Path, mode: str, domains=DOMAINS, base=None, **changes) -> koff.KoffTrainer:
    config = koff.KoffConfig(NAMES, target_sparsity=0.4, lora=LORA, kv=koff.KVConfig(5, "text"))
    model = koff.attach(tiny("llama", initializer_range=0.3) if base is None else base, config)
    args = arguments(folder)  # from here on there is a process group
    settings = dict(
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // ranks(),
        general_every=3,
        adam_epsilon=0.1,  # see the test
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS,
        fsdp=mode == "fsdp" and ranks() > 1,
    )
    args = arguments(folder, **{**settings, **changes})
    data = dict(train_datasets=domains, general_datasets=GENERAL, eval_datasets=EVALUATED)
    return koff.KoffTrainer(model, args, **data, callbacks=[DrawsAlone()])


def check_how_it_ran(run: koff.KoffTrainer, mode: str) -> None:
    """The base is replicated or sharded, as it was asked for; what is learned is always whole."""
    several = ranks() > 1
    assert isinstance(run.model_wrapped, DistributedDataParallel) == (several and mode == "ddp")
    sharded = several and mode == "fsdp"
    assert is_sharded(run.model) == sharded
    weights = [w for mlp in arch.mlps(run.model) for w in arch.mlp_weights(mlp)]
    assert all(isinstance(w, DTensor) == sharded for w in weights)
    assert not any(isinstance(p, DTensor) for p in run.model.koff.parameters())
    # Losses come from hidden states and a whole head, and nobody makes all logits.
    with torch.no_grad():
        assert measured(run.model, has_whole_head, input_ids=tokens(2, 9))


def has_whole_head(states: torch.Tensor, head: Head | None) -> bool:
    return head is not None and not isinstance(head.weight, DTensor)


def same_everywhere(tensors: dict[str, torch.Tensor]) -> None:
    """Assert that every rank has the same bits."""
    if ranks() == 1:
        return
    for name, tensor in tensors.items():
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), name


def learned(run: koff.KoffTrainer) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in run.model.koff.state_dict().items()}


def check_checkpoint(run: koff.KoffTrainer, folder: Path) -> None:
    """It holds what is learned, the optimiser's two moments of it, and nothing of the base."""
    numbers = [""] if ranks() == 1 else [f"_{rank}" for rank in range(ranks())]
    small = {f"rng_state{number}.pth" for number in numbers} | {"scheduler.pt"}
    small |= {"koff_state.json", "koff_checkpoint.json", "trainer_state.json"}
    large = {"koff_state.safetensors", "optimizer.pt"}
    assert {path.name for path in folder.iterdir()} == small | large
    tensors = load_file(folder / "koff_state.safetensors")
    own = run.koff.tensors()
    assert {n: t.nbytes for n, t in tensors.items()} == {n: t.nbytes for n, t in own.items()}
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    learned = list(run.koff.parameters())
    moments = [t for moment in state.values() for t in moment.values() if t.dim()]
    assert sum(t.nbytes for t in moments) <= 2 * bytes_of(learned)
    # The others have room for logs and random states, and for no base.
    base = sum(p.numel() for n, p in run.model.named_parameters() if not n.startswith("koff."))
    assert sum((folder / name).stat().st_size for name in small) < base


def check_saves(narrow: torch.nn.Module, folder: Path) -> None:
    """Every rank may save, or the first alone; what the first one cannot do is said by all."""
    out = koff.save(narrow, folder / "by-all")
    loaded = koff.load(out)  # on every rank, as soon as save returns
    ids, memories = tokens(4, 9), ["en", None, "keys", "es"]
    logits = narrow(ids, memory=memories).logits
    assert torch.equal(logits, loaded(ids, memory=memories).logits)
    same_everywhere({"logits": logits})
    with pytest.raises(ValueError, match="koff.save: the directory must not hold a saved model"):
        koff.save(narrow, out)
    if ranks() == 1 or dist.get_rank() == 0:
        koff.save(narrow, folder / "by-one")
    koff.remove_memory(out, "keys")
    assert koff.load(out).koff.memory_names == ("en", "es")
    check_exports(narrow, out, folder)


def check_exports(narrow: torch.nn.Module, saved: Path, folder: Path) -> None:
    """One process exports and uploads; all of them find what it wrote, and hear what it heard."""
    for number, source in enumerate((narrow, saved)):
        exported = koff.export_merged(source, "en", folder / f"exported-{number}")
        assert (exported / "README.md").is_file() and (exported / "kv").is_dir()
        with pytest.raises(ValueError, match="koff.export_merged: the output must be a new or em"):
            koff.export_merged(source, "en", exported)
    uploads = []

    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, repo, **options):
            pass

        def upload_folder(self, folder_path, **options):
            assert (folder_path / "koff.json").is_file()
            uploads.append(folder_path)
            return SimpleNamespace(commit_url=f"https://hub/{os.getpid()}/{len(uploads)}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", Hub)
        addresses = [koff.push_to_hub(source, "some/one") for source in (narrow, saved)]
    first = ranks() == 1 or dist.get_rank() == 0
    assert len(uploads) == 2 * first and addresses[0] != addresses[1]
    if ranks() > 1:
        everyones = [None] * ranks()
        dist.all_gather_object(everyones, addresses)
        assert everyones == [addresses] * ranks()


def check_loaded_in_shards(whole: dict[str, torch.Tensor], folder: Path, changes: dict) -> None:
    """A base of which each rank has read its shard alone trains, goes on and is saved as one that
    was sharded later."""

    def loaded():
        return AutoModelForCausalLM.from_pretrained(folder / "base", **in_shards(ranks()))

    if dist.get_rank() == 0:
        tiny("llama", initializer_range=0.3).save_pretrained(folder / "base")
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_USE_FSDP", raising=False)  # of the runs before
        with pytest.raises(ValueError, match="loaded in shards must be trained with FSDP, got a"):
            make(folder / "none", "ddp", base=loaded(), **changes)
        # Asked for by accelerate's environment, which accelerate itself passes over on CPUs.
        patch.setattr(AcceleratorState, "__init__", ACCELERATES)
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="FSDP must have several processes with an acc"):
            make(folder / "none", "ddp", base=loaded(), **changes)
    place = folder / "loaded"
    run = make(place, "fsdp", base=loaded(), save_strategy="steps", save_steps=3, **changes)
    run.train()
    check_how_it_ran(run, "fsdp")
    check_checkpoint(run, place / "checkpoint-3")
    again = make(place, "fsdp", base=loaded(), **changes)
    again.train(resume_from_checkpoint=str(place / "checkpoint-3"))
    for found in (learned(run), learned(again)):
        differ = [name for name, t in whole.items() if not torch.equal(t, found[name])]
        assert not differ
    narrow = koff.compact(run.model).eval()
    out, ids = koff.save(narrow, place / "out"), tokens(3, 9)
    assert "distributed" not in (out / "config.json").read_text()
    wanted = narrow(ids, memory="en").logits
    assert torch.equal(koff.load(out)(ids, memory="en").logits, wanted)


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Shard a model as docs/training.md says."""
    learned = set(model.koff.parameters())
    for layer in model.model.layers:
        fully_shard(layer, ignored_params=learned)
    return fully_shard(model, ignored_params=learned)


def own_loop(folder: Path, mode: str) -> dict[str, torch.Tensor]:
    """Train without a trainer, each rank with memories of its own; compact; save sharded models."""
    config = dict(lora=LORA, kv=koff.KVConfig(5, "normal"))
    gated, plain = (
        koff.attach(
            tiny("llama", initializer_range=0.3),
            koff.KoffConfig(NAMES, target_sparsity=sparsity, **config),
        )
        for sparsity in (0.4, 0.0)
    )
    if mode == "fsdp" and ranks() > 1:
        shard(gated), shard(plain)
    # Of 12 rows a third each: ranks hold none of what others hold, but for what lies in between.
    names = [name for name in NAMES for _ in range(ROWS // 3)]
    rank, size = int(os.environ.get("RANK", 0)), ROWS // ranks()
    mine = slice(rank * size, (rank + 1) * size)
    parameters = list(gated.koff.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=0.1, weight_decay=0)
    torch.manual_seed(0)  # of the gates
    gated.train()
    for step in range(STEPS):
        ids = tokens(ROWS, 9, seed=step)[mine]
        logits = gated(ids, memory=names[mine], use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        if ranks() > 1:
            average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    learned = {name: t.detach().clone() for name, t in gated.koff.state_dict().items()}
    same_everywhere(learned)
    koff.binarize(gated, multiple_of=1)
    learned |= {f"{n}.fixed": t.clone() for n, t in gated.koff.state_dict().items() if "mask" in n}
    ids, memories = tokens(3, 9), list(NAMES)
    for name, model in (("gated", koff.compact(gated).eval()), ("plain", plain.eval())):
        loaded = koff.load(koff.save(model, folder / name))
        with torch.no_grad():
            gap = model(ids, memory=memories).logits - loaded(ids, memory=memories).logits
        assert gap.abs().max() == 0, name
    return learned


def check_that_losses_stay_fp32(folder: Path, mode: str) -> None:
    run = make(folder, mode, bf16=True, max_steps=1)
    run.train()
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        loss = run.compute_loss(run.model_wrapped.eval(), batch)
    assert loss.dtype == torch.float32


def check_refusals(run: koff.KoffTrainer, folder: Path, mode: str) -> None:
    if ranks() == 1:
        return
    if mode == "ddp":
        with pytest.raises(ValueError, match="use_reentrant .* must be False on several processes"):
            make(folder, mode, **activation_checkpointing.arguments(use_reentrant=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AcceleratorState, "__init__", ACCELERATES)
            # What asks for FSDP says so to the whole process, which the next run is not to hear.
            patch.setenv("ACCELERATE_USE_FSDP", "false")
            match = f"must have several .* an accelerator each, got {ranks()} processes on cpu"
            with pytest.raises(ValueError, match=match):
                make(folder, mode, fsdp=True)
    else:
        with pytest.raises(ValueError, match="detach: the model must be as attach left it"):
            koff.detach(run.model)
        with pytest.raises(ValueError, match="cpu_ram_efficient_loading of FSDP must be False"):
            make(folder, mode, fsdp_config={"cpu_ram_efficient_loading": True})
    assert not folder.exists()


def main() -> None:
    train_all(Path(sys.argv[1]), sys.argv[2])
    if dist.is_initialized():
        # DDP's models hold on to the group: they go first, and no rank before the others.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def train_all(folder: Path, mode: str) -> None:
    # Ranks that wait for each other would wait for long: say where.
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    logging.getLogger("koff").setLevel(logging.ERROR)
    let_fsdp_shard_on_cpu()
    tensors, logs = {}, {}
    for name, changes in RUNS.items():
        place = folder / f"{mode}{ranks()}-{name}"
        run = make(place, mode, save_strategy="steps", save_steps=1, **changes)
        before = learned(run)
        run.train()
        check_how_it_ran(run, mode)
        whole = learned(run)
        same_everywhere(whole)
        if name == "mixed":
            check_checkpoint(run, place / f"checkpoint-{STEPS}")
            if mode == "fsdp" and ranks() > 1:
                check_loaded_in_shards(whole, place, changes)
            for step in (1, 3):  # before and after the mask is fixed
                again = make(place, mode, **changes)
                again.train(resume_from_checkpoint=str(place / f"checkpoint-{step}"))
                resumed = learned(again)
                assert all(torch.equal(t, resumed[n]) for n, t in whole.items()), step
            # A checkpoint that one process has written is resumed by any number of them.
            again = make(place, mode, **changes)
            again.train(resume_from_checkpoint=str(folder / "ddp1-mixed" / "checkpoint-1"))
            tensors |= {f"moved.{key}": t.contiguous() for key, t in learned(again).items()}
            check_saves(koff.compact(run.model).eval(), place)
            check_refusals(run, folder / "none", mode)
            check_that_losses_stay_fp32(folder / f"{mode}{ranks()}-bf16", mode)
        tensors |= {f"before.{name}.{key}": t.contiguous() for key, t in before.items()}
        tensors |= {f"{name}.{key}": t.contiguous() for key, t in whole.items()}
        logs[name] = run.state.log_history
    looped = own_loop(folder / f"{mode}{ranks()}-own", mode)
    tensors |= {f"own.{name}": t.contiguous() for name, t in looped.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(tensors, folder / f"{mode}{ranks()}.safetensors")
        (folder / f"{mode}{ranks()}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main()
