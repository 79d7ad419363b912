"""The model card that is saved beside a model: what it is, what was measured, and how to load it
with koff and without. The code in it runs as it stands, in the saved folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..model.arch import NARROW_PREFIX
from ..version import __version__
from .layout import ADAPTER_CONFIG, CACHE_CONFIG, KV, LORA, MEMORIES
from .manifest import Manifest

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # of a hub repository

# The hub reads what stands between the lines of "---".
_TEMPLATE = """---
library_name: koff
{metadata}tags: [koff, pruned, lora, kv-cache]
---
# {title}

A sparse backbone with swappable memories, made with koff {version} (knowledge offloading,
arXiv 2605.29075) from `{base}`.

| | |
|---|---|
| memories | {memories} |
| MLP neurons removed | {mlp:.2%} |
| of all weights | {model:.2%} |
| of all weights but embeddings | {non_embedding:.2%} |
| MLP widths | {widths} (dense: {dense}) |
{data}| written | {created}, torch {torch}, transformers {transformers}, peft {peft} |

## With koff
```python
{koff}
```

## Without koff
{remark}
```python
{stock}
```
{results}{tasks}"""

_REMOTE = (
    "Its layers differ in width, which transformers' own classes cannot build: `modeling_koff.py` "
    "does,\na small file that imports transformers alone and runs only with "
    "`trust_remote_code=True`."
)
_STOCK = "The backbone is a stock {architecture} checkpoint."
_OWN = (
    "\nThe LoRA of a memory is a PEFT LORA. Its learned cache (`kv/`) needs koff: PEFT has no "
    "place for the\nstates of recurrent layers."
)
_PEFT = "\nEach memory is a PEFT LORA, a PEFT CARTRIDGE, or both; the LORA is loaded first."

_EXPORTED = """---
library_name: transformers
tags: [koff, pruned]
---
# {name} folded into its backbone

Weights with the LoRA of the memory {name!r} folded in, exported by koff {version} (knowledge
offloading, arXiv 2605.29075).{cache}
{remark}

```python
{stock}
```
"""


def _range(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def _results(rows: list[dict[str, Any]] | None) -> str:
    if not rows:
        return (
            "\nNo quality was measured when this was written. `koff.evaluate` measures it; in a "
            "folder of `koff train`, `koff eval --card` writes it here.\n"
        )
    lines = ["\n## Measured\n", "| variant | memory | domain | split | perplexity | bits/byte |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        memory = row["memory"] or "none"
        numbers = f"{_number(row['perplexity'], 3)} | {_number(row['bits_per_byte'], 4)}"
        lines.append(
            f"| {row['variant']} | {memory} | {row['domain']} | {row['split']} | {numbers} |"
        )
    return "\n".join(lines) + "\n"


def _tasks(rows: list[dict[str, Any]] | None) -> str:
    if not rows:
        return ""
    lines = [f"\n## Tasks\n\nMeasured by {rows[0].get('harness', 'lm-eval')}.\n"]
    lines.append("| variant | memory | task | measure | value | standard error | questions |")
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        measure = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        numbers = f"{_number(row['value'], 4)} | {_number(row['stderr'], 4)}"
        lines.append(
            f"| {row['variant']} | {row['memory'] or 'none'} | {row['task']} | {measure} | "
            f"{numbers} | {row.get('samples', '–')} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _data(manifest: Manifest) -> str:
    """Table lines that name what the memories that are there, or the gates of a backbone that was
    pruned without any, and the general mixture were trained on."""
    metadata = manifest.metadata
    own = dict(metadata.get("data") or {})
    for name, record in (metadata.get("added") or {}).items():
        own[name] = record["source"]
    if manifest.config.memories:  # else these are domains of gates, and no memories to be missing
        own = {name: source for name, source in own.items() if name in manifest.memories}
    lines = (("trained on", own), ("general mixture", metadata.get("general")))
    return "".join(
        f"| {title} | {', '.join(f'{k}: {v}' for k, v in named.items())} |\n"
        for title, named in lines
        if named
    )


def _code(
    tokenizer: bool, imports: list[str], load: list[str], trust: str = "", memory: str = ""
) -> str:
    """Code that loads a model and generates with it."""
    names = ["AutoModelForCausalLM"] if "import koff" not in imports else []
    names += ["AutoTokenizer"] if tokenizer else []
    # Without a tokenizer any ids will do; these are in every vocabulary.
    ids, shown = "ids = torch.tensor([[1, 2, 3]])", "print(output)"
    if tokenizer:
        load = [*load, f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"]
        ids = 'ids = tokenizer("Hello", return_tensors="pt").input_ids'
        shown = "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    lines = [
        *imports,
        *([f"from transformers import {', '.join(names)}"] if names else []),
        "",
        *load,
        ids,
        f"options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=20{memory})",
        "output = model.generate(input_ids=ids, **options)",
        shown,
    ]
    return "\n".join(lines)


def _with_koff(tokenizer: bool, memory: str | None) -> str:
    where = 'folder = "."  # this folder, or its id on the Hugging Face hub'
    load = [where, "model = koff.load(folder)"]
    return _code(tokenizer, ["import koff", "import torch"], load, memory=f", memory={memory!r}")


def _without_koff(narrow: bool, tokenizer: bool, lora: str | None, kv: str | None) -> str:
    """Code that loads a backbone, and adapters at these paths within its folder."""
    trust = ", trust_remote_code=True" if narrow else ""
    load = [
        'folder = "."  # this folder',
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
    ]
    # The LORA goes into the model itself: PEFT holds no LORA and CARTRIDGE in one PeftModel, and of
    # two nested ones generate drops the cache.
    if lora:
        load.append(f'model.load_adapter(f"{{folder}}/{lora}")')
    if kv:
        load.append(f'model = PeftModel.from_pretrained(model, f"{{folder}}/{kv}")')
    peft = ["from peft import PeftModel"] if kv else []
    return _code(tokenizer, ["import torch", *peft], load, trust)


def _remark(narrow: bool, architecture: str) -> str:
    return _REMOTE if narrow else _STOCK.format(architecture=architecture)


def model_card(manifest: Manifest, folder: Path) -> str:
    """Return the Markdown of a model card.

    Args:
        manifest: of the saved model.
        folder: where backbone, memories and perhaps a tokenizer have been written.
    """
    base, names = manifest.base or "unknown", manifest.memories
    tokenizer = (folder / "tokenizer_config.json").is_file()
    first = f"{MEMORIES}/{names[0]}" if names else ""
    lora, kv = (
        f"{first}/{part}" if first and (folder / first / part / ADAPTER_CONFIG).is_file() else None
        for part in (LORA, KV)
    )
    own = any((folder / MEMORIES / name / KV / CACHE_CONFIG).is_file() for name in names)
    narrow = len(set(manifest.widths)) > 1
    return _TEMPLATE.format(
        title=f"koff backbone of {base}",
        # The hub makes a link of it, so a path has no place here.
        metadata=f"base_model: {base}\n" if _ID.fullmatch(base) else "",
        base=base,
        version=manifest.koff,
        memories=", ".join(names) or "none",
        mlp=manifest.sparsity["mlp"],
        model=manifest.sparsity["model"],
        non_embedding=manifest.sparsity["non_embedding"],
        widths=_range(manifest.widths),
        dense=_range(manifest.dense_widths),
        data=_data(manifest),
        created=manifest.created,
        # These may be edited, and so may lack.
        torch=manifest.versions.get("torch", "unknown"),
        transformers=manifest.versions.get("transformers", "unknown"),
        peft=manifest.versions.get("peft", "unknown"),
        koff=_with_koff(tokenizer, names[0] if names else None),
        remark=_remark(narrow, "transformers") + (_OWN if own else _PEFT if names else ""),
        stock=_without_koff(narrow, tokenizer, lora, kv),
        results=_results(manifest.metadata.get("results")),
        tasks=_tasks(manifest.metadata.get("tasks")),
    )


def export_card(model: PreTrainedModel, name: str, tokenizer: bool) -> str:
    """Return the Markdown of the card of an exported model.

    Args:
        model: the attached model it comes from.
        name: the memory that was folded in.
        tokenizer: whether one lies in the folder.
    """
    narrow = model.config.model_type.startswith(NARROW_PREFIX)
    cache = model.koff.memories[name].kv_config is not None
    text = " Its learned KV cache is PEFT's CARTRIDGE in `kv/`." if cache else ""
    return _EXPORTED.format(
        name=name,
        version=__version__,
        cache=text,
        remark=_remark(narrow, model.config.model_type),
        stock=_without_koff(narrow, tokenizer, None, "kv" if cache else None),
    )
