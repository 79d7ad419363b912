"""GGUF files: llama.cpp computes what koff does, tokens included; what it cannot say is refused."""

import json
import urllib.request

import gguf
import numpy as np
import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.models import attached, tokens
from support.widths import spread
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import koff
from koff.storage import export_gguf

pytestmark = pytest.mark.usefixtures("no_real_fsync")

TEXTS = [
    "Hello world, it's 2024: 12345 apples and 7 pears.",
    "  Él niño — ça va? 你好 déjà vu\n\n\tfoo  bar\r\nx=1+2 WE'LL DON'T  ",
]
NEW = 12
CLOSE = 1e-5  # log-probabilities in fp32, whose sums are added up in another order
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("llama", "uniform", {}),
    "llama-widths": ("llama", "global", {"tie_word_embeddings": False}),
    "llama-rope": ("llama", "global", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", "uniform", {}),
    "qwen3": ("qwen3", "uniform", {}),
}


def byte_level(words=None, ignore_merges=False, **special) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(3 * TEXTS, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build(architecture="llama", kind="uniform", changes=None, **config):
    """A compacted model for ``byte_level``, with embeddings that no token has."""
    ids = {"vocab_size": 305, "bos_token_id": 0, "eos_token_id": None}
    config = {"memories": ("aa", "bb"), "kv": None} | config
    model = spread(attached(architecture, changes=ids | (changes or {}), **config))
    koff.binarize(model, target=0.4, per_layer=kind, multiple_of=8)
    return koff.compact(model, inplace=True)


class LlamaCpp:
    """llama.cpp's server in this process, in fp32 throughout.

    Args:
        folder: that ``koff.export_gguf`` wrote.
        memories: whose adapters are loaded.
    """

    def __init__(self, folder, memories=()):
        import xllamacpp

        settings, self.memories = xllamacpp.CommonParams(), memories
        settings.model.path = str(folder / "backbone.gguf")
        settings.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(str(folder / f"memories/{name}.gguf"), 0.0)
            for name in memories
        ]
        settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.verbosity = 0
        # Usually it keeps keys and values in fp16.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def post(self, path, **body):
        """What it answers to a JSON request."""
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def go_on(self, ids, memory):
        """Greedy ids, and of each step the most probable tokens with their log-probabilities."""
        chosen = [] if memory is None else [{"id": self.memories.index(memory), "scale": 1}]
        sampling = {"n_predict": NEW, "temperature": 0, "n_probs": 20, "cache_prompt": False}
        answer = self.post("/completion", prompt=ids, lora=chosen, return_tokens=True, **sampling)
        return answer["tokens"], answer.get("completion_probabilities", [])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_llama_cpp_computes_what_koff_does(case, tmp_path):
    architecture, kind, changes = CASES[case]
    model = build(architecture, kind, changes)
    folder = koff.save(model, tmp_path / "out", tokenizer=byte_level())
    engine = LlamaCpp(koff.export_gguf(folder, tmp_path / "gguf"), ("aa", "bb"))
    prompts, compared = tokens(2, 40).tolist(), 0
    for memory in (None, "aa", "bb"):
        for prompt in prompts:
            ids, steps = engine.go_on(prompt, memory)
            row = torch.tensor([prompt + ids])
            logprobs = model(row, memory=memory).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            assert ids == logprobs.argmax(-1).tolist()
            for step in steps:  # it says nothing of tokens that are no whole characters
                if ids.count(step["id"]) > 1:  # of which step it speaks is then unknown
                    continue
                own = logprobs[ids.index(step["id"])]
                got = {token["id"]: token["logprob"] for token in step["top_logprobs"]}
                assert list(got.values()) == pytest.approx(own[list(got)].tolist(), abs=CLOSE)
                compared += len(got)
    assert compared > 20


SPLIT = pre_tokenizers.Split
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = {
    "gpt-2": (None, False),
    "smollm": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        False,
    ),
    # As they stand in the tokenizers of Llama 3 and Qwen 2.
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        True,
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
}
WORDS["smaug-bpe"] = (WORDS["llama-bpe"][0], False)


def cutter(words):
    """The pre-tokenizer of an entry of ``WORDS``."""
    if isinstance(words, str):
        return pre_tokenizers.Sequence([SPLIT(Regex(words), "isolated"), BYTES])
    return words


@pytest.mark.parametrize("name", WORDS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(name, tmp_path):
    words, ignore_merges = WORDS[name]
    tokenizer = byte_level(cutter(words), ignore_merges)
    tokenizer.add_tokens(["<think>"])
    folder = koff.export_gguf(build(memories=()), tmp_path / "gguf", tokenizer=tokenizer)
    field = gguf.GGUFReader(folder / "backbone.gguf").fields["tokenizer.ggml.pre"]
    assert field.contents() == name
    engine = LlamaCpp(folder)
    for text in [*TEXTS, "a<think> b</s>c"]:
        # With a BOS, as koff trains and generates.
        wanted = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        got = engine.post("/tokenize", content=text, add_special=True, parse_special=True)
        assert got["tokens"] == wanted
    assert set(export_gguf._WORDS.values()) == {*WORDS}


def test_the_numbers_are_the_models_own(tmp_path):
    model = koff.load(koff.save(build(), tmp_path / "out"), dtype=torch.bfloat16)
    folder = koff.export_gguf(model, tmp_path / "gguf", tokenizer=byte_level())
    found = {t.name: t for t in gguf.GGUFReader(folder / "backbone.gguf").tensors}
    down, norm = found["blk.1.ffn_down.weight"], found["blk.1.ffn_norm.weight"]
    own = model.model.layers[1]
    wanted = own.mlp.down_proj.weight.view(torch.int16).numpy()
    assert down.tensor_type.name == "BF16" and norm.tensor_type.name == "F32"
    assert np.array_equal(down.data.view(np.int16), wanted)
    assert np.array_equal(norm.data, own.post_attention_layernorm.weight.detach().float().numpy())
    assert "output.weight" not in found  # the embedding is the head


def test_the_ends_of_a_text_and_the_chat_template_are_told(tmp_path):
    model, tokenizer = build(memories=()), byte_level(chat_template="{{ messages }}")
    model.generation_config.eos_token_id = [5, 1]
    folder = koff.export_gguf(model, tmp_path / "gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(folder / "backbone.gguf").fields
    told = {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 5, "add_bos_token": True}
    assert {name: fields[f"tokenizer.ggml.{name}"].contents() for name in told} == told
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    model.generation_config.eos_token_id = [5, 6, 7]
    with pytest.raises(ValueError, match="at most three tokens must end a text"):
        koff.export_gguf(model, tmp_path / "other", tokenizer=tokenizer)


def test_learned_keys_are_never_left_out_silently(tmp_path):
    model = build(memories=("aa",), kv=koff.KVConfig(num_tokens=7, init="tokens"))
    folder, other = koff.save(model, tmp_path / "out", tokenizer=byte_level()), build()
    koff.import_memory(folder, "kv", kv=folder / "memories/aa/kv")
    with pytest.raises(ValueError, match="'aa' must have no learned keys, .*got 7; name the"):
        koff.export_gguf(folder, tmp_path / "gguf")
    with pytest.raises(ValueError, match="'kv' must have a LoRA, got learned keys alone"):
        koff.export_gguf(folder, tmp_path / "gguf", without_kv=True)
    made = koff.export_gguf(folder, tmp_path / "gguf", memories=["aa"], without_kv=True)
    card = (made / "README.md").read_text()
    assert "**Left out**: the learned keys and values of aa (7)" in card
    assert "not written: kv." in card and (made / "memories/aa.gguf").is_file()
    bare = koff.export_gguf(folder, tmp_path / "bare", memories=[])
    assert "not written: aa, kv." in (bare / "README.md").read_text()
    assert sorted(path.name for path in bare.iterdir()) == ["README.md", "backbone.gguf"]
    whole = koff.export_gguf(other, tmp_path / "whole", tokenizer=byte_level())
    assert "Left out" not in (whole / "README.md").read_text()


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    spaced = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    stripping = byte_level()
    stripping.add_tokens([AddedToken("<m>", lstrip=True)])
    large = byte_level()
    large.add_tokens([f"<{index}>" for index in range(9)])
    sliding = build("qwen2")
    sliding.config.layer_types = ["full_attention"] * 2 + ["sliding_attention"]
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    good, cases = build(), []
    for tokenizer, message in (
        (None, "must have a tokenizer, got a folder without one"),
        (make_tokenizer(), "got the model WordLevel"),
        (spaced, "got the words of"),
        (byte_level(pre_tokenizers.Whitespace()), "got the words of"),
        (byte_level(ignore_merges=True), "got the words of"),
        (lower, "got the normalizer Lowercase"),
        (stripping, "got added tokens that take spaces"),
        (large, "must have at most 305 tokens, as the model has, got 309"),
    ):
        cases.append((good, tokenizer, message))
    for model, message in (
        (build("qwen2", "global"), "all layers of a qwen2 must have one width"),
        (build("granite"), "must be one of llama, qwen2, qwen3, got granite"),
        (build(changes={"attention_bias": True}), "got attention with biases"),
        (build(changes={"rope_parameters": yarn}), "must be one of default, linear, llama3"),
        (sliding, "got attention of the kinds"),
        (attached("llama"), "must be compacted, got one with gates"),
    ):
        cases.append((model, byte_level(), message))
    for model, tokenizer, message in cases:
        with pytest.raises(ValueError, match=message):
            koff.export_gguf(model, tmp_path / "gguf", tokenizer=tokenizer)
    with pytest.raises(KeyError, match="must be one of .*'aa', 'bb'.*got 'cc'"):
        koff.export_gguf(good, tmp_path / "gguf", memories=["cc"], tokenizer=byte_level())
    assert not list(tmp_path.iterdir())
