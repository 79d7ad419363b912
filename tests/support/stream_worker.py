"""One rank of tests/training/test_streaming.py.

Usage: stream_worker.py FOLDER RANKS, alone or under torchrun. Trains nine steps on the streams in
FOLDER; two ranks go on from the third, where one had written a checkpoint. Each rank writes the
rows that it trained on, step by step.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from support.trainings import tiny_run

import koff
from koff.data.sources import DataSource

folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
seen = []


class Watched(koff.KoffTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


domains = {n: DataSource(path=folder / f"{n}.jsonl", streaming=True) for n in ("en", "es")}
run = tiny_run(
    folder / f"run-{ranks}",
    kind=Watched,
    domains=domains,
    max_steps=9,
    save_steps=3,
    per_device_train_batch_size=2 // ranks,
)
run.train(resume_from_checkpoint=str(folder / "run-1" / "checkpoint-3") if ranks > 1 else None)
rank = int(os.environ.get("RANK", 0))
(folder / f"rows-{ranks}-{rank}.json").write_text(json.dumps(seen))
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
