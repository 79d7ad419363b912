"""Write backbone and LoRA adapters as GGUF, the format of llama.cpp and what is built on it.

What GGUF cannot say is refused. Learned keys and values have no place in it: the one file that
llama.cpp restores them from, a saved slot, is a dump of its own structures and of one version of
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import asked_by, asker
from ..model import arch
from ..model.arch import NARROW_PREFIX
from ..version import __version__
from .export import check_output, first_writes, new_folder, open_source
from .layout import CARD, MEMORIES
from .space import bytes_of

BACKBONE = "backbone.gguf"

# transformers' model type -> llama.cpp's architecture of equal widths, and of widths by layer.
_ARCHITECTURES = {"llama": ("llama", "deci"), "qwen2": ("qwen2", None), "qwen3": ("qwen3", None)}
# These rotate neighbouring dimensions of a head where transformers rotates the two halves, so rows
# of queries and keys change places.
_NEIGHBOURS = ("llama", "deci")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _SPACES = r"|[^\r\n\p{L}\p{N}]?\p{L}+", r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}{_LETTERS}|\p{{N}}{{1,3}}{_MARKS}{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}{_LETTERS}|\p{{N}}{_MARKS}{_SPACES}"
# How a byte-level BPE tokenizer cuts a text into words before it merges, and whether a word that is
# a token is taken whole -> llama.cpp's name for both. It knows such rules by name alone.
_WORDS = {
    (("bytes", True), False): "gpt-2",
    (("digits", "bytes", True), False): "smollm",
    ((_LLAMA3, "bytes", False), True): "llama-bpe",
    ((_LLAMA3, "bytes", False), False): "smaug-bpe",
    ((_QWEN2, "bytes", False), False): "qwen2",
}

_README = """# GGUF of a koff backbone and its memories

Written by koff {version} (knowledge offloading, arXiv 2605.29075) for llama.cpp and what is built
on it.

- `{backbone}`: the backbone, without any memory.
{adapters}{lost}
```
llama-server -m {backbone}{options}
```
{choice}"""
_CHOICE = """A request chooses a memory by its number in this order, as
`"lora": [{"id": 0, "scale": 1}]`; with `"lora": []` it has none.
"""


@asked_by("koff.export_gguf")
@first_writes
def export_gguf(
    source: PreTrainedModel | str | Path,
    output: str | Path,
    *,
    memories: Sequence[str] | None = None,
    without_kv: bool = False,
    tokenizer: Any = None,
    revision: str | None = None,
) -> Path:
    """Write the backbone, and the LoRA of each memory, as GGUF files for llama.cpp.

    Of a distributed run the first process writes, and the others wait.

    Args:
        source: an attached model without gates, the folder of a saved one, or its id on the hub.
        output: folder to make; it may exist if it is empty.
        memories: names of those to write; None: all.
        without_kv: leave learned keys and values out, which GGUF has no place for. What is left of
            such a memory is not what was trained.
        tokenizer: a byte-level BPE; None: that of the folder.
        revision: of a hub repository.

    Returns:
        The output folder: backbone.gguf, memories/NAME.gguf, and a README.md that says how to use
        them and what was left out.

    Raises:
        FileNotFoundError, ImportError, KeyError, TypeError, ValueError: no saved model, no package
            gguf, no such memory, one with learned keys, or a model or tokenizer that GGUF or
            llama.cpp has no form for; nothing is written then.
        OSError: there is no room for it on the disk; nothing stays there.
    """
    output = check_output(output)
    model, tokenizer = open_source(source, tokenizer, revision)
    gguf = _library()
    architecture = _architecture(model)
    writers = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    if model.dtype not in writers:
        raise ValueError(
            f"{asker()}: the backbone must be in float32, float16 or bfloat16, got {model.dtype}; "
            "load it in another dtype"
        )
    matrix, file_type = writers[model.dtype]
    known = model.koff.memory_names
    names = list(known if memories is None else memories)
    for name in names:
        _check_memory(model, name, without_kv)
    vocabulary = _vocabulary(gguf, tokenizer, model)

    permuted, paths = _permuter(model, architecture), _paths(gguf, model, architecture)
    with new_folder(output.absolute(), bytes_of(model.parameters())) as staging:
        writer = gguf.GGUFWriter(staging / BACKBONE, architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(file_type)
        _describe(writer, model, architecture)
        vocabulary(writer)
        backbone = {k: t for k, t in model.state_dict().items() if not k.startswith("koff.")}
        if model.config.tie_word_embeddings:  # llama.cpp takes the embedding where there is no head
            backbone.pop("lm_head.weight", None)
        tensors = [
            (paths(key), permuted(key, t), matrix if t.dim() > 1 else None)
            for key, t in backbone.items()
        ]
        factors = _rope_factors(model)
        if factors is not None:
            tensors.append(("rope_freqs.weight", factors, None))
        _write(gguf, writer, tensors)
        if names:
            (staging / MEMORIES).mkdir()
        for name in names:
            memory = model.koff.memories[name]
            writer = gguf.GGUFWriter(staging / MEMORIES / f"{name}.gguf", architecture)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(memory.lora_config.alpha))
            pairs = []
            for site, lora in memory.sites():
                key = f"{arch.site_path(site, model)}.weight"
                pairs.append((f"{paths(key)}.lora_a", lora.a, None))
                pairs.append((f"{paths(key)}.lora_b", permuted(key, lora.b), None))
            _write(gguf, writer, pairs)
        (staging / CARD).write_text(_card(model, names), encoding="utf-8")
    return output


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ImportError(
            f"{asker()}: the package gguf must be installed, got none; pip install 'koff[gguf]'"
        ) from None
    return gguf


def _check_memory(model: PreTrainedModel, name: str, without_kv: bool) -> None:
    """Refuse a memory that an adapter file cannot hold."""
    known = model.koff.memory_names
    if name not in known:
        raise KeyError(
            f"{asker()}: the memory must be one of {list(known)}, got {name!r}; correct the name"
        )
    memory = model.koff.memories[name]
    if memory.kv_config is not None and not without_kv:
        raise ValueError(
            f"{asker()}: memory {name!r} must have no learned keys, for which GGUF has no place, "
            f"got {memory.length}; name the memories to write, or leave the keys out "
            "(--without-kv, without_kv=True), after which it is not what was trained"
        )
    if memory.lora_config is None:
        raise ValueError(
            f"{asker()}: memory {name!r} must have a LoRA, got learned keys alone; name the "
            "memories to write"
        )


def _architecture(model: PreTrainedModel) -> str:
    """llama.cpp's name of the architecture, after making sure that it computes the same."""
    config, entry = model.config, model.config.model_type.removeprefix(NARROW_PREFIX)
    equal, by_layer = _ARCHITECTURES.get(entry, (None, None))
    if equal is None:
        raise ValueError(
            f"{asker()}: the model type must be one of {', '.join(_ARCHITECTURES)}, got {entry}; "
            "use koff.export_merged, and llama.cpp's own converter"
        )
    name = equal if len(set(arch.widths(model))) == 1 else by_layer
    if name is None:
        raise ValueError(
            f"{asker()}: all layers of a {entry} must have one width in llama.cpp, got "
            f"{arch.widths(model)}; prune with per_layer='uniform'"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    allowed = ("default", "linear", "llama3") if entry == "llama" else ("default",)
    if rope not in allowed:
        raise ValueError(
            f"{asker()}: the RoPE type of a {entry} must be one of {', '.join(allowed)} to be "
            f"written as GGUF, got {rope!r}; use llama.cpp's own converter"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    biased = entry != "qwen2" and getattr(config, "attention_bias", False)
    activation = arch.activation(model)
    for what, wrong in (
        (f"attention of the kinds {sorted(kinds)}", kinds != {"full_attention"}),
        ("attention with biases", biased),
        (f"the activation {activation}", activation != "silu"),
    ):
        if wrong:
            raise ValueError(
                f"{asker()}: a {entry} must be what llama.cpp computes under this name (full "
                f"attention without sliding windows, silu, biases as in the original), got {what}; "
                "use koff.export_merged"
            )
    return name


def _paths(gguf: ModuleType, model: PreTrainedModel, architecture: str) -> Callable[[str], str]:
    """A function from transformers' names of tensors to those of GGUF."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)

    def path(key: str) -> str:
        found = known.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(
                f"{asker()}: {key} must have a name in GGUF's {architecture}, got none; use "
                "koff.export_merged"
            )
        return found

    return path


def _permuter(model: PreTrainedModel, architecture: str) -> Callable[[str, Tensor], Tensor]:
    """A function that orders the rows of a tensor as llama.cpp's RoPE wants them: within each head
    0, D/2, 1, D/2 + 1, ... for those whose pairs are neighbours there."""
    config = model.config
    counts = (config.num_attention_heads, config.num_key_value_heads)
    heads = dict(zip(arch.ATTENTION_LINEARS, counts, strict=False))  # queries and keys come first

    def permuted(key: str, tensor: Tensor) -> Tensor:
        count = heads.get(key.split(".")[-2])
        if count is None or architecture not in _NEIGHBOURS:
            return tensor
        halves = tensor.view(count, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    return permuted


def _rope_factors(model: PreTrainedModel) -> Tensor | None:
    """By what llama.cpp divides the frequencies of RoPE, [D / 2]; None: by nothing.

    So the scaling of Llama 3, and a linear one, come as numbers and not as a name.
    """
    frequencies = arch.inverse_frequencies(model).float().cpu()
    width = 2 * len(frequencies)
    steps = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    factors = (1.0 / model.config.rope_parameters["rope_theta"] ** steps) / frequencies
    return None if torch.equal(factors, torch.ones_like(factors)) else factors


def _describe(writer: Any, model: PreTrainedModel, architecture: str) -> None:
    """What llama.cpp must know of a model."""
    config, (kv_heads, width) = model.config, arch.kv_shape(model)
    layers, widths = config.num_hidden_layers, arch.widths(model)
    narrow = architecture == "deci"  # has one number for each layer where others have one
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(widths if narrow else widths[0])
    heads = config.num_attention_heads
    writer.add_head_count([heads] * layers if narrow else heads)
    writer.add_head_count_kv([kv_heads] * layers if narrow else kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write(gguf: ModuleType, writer: Any, tensors: list[tuple[str, Tensor, Any]]) -> None:
    """Write a file: names and shapes first, then the data, one tensor at a time.

    Args:
        tensors: (name, tensor, type of its numbers; None: fp32, in which llama.cpp wants vectors).
    """
    float32 = gguf.GGMLQuantizationType.F32
    for name, tensor, kind in tensors:
        kind = kind or float32
        size = tensor.numel() * (4 if kind == float32 else 2)
        writer.add_tensor_info(name, tensor.shape, None, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor, kind in tensors:
        values = tensor.detach().cpu()
        if kind is None or kind == float32:
            data = values.float().contiguous().numpy()
        else:  # the bits as they are: numpy has no bfloat16
            data = values.contiguous().view(torch.int16).numpy()
        writer.write_tensor_data(data)
    writer.close()


# ---- tokenizer ----


def _vocabulary(gguf: ModuleType, tokenizer: Any, model: PreTrainedModel) -> Callable[[Any], None]:
    """A function that writes a tokenizer into a GGUF file, after everything about it was checked.

    llama.cpp has tokenizers of its own, which a file chooses by name. So only those are taken whose
    rules are known to be the ones behind a name: byte-level BPE that cuts words in five ways.
    """
    step = "use another model, or llama.cpp's own converter with koff.export_merged"
    if tokenizer is None:
        raise ValueError(
            f"{asker()}: a GGUF file must have a tokenizer, got a folder without one; pass it"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{asker()}: the tokenizer must be a fast one, got {type(tokenizer).__name__}; load it "
            "with AutoTokenizer"
        )
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = rules["model"]
    normalizer = (rules["normalizer"] or {}).get("type")
    words = _WORDS.get((tuple(_words(rules["pre_tokenizer"])), bool(kind.get("ignore_merges"))))
    odd = [
        token["content"]
        for token in rules["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    for what, wrong in (
        (f"the model {kind['type']}", kind["type"] != "BPE"),
        ("the rules of byte fallback", bool(kind.get("byte_fallback"))),
        (f"the words of {json.dumps(rules['pre_tokenizer'])[:200]}", words is None),
        # llama.cpp leaves NFC, which Qwen's has, to its callers.
        (f"the normalizer {normalizer}", normalizer not in (None, "NFC")),
        (f"added tokens that take spaces with them ({odd[:3]})", bool(odd)),
    ):
        if wrong:
            raise ValueError(
                f"{asker()}: the tokenizer must be a byte-level BPE that llama.cpp has a name for "
                f"({', '.join(_WORDS.values())}), got {what}; {step}"
            )
    size, ids = model.config.vocab_size, kind["vocab"]
    texts = [f"[PAD{index}]" for index in range(size)]  # rows of the embedding without a token
    types = [gguf.TokenType.UNUSED] * size
    added = {token["content"]: token for token in rules["added_tokens"]}
    highest = max([*ids.values(), *(token["id"] for token in added.values())])
    if highest >= size:
        raise ValueError(
            f"{asker()}: the tokenizer must have at most {size} tokens, as the model has, got "
            f"{highest + 1}; check that they belong together"
        )
    for text, index in ids.items():
        texts[index], types[index] = text, gguf.TokenType.NORMAL
    for text, token in added.items():
        texts[token["id"]] = text
        special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        types[token["id"]] = special
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in kind["merges"]]
    ends = _ends(model, tokenizer)

    def write(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
        writer.add_tokenizer_pre(words)
        writer.add_token_list(texts)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        # As koff trains and generates: a BOS in front wherever there is one.
        writer.add_add_bos_token(tokenizer.bos_token_id is not None)
        writer.add_add_eos_token(False)
        if tokenizer.bos_token_id is not None:
            writer.add_bos_token_id(tokenizer.bos_token_id)
        if tokenizer.pad_token_id is not None:
            writer.add_pad_token_id(tokenizer.pad_token_id)
        adds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for add, end in zip(adds, ends, strict=False):  # of a text, a turn, a message: all end one
            add(end)
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)

    return write


def _words(rule: dict[str, Any] | None) -> Iterator[str | bool]:
    """How a pre-tokenizer cuts, in the words of ``_WORDS``; "other" for what has no word."""
    rule = rule or {"type": None}
    if rule["type"] == "Sequence":
        for part in rule["pretokenizers"]:
            yield from _words(part)
    elif rule["type"] == "ByteLevel" and not rule["add_prefix_space"]:
        yield from ("bytes", rule["use_regex"])
    elif rule["type"] == "Digits" and rule["individual_digits"]:
        yield "digits"
    elif rule["type"] == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]:
        yield rule["pattern"].get("Regex", "other")
    else:
        yield "other"


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text, the tokenizer's own first."""
    own = model.generation_config.eos_token_id
    found = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None:
        found.insert(0, tokenizer.eos_token_id)
    ends = list(dict.fromkeys(found))
    if len(ends) > 3:
        raise ValueError(
            f"{asker()}: at most three tokens must end a text in GGUF, got {ends}; shorten "
            "model.generation_config.eos_token_id"
        )
    return ends


def _card(model: PreTrainedModel, names: list[str]) -> str:
    """What lies in the folder, how it is used, and what it lacks."""
    adapters = [f"- `{MEMORIES}/{name}.gguf`: the LoRA of memory {name!r}.\n" for name in names]
    lost = [
        f"{name} ({model.koff.memories[name].length})"
        for name in names
        if model.koff.memories[name].kv_config is not None
    ]
    text = ""
    if lost:
        text = (
            f"\n**Left out**: the learned keys and values of {', '.join(lost)}. GGUF has no place "
            "for them, and\nwithout them these memories are not what was trained.\n"
        )
    others = [name for name in model.koff.memory_names if name not in names]
    if others:
        text += f"\nMemories that were not written: {', '.join(others)}.\n"
    # Loaded, and used by those requests alone that ask.
    files = ",".join(f"{MEMORIES}/{name}.gguf" for name in names)
    options = f" --lora {files} --lora-init-without-apply" if names else ""
    return _README.format(
        version=__version__,
        backbone=BACKBONE,
        adapters="".join(adapters),
        lost=text,
        options=options,
        choice=_CHOICE if names else "",
    )
