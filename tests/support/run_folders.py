"""Folders of finished runs as `koff report` finds them: JSON, and weights of a few numbers."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from koff.model.config import KoffConfig
from koff.storage.manifest import Manifest

DENSE = [64, 64, 64]
DOMAINS = ("en", "fr")
# Mean nats per token: of the dense base, with gates alone, with the own memory, on the dense model
# with it, with another memory, with none.
NATS = {"dense": 3.0, "gates": 3.2, "own": 3.04, "dense_own": 2.98, "other": 3.3, "none": 3.25}


@dataclass
class RunFolder:
    """What is written to a folder; change a field to see what a page makes of it."""

    seed: int = 0
    target: float = 0.25
    memories: tuple[str, ...] = DOMAINS
    base: str = "models/tiny"
    measured: bool = True
    with_base: bool = True
    shift: float = 0.0  # nats added to what the own memory gives
    attention: bool = True
    history: list = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Write everything, and return the folder."""
        folder.mkdir(parents=True)
        parts = {"r": 2, "alpha": 4}, {"num_tokens": 4}
        lora, kv = parts if self.memories else (None, None)
        koff = {"target_sparsity": self.target, "seed": self.seed, "memories": list(self.memories)}
        koff |= {"lora": lora, "kv": kv}
        widths = [48, 40, 56] if self.target else DENSE
        rng = random.Random(self.seed)
        kept = [sorted(rng.sample(range(d), w)) for d, w in zip(DENSE, widths, strict=True)]
        save_file({"weight": np.zeros((6, 4), np.float32)}, folder / "model.safetensors")
        for name in self.memories:
            place = folder / "memories" / name / "lora"
            place.mkdir(parents=True)
            tensors = {"A": np.zeros((2, 4), np.float32)}
            save_file(tensors, place / "adapter_model.safetensors")
        removed = 1 - sum(widths) / sum(DENSE)
        manifest = Manifest(
            koff="0.1.0", versions={"torch": "2.13.0"}, created="2026-11-26T00:00:00",
            base=self.base, revision=None, config=KoffConfig.from_dict(koff),
            memories=list(self.memories), dense_widths=DENSE, widths=widths,
            kept=kept if self.target else None,
            sparsity={"mlp": removed, "model": removed / 2, "non_embedding": removed / 1.5},
            backbone_sha256="0" * 64, files={}, metadata={},
        )  # fmt: skip
        (folder / "koff.json").write_text(manifest.to_text(), "utf-8")
        files = {name: f"data/{name}.train.jsonl" for name in DOMAINS}
        recipe = {"model": self.base, "seed": self.seed, "koff": koff}
        recipe["data"] = {name: {"train": path, "field": "text"} for name, path in files.items()}
        write(folder / "recipe.json", {"root": "/somewhere/private", "recipe": recipe})
        log = {"seconds": 12.5, "resumed_from": None, "history": self.history or curve()}
        write(folder / "train_log.json", log)
        if self.measured:
            write(folder / "eval-test.json", self.rows())
        if self.attention and self.memories:
            found = {"domain": "fr", "memory": "fr", "heads": [[0.1, 0.2], [0.0, 0.1], [0.3, 0.3]]}
            write(folder / "attention-fr.json", found)
        return folder

    def rows(self) -> list[dict]:
        """What `koff eval --base --json` writes."""
        found = []
        for domain in DOMAINS:
            if self.with_base:
                found.append(row("base", None, domain, NATS["dense"]))
            for memory in (*self.memories, None):
                own = "own" if self.target else "dense_own"
                kind = "none" if memory is None else own if memory == domain else "other"
                kind = kind if self.memories else "gates"
                shift = self.shift if kind == own else 0.0
                found.append(row("koff", memory, domain, NATS[kind] + shift))
        return found


def row(variant: str, memory: str | None, domain: str, nats: float) -> dict:
    """A row of ``koff.evaluate``."""
    return {
        "variant": variant, "memory": memory, "domain": domain, "split": "test",
        "perplexity": float(np.exp(nats)), "bits_per_byte": nats / 3, "tokens": 1000,
    }  # fmt: skip


def curve(steps: int = 20) -> list[dict]:
    """What a training logs."""
    log = [
        {"step": s, "loss": 4 - s / 20, "sparsity_mlp": s / 80, "sparsity_target": 0.25,
         "undecided": 0.5 - s / 50}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    return [*log, {"step": steps, "train_steps_per_second": 1.6}]


def write(path: Path, value) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value), "utf-8")


def write_grid(folder: Path, seeds=(0, 1, 2)) -> list[Path]:
    """Write koff, gates alone and dense with memories for every seed."""
    kinds = {
        "koff": RunFolder(),
        "gates": RunFolder(memories=(), attention=False),
        "dense": RunFolder(target=0.0),
    }
    found = []
    for seed in seeds:
        for name, run in kinds.items():
            run.seed, run.shift = seed, 0.01 * seed
            found.append(run.write(folder / f"{name}-seed{seed}"))
    return found
