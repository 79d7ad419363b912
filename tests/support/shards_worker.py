"""One rank of tests/training/test_loading_in_shards.py: how much memory does loading take?

Usage: shards_worker.py BASE whole|shards, under torchrun. Prints the growth of this process's own
memory at its peak, in bytes.
"""

import sys
import threading
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM

import koff
from koff.model.sharding import in_shards


def own_memory() -> int:
    """Bytes that are this process's own; pages of the file that it maps are the system's to take
    back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    dist.init_process_group("gloo")
    how = in_shards(dist.get_world_size()) if sys.argv[2] == "shards" else {}
    before, seen, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen[0] = max(seen[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    # In another dtype than the file's: weights in that are pages of the file, whosever process.
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16", **how)
    koff.attach(model, koff.KoffConfig(("en",), target_sparsity=0.2, kv=None))
    done.set()
    watcher.join()
    print(f"peak {seen[0] - before}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
