"""What can be done with a finished run: measure it, look at its attention, generate, describe it.

Arguments are looked at before torch and transformers are imported, which take seconds; to describe
a model needs neither.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.sources import DataSource, Document, check_source, read_documents
from ..errors import asked_by
from ..storage.files import File
from ..storage.hub import resolve
from ..storage.layout import MARKER, current
from ..storage.saved_folder import open_saved
from .recipe import RECIPE_FILE, Recipe, added_data, data_root, parse, stored_recipe
from .tables import millions

if TYPE_CHECKING:
    from ..data.blocks import PackedBlocks
    from ..evaluation.attention_mass import PrefixMass
    from ..evaluation.neurons import NeuronReport
    from ..evaluation.perplexity import EvalRow
    from ..evaluation.swaps import SwapRow


def check_saved(directory: str | Path) -> Path:
    """Return the folder of a saved koff model; that of a hub id is downloaded.

    Args:
        directory: what ``koff.save`` or `koff train` wrote, or "user/repo[@revision]" of the hub.

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


def saved_memories(directory: Path) -> tuple[str, ...]:
    """Return the names of the memories of a saved model, in order."""
    return tuple(open_saved(directory).manifest.memories)


def read_run(directory: Path) -> Recipe:
    """Read the recipe that a finished run stored beside its model.

    Args:
        directory: as ``check_saved`` returns it.

    Returns:
        The recipe, with the data of memories that were added later; relative paths start from
        $KOFF_DATA if set, else where they did in training.

    Raises:
        FileNotFoundError: a model without a recipe.
    """
    if not (directory / RECIPE_FILE).is_file():
        raise FileNotFoundError(
            f"koff: {directory} must hold the recipe it was trained with, got no "
            f"{RECIPE_FILE}; use koff.evaluate from Python for a model without one"
        )
    values, root = stored_recipe(directory)
    recipe = parse(values, data_root(Path(root)))
    # Beside the recipe, which stays what the run was started with.
    added = open_saved(directory).manifest.metadata.get("added")
    for name, record in (added or {}).items():
        recipe.data[name] = added_data(record, name)
    return recipe


def eval_sources(recipe: Recipe, split: str) -> dict[str, DataSource]:
    """Return {name: source} of everything a run is measured on: domains, then general parts.

    Args:
        recipe: of the run.
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
        # A general part is often a domain under the same name; its text is measured once.
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


def pick_device(device: str | None) -> str:
    """Return ``device``, or for None the first GPU if there is one, else the CPU.

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
        raise ValueError(
            f"koff: --device must be there, got {device!r} with {there or 'no accelerator'}; "
            "use cpu"
        )
    return device


def evaluate_run(
    directory: str | Path,
    *,
    split: str = "test",
    base: bool = False,
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> list[EvalRow]:
    """Measure a saved model on every domain and general part that has the split.

    Args:
        directory: output folder of `koff train`.
        split: "train", "validation" or "test".
        base: measure the dense base model too.
        max_tokens: of each domain, only its first documents, up to the one with which they reach
            so many tokens: the same text for every variant; None: all of them.
        batch_size: blocks per forward.
        device: where to run; None: as ``pick_device`` finds it.

    Returns:
        Rows of the base, if asked for, then of the koff model with every memory and with none.

    Raises:
        FileNotFoundError, ValueError: no finished run, missing data, or no such split.
    """
    directory, device = check_saved(directory), pick_device(device)
    recipe = read_run(directory)
    size = recipe.train.block_size
    sources = eval_sources(recipe, split)
    for source in sources.values():
        check_source(source)

    from ..evaluation.perplexity import evaluate
    from ..storage.save_load import load
    from .train import load_base

    tokenizer = open_saved(directory).load_tokenizer()
    # Packed here and not by evaluate: once for both models, and errors name the split.
    packed = pack_sources(sources, tokenizer, size, split, max_tokens)
    rows = []
    options: dict[str, Any] = {"block_size": size, "batch_size": batch_size, "split": split}
    if base:  # without a name of its own: it is gone before the other model needs its memory
        rows += evaluate(load_base(recipe).to(device), tokenizer, packed, **options)
    return rows + evaluate(load(directory, device=device), tokenizer, packed, **options)


def evaluate_run_swaps(
    directory: str | Path,
    *,
    split: str = "test",
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> list[SwapRow]:
    """Measure a saved model on the domains of its memories, the memories' halves swapped.

    Args:
        directory, split, max_tokens, batch_size, device: as ``evaluate_run`` takes them.

    Raises:
        FileNotFoundError, ValueError: as ``evaluate_run``; memories that cannot be swapped.
    """
    directory, device = check_saved(directory), pick_device(device)
    recipe = read_run(directory)
    size = recipe.train.block_size
    sources = recipe.sources(split)
    if not sources:
        raise ValueError(
            f"koff eval: some domain must have a {split} split for --swaps, got none; add it or "
            "choose another --split"
        )
    for source in sources.values():
        check_source(source)

    from ..evaluation.swaps import evaluate_swaps
    from ..storage.save_load import load

    tokenizer = open_saved(directory).load_tokenizer()
    packed = pack_sources(sources, tokenizer, size, split, max_tokens)
    model = load(directory, device=device)
    return evaluate_swaps(
        model, tokenizer, packed, block_size=size, batch_size=batch_size, split=split
    )


def pack_sources(
    sources: dict[str, DataSource],
    tokenizer: Any,
    size: int,
    split: str,
    max_tokens: int | None,
) -> dict[str, PackedBlocks]:
    """Return {name: its documents, the first ``max_tokens`` tokens of them, in blocks of ``size``};
    errors name the split."""
    from ..data.blocks import pack

    return {
        name: pack(
            source if max_tokens is None else first_documents(source, tokenizer, max_tokens),
            tokenizer,
            size,
            name=f"the {split} split of {name!r}",
        )
        for name, source in sources.items()
    }


def first_documents(source: DataSource, tokenizer: Any, tokens: int) -> list[Document]:
    """Return the first documents, whole, that hold ``tokens`` tokens together."""
    chosen: list[Document] = []
    for document in read_documents(source):
        if tokens <= 0:
            break
        chosen.append(document)
        # A prompt and its completion are two texts of one record.
        texts = [document] if isinstance(document, str) else list(document.values())
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        tokens -= sum(map(len, ids))
    return chosen


def analyse_run(
    directory: str | Path,
    domain: str,
    *,
    memory: str | None = None,
    split: str = "test",
    batch_size: int = 8,
    device: str | None = None,
) -> PrefixMass:
    """Measure how much attention a domain's text gives to the learned keys of a saved memory.

    Args:
        directory: output folder of `koff train`.
        domain: a domain or general part of its recipe.
        memory: name of the memory; None: that of the domain's name.
        split: "train", "validation" or "test".
        batch_size: blocks per forward.
        device: where to run; None: as ``pick_device`` finds it.

    Raises:
        FileNotFoundError, KeyError, ValueError: no finished run, no such domain or memory, or a
            memory without a KV part.
    """
    directory = check_saved(directory)
    recipe = read_run(directory)
    sources = eval_sources(recipe, split)
    if domain not in sources:
        raise KeyError(
            f"koff analyse: --domain must be one of {list(sources)} for the {split} split, got "
            f"{domain!r}; correct the name"
        )
    memory = domain if memory is None else memory
    names = saved_memories(directory)
    if memory not in names:
        raise KeyError(
            f"koff analyse: memory must be one of {list(names)}, got {memory!r}; correct --memory"
        )
    check_source(sources[domain])

    from ..evaluation.attention_mass import prefix_attention_mass
    from ..storage.save_load import load

    model = load(directory, device=pick_device(device))
    return prefix_attention_mass(
        model,
        open_saved(directory).load_tokenizer(),
        sources[domain],
        memory=memory,
        block_size=recipe.train.block_size,
        batch_size=batch_size,
    )


def analyse_neurons(
    directory: str | Path,
    *,
    split: str = "test",
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> NeuronReport:
    """Compare how a saved model's mask treats language-specific and other neurons of its base.

    Args:
        directory: output folder of `koff train`.
        split: "train", "validation" or "test".
        max_tokens: of each domain, as ``evaluate_run`` takes it.
        batch_size: blocks per forward.
        device: where to run; None: as ``pick_device`` finds it.

    Raises:
        FileNotFoundError, ValueError: no finished run, nothing pruned, or fewer than two domains
            with the split.
    """
    directory = check_saved(directory)
    recipe, saved = read_run(directory), open_saved(directory)
    if saved.manifest.kept is None:
        raise ValueError(
            "koff analyse: --neurons must have a pruned model, got one with all its neurons; "
            "analyse one that was trained with koff.target_sparsity above 0"
        )
    sources = recipe.sources(split)
    if len(sources) < 2:
        raise ValueError(
            f"koff analyse: --neurons must have at least two domains with a {split} split, to see "
            f"what only one uses, got {list(sources)}"
        )
    for source in sources.values():
        check_source(source)

    import torch

    from ..evaluation.neurons import neuron_report
    from .train import load_base

    tokenizer, size = saved.load_tokenizer(), recipe.train.block_size
    packed = pack_sources(sources, tokenizer, size, split, max_tokens)
    with asked_by("koff analyse"):
        kept = saved.manifest.kept_neurons()
        pruned = []
        for rows, width in zip(kept, saved.manifest.dense_widths, strict=True):
            pruned.append(torch.ones(width, dtype=torch.bool).index_fill_(0, rows, False))
        base = load_base(recipe).to(pick_device(device))
        return neuron_report(base, packed, pruned, batch_size=batch_size)


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
    """Continue a prompt with a saved model.

    Args:
        directory: output folder of `koff train`, or of ``koff.save`` with a tokenizer.
        prompt: text to go on from.
        memory: name of the memory, or None.
        max_new_tokens: at most so many tokens are added.
        temperature: 0: greedy.
        seed: of the sampling.
        device: where to run; None: as ``pick_device`` finds it.

    Returns:
        The prompt and its continuation.

    Raises:
        FileNotFoundError: no saved model. KeyError: an unknown memory. ValueError: an empty prompt.
    """
    directory = check_saved(directory)
    names = saved_memories(directory)
    if memory is not None and memory not in names:
        raise KeyError(
            f"koff generate: memory must be one of {list(names)}, got {memory!r}; correct --memory"
        )

    import torch
    from transformers.utils import logging

    from ..storage.save_load import load

    logging.disable_progress_bar()  # the text alone is to be seen
    tokenizer = open_saved(directory).load_tokenizer()
    ids = _prompt_ids(tokenizer, prompt)
    model = load(directory, device=pick_device(device))
    inputs = torch.tensor([ids], device=model.device)
    # temperature=0 would be an error in transformers, and without sampling any value a warning.
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        memory=memory,
        max_new_tokens=max_new_tokens,
        # One row needs no padding, but generate warns where it finds no token for it.
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **({"do_sample": False} | sampling),
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt as training saw them: BOS first where the tokenizer has one."""
    # Added by hand, as in koff.data: many tokenizers add none, or EOS too, of their own accord.
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("koff generate: the prompt must not be empty, got ''; write some text")
    return ids


def describe(directory: str | Path) -> dict[str, str]:
    """Return named facts of a saved model, ready to print; reads no weights.

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


@asked_by("koff info")
def count_saved(folder: Path, *, deep: bool = True) -> int:
    """Return the number of values in the safetensors files of a folder, from their headers.

    Args:
        folder: where to look.
        deep: look into its subfolders too.
    """
    total = 0
    for path in folder.rglob("*.safetensors") if deep else folder.glob("*.safetensors"):
        total += sum(math.prod(shape) for _, shape in File(path).header().values())
    return total
