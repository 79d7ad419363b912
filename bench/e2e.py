"""Whole models, end to end: prefill, decode and a training step, by transformers, PEFT and koff.

One list of cases for every machine. A backbone is a model of which 0, 12 or 25 % of all weights are
removed, with equal or with different widths; a way is what runs it; a memory is a LoRA on all
linear layers, the same numbers for PEFT and for koff, and where a case says so learned keys. All
trees of modules share their weights. Nothing is timed before its result was compared with that of
transformers or PEFT.

``python -m bench e2e`` times the cases in turns on this machine, ``bench.gpu`` one after another on
a GPU, most telling first.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import koff
from koff.model import arch
from koff.model.arch import Site
from koff.model.attach import contiguous
from koff.model.state import count_weights

from . import timing
from .models import Shape, forward_flops, llama_config, vary

NAMES = tuple(f"m{index}" for index in range(8))
RANK = 16
# Share of all weights that is removed, and how koff.binarize spreads the widths that are left.
BACKBONES = {
    "dense": (0.0, "uniform"),
    "12-equal": (0.12, "uniform"),
    "12-different": (0.12, "global"),
    "25-equal": (0.25, "uniform"),
    "25-different": (0.25, "global"),
}
# RMS of what one layer's roundings put a result off by, over RMS of the result: of outputs and of
# gradients, as in bench.micro.
ROUNDING = {torch.bfloat16: (0.01, 0.02), torch.float16: (0.01, 0.02), torch.float32: (1e-5, 1e-5)}


class Case(NamedTuple):
    """What is timed.

    Args:
        phase: "prefill", "decode", or "train": forward, backward and AdamW.
        rows: of the batch.
        way: "transformers"; "compiled": its generate with a static cache, which compiles; "peft";
            "koff": on a GPU with a static cache, which replays a CUDA graph; "koff-pdl": with
            programmatic dependent launch; "koff-dynamic": with the dynamic cache there too.
        backbone: one of ``BACKBONES``, or "gated" for a dense one whose gates learn too.
        memories: 0, 1 for all rows, or 8 that the rows use in turn.
        keys: each memory has learned keys too.
    """

    phase: str
    rows: int
    way: str
    backbone: str = "dense"
    memories: int = 0
    keys: bool = False

    @property
    def name(self) -> str:
        """ "decode-64-koff-25-equal-8-keys"."""
        parts = (self.phase, self.rows, self.way, self.backbone, self.memories)
        return "-".join(map(str, parts)) + "-keys" * self.keys


class Sizes(NamedTuple):
    """Batches and lengths.

    Args:
        prefill, train: (rows, tokens).
        prompt, new: tokens of a prompt, and generated tokens.
        keys: learned keys of a memory.
    """

    prefill: tuple[int, int] = (8, 1024)
    train: tuple[int, int] = (8, 256)
    prompt: int = 128
    new: int = 16
    keys: int = 128


SMALL = Sizes((8, 64), (8, 32), 8, 6, 32)  # for a processor
DRY = Sizes((2, 16), (2, 16), 12, 4, 8)
BATCHES = (1, 8, 64)


class Wrong(ValueError):
    """A result is not what it should be, so it gets no time."""


class _Clock:
    """What ``generate`` calls a streamer: notes when each token is there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        tokens.cpu()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def shared_copy(model: nn.Module, *, copied: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of the modules over the same weights, but for those of ``copied``. The parameters are
    new ones: what one tree freezes is not frozen in another."""
    own = {id(tensor) for tensor in copied}
    memo = {
        id(p): nn.Parameter(p.data, requires_grad=p.requires_grad)
        for p in model.parameters()
        if id(p) not in own
    }
    return copy.deepcopy(model, memo)


def _adapted(model: PeftModel) -> dict[Site, nn.Module]:
    """PEFT's LoRA layers, by the linear layer they lie around."""
    return {
        Site(index, name.rpartition(".")[2]): module
        for index, layer in enumerate(arch.layers(model.get_base_model()))
        for name, module in layer.named_modules()
        if hasattr(module, "lora_A")
    }


def _distance(a: Tensor, b: Tensor) -> float:
    """How far a is from b, as a share of b's length."""
    return float((a.double() - b.double()).norm() / b.double().norm())


class Models:
    """All trees of modules over one dense model, made when a case first needs them.

    Args:
        base: a dense causal LM of transformers; it stays as it is.
        sizes: of the batches.
    """

    def __init__(self, base: PreTrainedModel, sizes: Sizes):
        self.base, self.sizes = base.eval(), sizes
        self.device, self.dtype = base.device, base.dtype
        config = base.config
        self.shape = Shape(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.vocab_size,
        )
        weights = count_weights(base)
        self.mlp_share = weights["mlp"] / weights["total"]

    @functools.cache  # noqa: B019 - lives as long as the run
    def gated(self, keys: bool) -> PreTrainedModel:
        """The dense model with gates, as it is trained, and with the memories."""
        config = koff.KoffConfig(
            memories=NAMES,
            target_sparsity=0.25,
            lora=koff.LoRAConfig(r=RANK, alpha=2 * RANK, target_modules="all-linear"),
            kv=koff.KVConfig(num_tokens=self.sizes.keys, init="normal") if keys else None,
        )
        model = koff.attach(shared_copy(self.base), config).eval()
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for memory in model.koff.memories:
                for _, lora in memory.sites():  # with and without keys the same
                    lora.a.normal_(std=lora.a.shape[1] ** -0.5, generator=generator)
                    lora.b.normal_(std=0.02, generator=generator)  # it starts at zero
        return model

    @functools.cache  # noqa: B019
    def koff(self, backbone: str, keys: bool) -> PreTrainedModel:
        """A backbone with its memories, pruned as users prune."""
        if backbone == "gated":
            return self.gated(keys)
        removed, per_layer = BACKBONES[backbone]
        dense = self.gated(keys)
        # The neurons that are kept move to the front, in place.
        moved = [
            linear.weight for mlp in arch.mlps(dense) for linear in arch.mlp_linears(mlp).values()
        ]
        moved += [p for n, p in dense.koff.named_parameters() if "log_alpha" in n]
        model = shared_copy(dense, copied=moved)
        vary(model, seed=0)
        multiple = min(64, max(1, self.shape.intermediate // 24))
        target = removed / self.mlp_share
        koff.binarize(model, target=target, per_layer=per_layer, multiple_of=multiple)
        return koff.compact(model, inplace=True).eval()

    @functools.cache  # noqa: B019
    def overlapped(self, backbone: str, keys: bool) -> PreTrainedModel:
        """The same again: it captures graphs of its own."""
        return shared_copy(self.koff(backbone, keys))

    @functools.cache  # noqa: B019
    def transformers(self, backbone: str) -> PreTrainedModel:
        """The same backbone as a plain model of transformers, over the same weights."""
        if backbone in ("dense", "gated"):
            return self.base
        model = shared_copy(self.base)
        for narrow, mlp in zip(
            arch.mlps(self.koff(backbone, False)), arch.mlps(model), strict=True
        ):
            linears = arch.mlp_linears(mlp)
            for name, linear in arch.mlp_linears(narrow).items():
                linears[name].weight = nn.Parameter(linear.weight.data)
            arch.set_width(mlp, arch.width(narrow))
        return model

    @functools.cache  # noqa: B019
    def compiled(self, backbone: str) -> PreTrainedModel:
        """The same again, for ``generate`` to compile."""
        return shared_copy(self.transformers(backbone))

    @functools.cache  # noqa: B019
    def peft(self, backbone: str, memories: int) -> PeftModel:
        """The same backbone with the LoRA of its memories as PEFT has it.

        Two things are in PEFT's favour. The adapters are in the base's dtype: with fp32 adapters,
        its default, it computes their products in fp32. And the head takes the last tokens of
        several prompts as one product, as koff's does: PEFT freezes its table, too.
        """
        ours = self.koff("dense" if backbone == "gated" else backbone, False)
        targets = sorted({site.linear for site, _ in ours.koff.memories[NAMES[0]].sites()})
        lora = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            lora_dropout=0.0,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        fast = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
        model = get_peft_model(shared_copy(self.transformers(backbone)), lora, NAMES[0], **fast)
        model.get_output_embeddings().register_forward_pre_hook(contiguous)
        for name in NAMES[1:memories]:
            model.add_adapter(name, lora, **fast)
        places = _adapted(model)
        for name in NAMES[:memories]:
            for site, weights in ours.koff.memories[name].sites():
                place = places[site]
                trained = name == NAMES[0]
                for part, value in ((place.lora_A, weights.a), (place.lora_B, weights.b)):
                    value = value.detach().to(self.dtype, copy=True)
                    part[name].weight = nn.Parameter(value, requires_grad=trained)
        return model.eval()

    def tokens(self, rows: int, length: int) -> Tensor:
        """Random ids [rows, length], the same every time."""
        generator = torch.Generator().manual_seed(rows * length)
        ids = torch.randint(3, self.shape.vocab, (rows, length), generator=generator)
        return ids.to(self.device)

    def choice(self, case: Case, rows: int) -> dict[str, object]:
        """The argument that chooses memories, in the words of the way."""
        names = [NAMES[row % 8] for row in range(rows)]
        if case.way.startswith("koff"):
            return {"memory": (None, NAMES[0], names)[(0, 1, 8).index(case.memories)]}
        return {"adapter_names": names} if case.memories == 8 else {}

    def model(self, case: Case) -> nn.Module:
        """What runs a case."""
        if case.way == "koff-pdl":
            return self.overlapped(case.backbone, case.keys)
        if case.way.startswith("koff"):
            return self.koff(case.backbone, case.keys)
        if case.memories:
            return self.peft(case.backbone, case.memories)
        if case.way == "compiled":
            return self.compiled(case.backbone)
        return self.transformers(case.backbone)

    @torch.no_grad()
    def reference(self, case: Case, ids: Tensor, last: int, dtype: torch.dtype) -> Tensor:
        """The last logits [rows, last, V] of a case by transformers or PEFT, where the keys of each
        row's memory stand in the cache; in any dtype, of the same weights."""
        plain = case._replace(way="peft" if case.memories else "transformers", keys=False)
        extra = self.choice(plain, len(ids))
        if case.keys:
            extra |= self._keys_in_cache(case, len(ids), dtype)
        model = self.model(plain)
        model = model if dtype == self.dtype else copy.deepcopy(model).to(dtype)
        return model(input_ids=ids, logits_to_keep=last, **extra).logits

    def _keys_in_cache(self, case: Case, rows: int, dtype: torch.dtype) -> dict[str, object]:
        """The keys and values of each row's memory, repeated into a cache of transformers'."""
        memories = self.koff(case.backbone, True).koff.memories
        cache = DynamicCache()
        for layer in range(self.shape.layers):
            full = [memories[NAMES[row % case.memories]].kv[layer].full() for row in range(rows)]
            keys, values = (torch.stack(part).to(dtype) for part in zip(*full, strict=True))
            cache.update(keys, values, layer)
        return {"past_key_values": cache}

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prepare(self, case: Case, check: bool = True) -> Callable[[], float]:
        """Run a case once, compare its result, and return what takes one reading: seconds of a
        call, or of one step of decoding.

        Raises:
            Wrong: the result is not that of transformers or PEFT.
        """
        return getattr(self, f"_{case.phase}")(case, check)

    def _timed(self, call: Callable[[], object]) -> Callable[[], float]:
        def reading() -> float:
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            return time.perf_counter() - start

        return reading

    def _prefill(self, case: Case, check: bool) -> Callable[[], float]:
        """One forward, and the last token's logits."""
        model, ids = self.model(case), self.tokens(case.rows, self.sizes.prefill[1])
        extra = self.choice(case, case.rows)

        @torch.no_grad()
        def call() -> Tensor:
            return model(input_ids=ids, use_cache=False, logits_to_keep=1, **extra).logits

        got = call()
        if check:
            self._compare_logits(case, got, ids)
        return self._timed(call)

    def _decode(self, case: Case, check: bool) -> Callable[[], float]:
        """Greedy ``generate`` with a batch of equal prompts' lengths."""
        model, new = self.model(case), self.sizes.new
        ids = self.tokens(case.rows, self.sizes.prompt)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options |= {"max_new_tokens": new, "min_new_tokens": new}
        options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options |= self.choice(case, case.rows)
        graph = case.way in ("koff", "koff-pdl") and self.device.type == "cuda"
        generate = model.generate
        if case.way == "koff-pdl":
            generate = timing.overlapped(generate)
        if graph or case.way == "compiled":
            options["cache_implementation"] = "static"

        @torch.no_grad()
        def reading() -> float:
            clock = _Clock()
            generate(streamer=clock, **options)
            # The first is the prompt's, the next the first token's.
            return statistics.median(b - a for a, b in itertools.pairwise(clock.times[1:]))

        with torch.no_grad():
            out = generate(return_dict_in_generate=True, output_logits=True, **options)
        if out.sequences.shape != (case.rows, self.sizes.prompt + new):
            got = tuple(out.sequences.shape)
            raise Wrong(f"{case.name}: generate must give {new} tokens, got {got}; no time")
        if check:
            self._compare_logits(case, torch.stack(out.logits, 1), out.sequences[:, :-1])
        return reading

    def _train(self, case: Case, check: bool) -> Callable[[], float]:
        """Forward, backward and AdamW of the LoRA; its rate is 0, so that all cases have the same
        weights."""
        model, ids = self.model(case), self.tokens(case.rows, self.sizes.train[1])
        extra = self.choice(case, case.rows)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

        def backward() -> None:
            model(input_ids=ids, labels=ids, use_cache=False, **extra).loss.backward()

        def step() -> None:
            backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        timed = self._timed(step)

        def reading() -> float:
            model.train()  # walks through all modules, which is no part of a step
            try:
                return timed()
            finally:
                model.eval()  # other cases have the same model

        if check and case.way == "koff":
            backward()  # in eval mode, where gates are not drawn
            self._compare_gradients(case, ids)
            optimizer.zero_grad(set_to_none=True)
        for _ in range(3):  # calls of koffkernels are replayed from the third on
            reading()
        return reading

    def _bound(self, gradients: bool = False) -> float:
        # The layers' roundings add up like a random walk; both results that are compared have them.
        return ROUNDING[self.dtype][gradients] * (2 * self.shape.layers) ** 0.5

    def _compare(
        self, case: Case, what: str, got: Tensor | None, want: Tensor, *, gradients: bool = False
    ) -> None:
        error = float("nan") if got is None else _distance(got, want)
        bound = self._bound(gradients)
        if not error <= bound:
            raise Wrong(f"{case.name}: {what} must be within {bound:.2g}, got {error:.2g}; no time")

    def _compare_logits(self, case: Case, got: Tensor, ids: Tensor) -> None:
        last = got.shape[1]
        want = self.reference(case, ids, last, self.dtype)
        try:
            self._compare(case, "the logits", got, want)
        except Wrong:
            # A trained model can amplify roundings far beyond a random walk. Then fp64 is the judge
            # of both. It has fp32 angles as transformers rounds them, at the positions that the
            # plain way gives its tokens, so it is nearer to that: ours may be three times as far.
            exact = self.reference(case, ids, last, torch.float64)
            if not _distance(got, exact) <= 3 * _distance(want, exact):
                raise

    def _compare_gradients(self, case: Case, ids: Tensor) -> None:
        """The gradient of the first memory's LoRA, against PEFT's on the rows that use it."""
        mine = [row for row in range(len(ids)) if case.memories == 1 or row % 8 == 0]
        ours = self.koff(case.backbone, case.keys).koff.memories[NAMES[0]]
        theirs = self.peft(case.backbone, 1)
        extra = {}
        if case.keys:
            extra = self._keys_in_cache(case._replace(memories=1), len(mine), self.dtype)
        theirs(input_ids=ids[mine], labels=ids[mine], use_cache=case.keys, **extra).loss.backward()
        places = _adapted(theirs)
        for site, weights in ours.sites():
            place = places[site]
            for got, part in ((weights.a, place.lora_A), (weights.b, place.lora_B)):
                want = part[NAMES[0]].weight.grad * (len(mine) / len(ids))
                what = f"the gradient of LoRA on {site.linear} of layer {site.layer}"
                self._compare(case, what, got.grad, want, gradients=True)
        theirs.zero_grad(set_to_none=True)

    def widths(self, backbone: str) -> list[int]:
        """MLP neurons of each layer."""
        return arch.widths(self.transformers(backbone))

    def facts(self, case: Case, limits: dict[str, float]) -> dict[str, object]:
        """Bytes and operations of a case, and the least time that this run's limits allow.

        Everything is counted once, in the base's dtype; of a step of decoding the weights, LoRA and
        learned keys of the memories that are used, and the keys and values of every row at half of
        what is generated.
        """
        item, config = self.dtype.itemsize, self.base.config
        model = self.transformers(case.backbone)
        weights = sum({id(p): p.numel() for p in model.parameters()}.values())
        one = sum(p.numel() for n, p in self._lora_of(case.backbone))
        used = min(case.memories, case.rows)
        token = 2 * self.shape.layers * self.shape.kv_heads * config.head_dim
        tokens = {
            "prefill": self.sizes.prefill[1],
            "train": self.sizes.train[1],
            "decode": 1,
        }[case.phase]
        context = self.sizes.prompt + self.sizes.new // 2 if case.phase == "decode" else tokens
        learned = self.sizes.keys * case.keys
        size = {
            "weight_bytes": weights * item,
            "memory_bytes": used * (one + learned * token) * item,
            "kv_bytes": case.rows * context * token * item,
        }
        shape = self.shape.__class__(**self.shape.record() | {"rows": case.rows, "tokens": context})
        widths = self.widths(case.backbone)
        flops = forward_flops(shape, widths) + 2 * case.rows * context * one * (used > 0)
        if case.phase == "decode":
            flops = flops / context  # of one token; its attention is the small part
        if case.phase == "prefill":  # the head sees one token of each row
            flops -= 2 * case.rows * (context - 1) * shape.hidden * shape.vocab
        if case.phase == "train":
            flops = 2 * flops + 2 * case.rows * context * one  # frozen weights have no gradient
        moved = sum(size.values()) if case.phase == "decode" else size["weight_bytes"]
        if not config.tie_word_embeddings:  # a table of which a few rows are read
            moved -= self.shape.vocab * self.shape.hidden * item
        least = max(
            moved / limits["copy_bytes_per_second"], flops / limits["gemm_operations_per_second"]
        )
        return {
            "removed": BACKBONES.get(case.backbone, (0.0,))[0],
            "widths": [min(widths), max(widths)],
            "tokens": case.rows * tokens,
            "least_seconds": least,
            "operations": flops,
            **size,
        }

    def _lora_of(self, backbone: str) -> list[tuple[str, nn.Parameter]]:
        memory = self.koff("dense" if backbone == "gated" else backbone, False)
        return list(memory.koff.memories[NAMES[0]].lora.named_parameters())

    def row(self, case: Case, readings: list[float], limits: dict[str, float]) -> dict[str, object]:
        """What a result file says of a case."""
        facts = self.facts(case, limits)
        took = statistics.median(readings)
        rate, share = facts["tokens"] / took, facts["least_seconds"] / took
        unit = "ms a token" if case.phase == "decode" else "ms"
        return {
            "name": case.name,
            **case._asdict(),
            "us": took * 1e6,
            "tokens_per_second": rate,
            "share_of_ideal": share,
            "readings": readings,
            **facts,
            "text": f"{rate:.0f} tok/s, {took * 1e3:.2f} {unit}, {share:.2f} of the ideal",
        }


def cases(sizes: Sizes, cuda: bool) -> list[Case]:
    """All cases, most telling first.

    ``peft`` without a memory is transformers, and on a processor there is no graph and no compiled
    ``generate`` to compare.
    """
    prefill, train, pruned = sizes.prefill[0], sizes.train[0], list(BACKBONES)[1:]
    found = [
        # Training, and decode launched one by one, which take the host longest.
        *(Case("train", train, way, "dense", 1) for way in ("koff", "peft")),
        *(Case("train", train, "koff", backbone, 8) for backbone in ("dense", "gated")),
        *(Case("decode", 8, "koff-dynamic", "dense", 8) for _ in range(cuda)),
        # Memories in a graph, against no memory and against PEFT.
        *(Case("decode", rows, "koff", "dense", 8) for rows in (8, 64)),
        *(Case("decode", 1, way, "dense", 1) for way in ("koff", "peft")),
        Case("decode", 1, "transformers"),
        *(Case("decode", n, "koff-pdl", "dense", n) for n in (1, 8) if cuda),  # n rows, n memories
        *(Case("prefill", prefill, way, "dense", m) for m in (1, 8) for way in ("koff", "peft")),
        Case("train", train, "koff", "25-equal", 1),
        *(Case("decode", rows, "koff", "25-equal", 8) for rows in (8, 64)),
        Case("decode", 64, "koff", "dense", 8, keys=True),
        # What pruning gains without memories.
        *(Case("decode", rows, "transformers") for rows in BATCHES),
        *(Case("decode", rows, "koff", backbone) for backbone in BACKBONES for rows in BATCHES),
        Case("prefill", prefill, "transformers"),
        *(Case("prefill", prefill, "koff", backbone) for backbone in BACKBONES),
        *(Case("decode", rows, "peft", "dense", 8) for rows in (8, 64)),  # ten seconds on a GPU
        *(Case("train", train, "koff", backbone, 1) for backbone in pruned),
        *(Case("train", train, "peft", backbone, 1) for backbone in pruned[2:]),
        *(Case("prefill", prefill, "koff", backbone, 8) for backbone in pruned[2:]),
        *(Case("prefill", prefill, "transformers", backbone) for backbone in pruned),
        *(Case("decode", rows, "koff", "25-different", 8) for rows in (8, 64)),
        *(Case("decode", 1, "koff", backbone, 1) for backbone in pruned),
        Case("decode", 8, "koff", "25-equal", 8, keys=True),
        *(Case("decode", rows, "transformers", b) for b in pruned for rows in BATCHES[::-1]),
        Case("decode", 8, "peft", "25-equal", 8),
        # The fastest that transformers has; on a GPU it compiles for half a minute.
        *(Case("decode", 1, "compiled") for _ in range(cuda)),
        *(Case("decode", 8, "compiled", backbone) for backbone in ("dense", "25-equal") if cuda),
    ]
    return list(dict.fromkeys(found))


def run(
    models: Models, chosen: list[Case], limits: dict[str, float], rounds: int
) -> Iterable[dict[str, object]]:
    """Yield a row per case; those of one phase and batch take their readings in turns, so that a
    slow minute of the machine hits them all, and the i-th readings of two belong together."""
    # What computes the same stands side by side.
    by = sorted(chosen, key=lambda c: (c.phase, c.rows, c.memories, c.keys, c.backbone))
    for _, group in itertools.groupby(by, key=lambda case: (case.phase, case.rows)):
        ready: dict[Case, Callable[[], float]] = {}
        for case in group:
            try:
                ready[case] = models.prepare(case)
            except Exception as error:  # of one way: the others are timed
                yield {"name": case.name, **case._asdict(), "error": str(error)}
        readings: dict[Case, list[float]] = {case: [] for case in ready}
        for turn in range(rounds):
            for case in list(ready)[:: 1 if turn % 2 == 0 else -1]:
                readings[case].append(ready[case]())
        for case, taken in readings.items():
            yield models.row(case, taken, limits)


def random_llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama with random weights, tied tables and sdpa attention, made where it will run."""
    from transformers import LlamaForCausalLM

    config = llama_config(
        shape, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=True
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device.type != "cpu" else nullcontext():
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
