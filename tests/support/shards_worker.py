"""One rank of tests/training/test_loading_in_shards.py: what does a base take in this process?

Usage: shards_worker.py BASE whole|shards, under torchrun. Writes a line of JSON: bytes of the base
that stay here, by how much this process's own memory has grown at most while it was loaded and
attached, and the most that torch allocates at once in a step of few tokens.
"""

import faulthandler
import json
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import koff
from bench.memory import peak_bytes, resident, watched
from koff.model.sharding import in_shards


def main() -> None:
    faulthandler.dump_traceback_later(120, exit=True)
    dist.init_process_group("gloo")
    how = in_shards(dist.get_world_size()) if sys.argv[2] == "shards" else {}
    before = resident()["RssAnon"]
    # By the system's word: transformers reads in threads, of which torch's profiler sees nothing.
    # In another dtype than the file's: weights in that are pages of it, which are nobody's.
    with watched() as peaks:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16", **how)
        koff.attach(model, koff.KoffConfig(("en",), target_sparsity=0.2, kv=None))

    def step() -> None:
        ids = torch.arange(4)[None]
        model.train()(input_ids=ids, labels=ids, memory="en", use_cache=False).loss.backward()

    base = [p for name, p in model.named_parameters() if not name.startswith("koff.")]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in base]
    stays = sum({t.data_ptr(): t.nbytes for t in local}.values())
    found = {"stays": stays, "loading": peaks["RssAnon"] - before, "step": peak_bytes(step)}
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
