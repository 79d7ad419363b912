"""The model card that is saved beside a model: what was measured, and how to load it."""

from __future__ import annotations

from typing import Any

_TEMPLATE = """---
library_name: koff
base_model: {base}
tags: [koff, pruned, lora, kv-cache]
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
| written | {created}, torch {torch}, transformers {transformers}, peft {peft} |

```python
import koff
model = koff.load("path/to/this/folder")
logits = model(input_ids, memory={example}).logits
```
{results}"""


def _range(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def _results(rows: list[dict[str, Any]] | None) -> str:
    if not rows:
        return "\nNo quality was measured when this was saved; `koff eval` measures it.\n"
    lines = [
        "\n## Measured when saved\n",
        "| variant | memory | domain | split | perplexity | bits/byte |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        memory = row["memory"] or "none"
        numbers = f"{row['perplexity']:.3f} | {row['bits_per_byte']:.4f}"
        lines.append(
            f"| {row['variant']} | {memory} | {row['domain']} | {row['split']} | {numbers} |"
        )
    return "\n".join(lines) + "\n"


def model_card(facts: dict[str, Any]) -> str:
    """Markdown of a model card.

    Args:
        facts: the content of koff.json.

    Returns:
        The text of README.md.
    """
    base = facts["base"] or "unknown"
    names = facts["memories"]
    return _TEMPLATE.format(
        title=f"koff backbone of {base}",
        base=base,
        version=facts["koff"],
        memories=", ".join(names) or "none",
        widths=_range(facts["widths"]),
        dense=_range(facts["dense_widths"]),
        created=facts["created"],
        example=repr(names[0]) if names else None,
        results=_results(facts["metadata"].get("results")),
        **facts["sparsity"],
        **{name: facts["versions"][name] for name in ("torch", "transformers", "peft")},
    )
