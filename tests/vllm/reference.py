"""Make small saved models, and write what koff computes with them: what vLLM must compute too.

Run where koff is installed: ``python tests/vllm/reference.py FOLDER``. vLLM wants another
transformers than koff does, so the tests of this folder run elsewhere and compare with a file.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import koff

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/support

from support.models import attached  # noqa: E402
from support.widths import spread  # noqa: E402

NEW_TOKENS = 20
# Shorter than a block of the cache, longer, and longer than two.
PROMPT_LENGTHS = (1, 9, 17, 40)
# vLLM's own models, and two families that it takes from transformers.
MATRIX = [*itertools.product(("llama", "qwen2", "qwen3"), ("uniform", "global"))]
MATRIX += [("mistral", "global"), ("granite", "global"), ("phi3", "global")]
MATRIX += itertools.product(("olmo2", "smollm3"), ("uniform", "global"))
# Recurrent layers: memories of LoRA alone, in bf16.
RECURRENT = [("qwen3_5_text", "uniform"), ("qwen3_5_text", "global")]
LATER = {"many": 40, "eight": 8}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character of ASCII."""
    words = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127))]
    vocabulary = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def build(architecture: str, kind: str, names: tuple[str, ...], tokens: int = 7, seed: int = 0):
    """A compacted model; each memory has a LoRA on all linear layers and, if there are ``tokens``,
    learned keys."""
    # vLLM's attention on the CPU wants heads of at least 32 dimensions, and its recurrent layers
    # of 128.
    sizes = {"hidden_size": 128, "intermediate_size": 192}
    width = {"head_dim": 32} if architecture.startswith("qwen3") else {}
    if architecture == "qwen3_5_text":
        width |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    changes = {"vocab_size": 97, "eos_token_id": None, **sizes, **width}
    kv = koff.KVConfig(num_tokens=tokens, init="tokens") if tokens else None
    model = attached(architecture, memories=names, changes=changes, kv=kv, seed=seed)
    with torch.no_grad():  # freshly initialised, a model repeats one token whatever it reads
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.mul_(4)
    model = spread(model)
    koff.binarize(model, target=0.4, per_layer=kind, multiple_of=8)
    return koff.compact(model)


def save(model, folder: Path) -> Path:
    """Write a model with the tokenizer."""
    return koff.save(model, folder, tokenizer=tokenizer())


def halves(folder: Path, kind: str, architecture: str) -> None:
    """A model with the memories "both", "lora" and "kv"."""
    model = build(architecture, kind, ("both",))
    parts = save(model, folder.with_name(".parts")) / "memories/both"
    for part in ("lora", "kv"):
        koff.import_memory(model, part, **{part: parts / part})
    save(model, folder)
    shutil.rmtree(folder.with_name(".parts"))


def lengths(folder: Path) -> None:
    """A model whose memories fill half a block of 32 tokens, a block, and more than one."""
    save(build("llama", "global", ("p16",), 16), folder)
    for tokens in (32, 40):
        other = save(build("llama", "global", (f"p{tokens}",), tokens), folder.with_name(".other"))
        parts = other / f"memories/p{tokens}"
        koff.import_memory(folder, f"p{tokens}", lora=parts / "lora", kv=parts / "kv")
        shutil.rmtree(other)


def versions(root: Path) -> None:
    """A model before and after one memory was trained again, one came and one went."""
    before = build("llama", "global", ("aa", "bb"))
    save(before, root / "before")
    after = build("llama", "global", ("aa", "cc"))
    with torch.no_grad():
        for p in after.koff.memories["aa"].parameters():
            p.mul_(-1)
    save(after, root / "after")
    facts = [json.loads((root / n / "koff.json").read_text()) for n in ("before", "after")]
    assert facts[0]["backbone_sha256"] == facts[1]["backbone_sha256"]
    # The same shapes, and other weights.
    other = build("llama", "global", ("aa",))
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    save(other, root / "other")


@torch.no_grad()
def expected(folder: Path, prompts: list[list[int]]) -> dict[str, list[dict]]:
    """Memory -> for each prompt: greedy ids, their log-probabilities, and the prompt's."""
    model, found = koff.load(folder), {}
    for name in ("", *model.koff.memory_names):
        memory, rows = name or None, []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            greedy = {"memory": memory, "max_new_tokens": NEW_TOKENS, "do_sample": False}
            out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **greedy)
            new = out.sequences[0, len(prompt) :]
            chosen = torch.stack(out.logits)[:, 0].log_softmax(-1).gather(1, new[:, None])
            own = (
                model(ids, memory=memory).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            )
            row = {"prompt": prompt, "ids": new.tolist(), "logprobs": chosen[:, 0].tolist()}
            row["prompt_logprobs"] = own[:, 0].tolist()
            if len(prompt) == PROMPT_LENGTHS[1]:
                penalised = model.generate(ids, repetition_penalty=1.3, **greedy)
                row["penalised"] = penalised[0, len(prompt) :].tolist()
            rows.append(row)
        found[name] = rows
    # A mix-up must show: no two memories go on alike.
    for rows in zip(*found.values(), strict=True):
        for one, other in itertools.combinations(rows, 2):
            apart = map(lambda a, b: abs(a - b), one["logprobs"], other["logprobs"])
            assert one["ids"] != other["ids"] or max(apart) > 0.01, folder.name
    return found


@torch.no_grad()
def in_bf16(folder: Path, prompts: list[list[int]]) -> dict[str, list[list[float]]]:
    """Memory -> log-probabilities of each prompt, as koff rounds them in bf16."""
    model, found = koff.load(folder, dtype=torch.bfloat16), {}
    for name in ("", *model.koff.memory_names):
        found[name] = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            logits = model(ids, memory=name or None).logits[0, :-1].float()
            found[name].append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def main(root: Path) -> None:
    """Write everything below a new folder."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    for architecture, kind in MATRIX:
        halves(root / f"{architecture}-{kind}", kind, architecture)
    for architecture, kind in RECURRENT:
        save(build(architecture, kind, ("aa", "bb"), tokens=0), root / f"{architecture}-{kind}")
    lengths(root / "lengths")
    versions(root)
    for name, count in LATER.items():
        names = tuple(f"m{index:02}" for index in range(count))
        save(build("llama", "uniform", names, 3), root / name)
    found = {}
    for folder in sorted(root.iterdir()):
        few = prompts[1:2] if folder.name == "many" else prompts
        found[folder.name] = expected(folder, few)
        if folder.name.startswith("qwen3_5"):
            for name, rounded in in_bf16(folder, few).items():
                for row, values in zip(found[folder.name][name], rounded, strict=True):
                    row["prompt_logprobs_bf16"] = values
    (root / "expected.json").write_text(json.dumps(found))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    main(target)
