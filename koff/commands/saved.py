"""What can be done with a finished run: measure it, generate with it, describe it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.blocks import pack
from ..data.sources import DataSource, load_documents
from ..errors import asked_by
from ..evaluation.attention_mass import PrefixMass, prefix_attention_mass
from ..evaluation.perplexity import EvalRow, evaluate
from ..storage.files import File
from ..storage.hub import resolve
from ..storage.layout import MARKER, current
from ..storage.saved_folder import open_saved
from .add_memory import added_data
from .recipe import Recipe, data_root, parse
from .tables import millions
from .train import RECIPE_FILE, load_base, stored_recipe


def read_run(directory: str | Path) -> Recipe:
    """Reads the recipe that a finished run stored beside its model.

    Args:
        directory: output folder of `koff train`.

    Returns:
        The recipe; relative paths start from $KOFF_DATA if set, else where they did in training.

    Raises:
        FileNotFoundError: no such folder, or not the output of a finished run.
    """
    directory = check_saved(directory)
    if not (directory / RECIPE_FILE).is_file():
        raise FileNotFoundError(
            f"koff: {directory} must hold the recipe it was trained with, got no "
            f"{RECIPE_FILE}; use koff.evaluate from Python for a model without one"
        )
    values, root = stored_recipe(directory, "koff")
    recipe = parse(values, data_root(Path(root)))
    added = open_saved(directory).manifest.metadata.get("added")
    for name, record in (added or {}).items():
        recipe.data[name] = added_data(record, name)
    return recipe


def check_saved(directory: str | Path) -> Path:
    """Returns the folder of a saved koff model; that of a hub id is downloaded.

    Args:
        directory: what `koff.save` or `koff train` wrote, or "user/repo[@revision]" of the hub.

    Raises:
        FileNotFoundError: no such folder, or one without a saved model.
    """
    directory = resolve(directory)
    if not (current(directory) / MARKER).is_file():
        got = "a folder without koff.json" if directory.is_dir() else "no folder there"
        raise FileNotFoundError(
            f"koff: {directory} must be the output of a finished `koff train`, got {got}; train "
            "first, or correct the path"
        )
    return directory


def evaluate_run(
    directory: str | Path,
    *,
    split: str = "test",
    base: bool = False,
    batch_size: int = 8,
    device: str | None = None,
) -> list[EvalRow]:
    """Measures a saved model on every domain and general part that has the split.

    Args:
        directory: output folder of `koff train`.
        split: "train", "validation" or "test".
        base: measure the dense base model too.
        batch_size: blocks per forward.
        device: where to run; None is the first GPU if there is one, else the CPU.

    Returns:
        Rows of the base, if asked for, then of the koff model with every memory and with none.

    Raises:
        FileNotFoundError, ValueError: no finished run, missing data, or no such split.
    """
    import koff

    directory, device = check_saved(directory), pick_device(device)
    recipe = read_run(directory)
    size = recipe.train.block_size
    sources = eval_sources(recipe, split)
    documents = {name: load_documents(source) for name, source in sources.items()}
    tokenizer = open_saved(directory).load_tokenizer()
    packed = {
        name: pack(texts, tokenizer, size, name=f"the {split} split of {name!r}")
        for name, texts in documents.items()
    }
    options: Mapping[str, Any] = {"block_size": size, "batch_size": batch_size, "split": split}
    rows = []
    if base:
        rows += evaluate(load_base(recipe).to(device), tokenizer, packed, **options)
    model = koff.load(directory, device=device)
    return rows + evaluate(model, tokenizer, packed, **options)


def analyse_run(
    directory: str | Path,
    domain: str,
    *,
    memory: str | None = None,
    split: str = "test",
    batch_size: int = 8,
    device: str | None = None,
) -> PrefixMass:
    """Measures how much attention a domain's text gives to the learned keys of a saved memory.

    Args:
        directory: output folder of `koff train`.
        domain: a domain or general part of its recipe.
        memory: name of the memory; None is that of the domain's name.
        split: "train", "validation" or "test".
        batch_size: blocks per forward.
        device: where to run; None is the first GPU if there is one, else the CPU.

    Raises:
        FileNotFoundError, KeyError, ValueError: no finished run, no such domain or memory, or a
            memory without a KV part.
    """
    import koff

    directory = check_saved(directory)
    recipe = read_run(directory)
    sources = eval_sources(recipe, split)
    if domain not in sources:
        raise KeyError(
            f"koff analyse: --domain must be one of {list(sources)} for the {split} split, got "
            f"{domain!r}; correct the name"
        )
    memory = domain if memory is None else memory
    check_memory(directory, memory, "koff analyse")
    documents = load_documents(sources[domain])
    model = koff.load(directory, device=pick_device(device))
    size = recipe.train.block_size
    options: Mapping[str, Any] = {"block_size": size, "batch_size": batch_size}
    tokenizer = open_saved(directory).load_tokenizer()
    return prefix_attention_mass(model, tokenizer, documents, memory=memory, **options)


def eval_sources(recipe: Recipe, split: str) -> dict[str, DataSource]:
    """Returns {name: source} of everything a run is measured on.

    Args:
        recipe: the recipe.
        split: "train", "validation" or "test".

    Raises:
        ValueError: an unknown split, or one that nothing in the recipe has.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(
            f"koff eval: split must be 'train', 'validation' or 'test', got {split!r}; choose one"
        )
    sources = recipe.sources(split)
    for name, source in recipe.sources(split, general=True).items():
        if name not in sources:
            sources[name] = source
        elif source != sources[name]:
            sources[f"general {name}"] = source
    if not sources:
        raise ValueError(
            f"koff eval: the recipe must name a {split} split for some domain, got none; add it or "
            "choose another --split"
        )
    return sources


def generate_text(
    directory: str | Path,
    prompt: str,
    *,
    memory: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Continues a prompt with a saved model.

    Args:
        directory: output folder of `koff train`, or of `koff.save` with a tokenizer.
        prompt: text to go on from; BOS is put before it where the tokenizer has one.
        memory: name of the memory, or None.
        max_new_tokens: at most so many tokens are added.
        temperature: 0 is greedy.
        seed: seed of the sampling.
        device: where to run; None is the first GPU if there is one, else the CPU.

    Returns:
        The prompt and its continuation.

    Raises:
        FileNotFoundError: no saved model. KeyError: an unknown memory. ValueError: an empty prompt.
    """
    import torch

    import koff

    directory = check_saved(directory)
    check_memory(directory, memory, "koff generate")
    tokenizer = open_saved(directory).load_tokenizer()
    ids = _prompt_ids(tokenizer, prompt)
    model = koff.load(directory, device=pick_device(device))
    inputs = torch.tensor([ids], device=next(model.parameters()).device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        memory=memory,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **({"do_sample": False} | sampling),
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt as training saw them: BOS first where the tokenizer has one."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("koff generate: the prompt must not be empty, got ''; write some text")
    return ids


def check_memory(directory: str | Path, memory: str | None, where: str) -> None:
    """Raises KeyError if a saved model has no such memory; reads no weights.

    Args:
        directory: folder of a saved model.
        memory: a name, or None.
        where: for errors.
    """
    names = saved_memories(check_saved(directory))
    if memory is not None and memory not in names:
        raise KeyError(
            f"{where}: memory must be one of {list(names)}, got {memory!r}; correct --memory"
        )


def saved_memories(directory: Path) -> tuple[str, ...]:
    """Returns the names of the memories of a saved model, in order."""
    return tuple(open_saved(directory).manifest.memories)


def pick_device(device: str | None) -> str:
    """Returns `device`, or what there is: "cuda", else "cpu".

    Raises:
        ValueError: a device that torch does not know or that this machine lacks.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"koff: --device must be cpu, cuda, cuda:1, ..., got {device!r}") from None
    there = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
    if kind not in ("cpu", there):
        got = f"{device!r} with {there or 'no accelerator'}"
        raise ValueError(f"koff: --device must be there, got {got}; use cpu")
    return device


def count_saved(folder: Path, *, deep: bool = True) -> int:
    """Returns the number of values in the safetensors files of a folder, from their headers.

    Args:
        folder: where to look.
        deep: look into its subfolders too.
    """
    total = 0
    for path in folder.rglob("*.safetensors") if deep else folder.glob("*.safetensors"):
        with asked_by("koff info"):
            total += sum(math.prod(shape) for _, shape in File(path).header().values())
    return total


def describe(directory: str | Path) -> dict[str, str]:
    """Returns named facts of a saved model, ready to print; reads no weights.

    Args:
        directory: folder of a saved model.

    Raises:
        FileNotFoundError, ValueError: no saved model there, or a damaged koff.json.
    """
    directory = current(check_saved(directory))
    with asked_by("koff info"):
        manifest = open_saved(directory).manifest
    widths, dense, removed = manifest.widths, manifest.dense_widths, manifest.sparsity
    named = {
        "base": str(manifest.base),
        "written": f"{manifest.created}, koff {manifest.koff}",
        "backbone": f"{millions(count_saved(directory, deep=False))} parameters",
        "MLP widths": f"{_span(widths)} in {len(widths)} layers (dense: {_span(dense)})",
        "sparsity, of the MLP neurons": f"{removed['mlp']:.1%}",
        "sparsity, of all weights": f"{removed['model']:.1%}",
        "sparsity, of all but embeddings": f"{removed['non_embedding']:.1%}",
    }
    for name in manifest.memories:
        folder = directory / "memories" / name
        parts = [
            f"{part} {millions(count_saved(folder / part))}"
            for part in ("lora", "kv")
            if (folder / part).is_dir()
        ]
        named[f"memory {name}"] = f"{', '.join(parts)} parameters"
    return named


def _span(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"
