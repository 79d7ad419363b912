"""One rank of tests/training/test_distributed.py: trains two steps and writes what was learned.

Usage: distributed_worker.py FOLDER trainer|fsdp|resume. accelerate does not shard on the CPU, so
the FSDP run is a plain loop with torch's own fully_shard.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.models import NAMES, tiny, tokens
from support.trainings import DOMAINS, LORA, arguments

import koff

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ROWS = 12


def fresh(kv: koff.KVConfig):
    config = koff.KoffConfig(NAMES, target_sparsity=0, lora=LORA, kv=kv)
    return koff.attach(tiny("llama", initializer_range=0.3), config)


def with_trainer(folder: Path):
    args = arguments(
        folder / f"trainer{RANKS}",
        max_steps=2,
        per_device_train_batch_size=ROWS // RANKS,
        general_every=0,
        max_grad_norm=1e9,
        ddp_backend="gloo" if RANKS > 1 else None,
    )
    run = koff.KoffTrainer(fresh(koff.KVConfig(5, "text")), args, train_datasets=DOMAINS)
    run.train()
    wrapped = isinstance(run.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert wrapped == (RANKS > 1)
    return run.model


def with_resume(folder: Path):
    """Two steps with a checkpoint after each; then the second one again, from the first."""
    models = []
    for start in (None, str(folder / "run" / "checkpoint-1")):
        settings = dict(max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=2)
        args = arguments(folder / "run", ddp_backend="gloo" if RANKS > 1 else None, **settings)
        model = fresh(koff.KVConfig(5, "normal"))
        run = koff.KoffTrainer(model, args, train_datasets=DOMAINS)
        run.train(resume_from_checkpoint=start)
        found = {path.name for path in (folder / "run").iterdir()}
        assert found == {"checkpoint-1", "checkpoint-2"}, found
        models.append(run.model.koff.state_dict())
    assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())
    return run.model


def with_fsdp(folder: Path):
    model = fresh(koff.KVConfig(5, "normal")).train()
    if RANKS > 1:
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo")
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
    optimizer = torch.optim.AdamW(model.koff.parameters(), lr=1e-2)
    share = slice(RANK * ROWS // RANKS, (RANK + 1) * ROWS // RANKS)
    for step in range(2):
        ids, names = tokens(ROWS, 9, seed=step)[share], [NAMES[i % 3] for i in range(ROWS)][share]
        logits = model(ids, memory=names, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model = {"trainer": with_trainer, "fsdp": with_fsdp, "resume": with_resume}[mode](folder)
    state = model.koff.state_dict()
    full = {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone().contiguous()
        for name, t in state.items()
    }
    if RANK == 0:
        save_file(full, folder / f"{RANKS}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
