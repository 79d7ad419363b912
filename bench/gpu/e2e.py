"""What a user sees: tokens per second of ``generate``, a prefill and a training step, of a model of
Llama-3.2-3B's shape with random weights, by koff and by plain transformers and PEFT.

The model is made on the GPU. In order: dense by transformers and PEFT; dense by koff; with gates,
as it is trained; pruned to equal widths, with no, one and eight memories.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..models import Shape
from .context import Bench
from .results import Case, Deadline, Results

LLAMA_3B = Shape(3072, 8192, 28, 24, 8, 128256, rows=8, tokens=1024)
REMOVED = 0.17
MEMORIES = 8
PROMPT, NEW = 128, 24  # tokens of a prompt; tokens that are generated
BATCHES = (1, 8, 64)
NAMES = tuple(f"m{index}" for index in range(MEMORIES))


def llama(bench: Bench, shape: Shape) -> nn.Module:
    """A Llama with random weights, made where it will run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


class EndToEnd:
    """The model in its present state; it only moves on.

    "stock": as transformers made it; "dense": with memories; "gated": with memories and gates, as
    it is trained; "pruned": narrow, with memories.
    """

    states = ("stock", "dense", "gated", "pruned")

    def __init__(self, bench: Bench):
        self.bench = bench
        self.shape = bench.shape if bench.dry else LLAMA_3B
        self.prompt, self.new = (PROMPT, NEW) if not bench.dry else (12, 4)
        self.model: nn.Module | None = None
        self.state = "stock"

    def at(self, state: str) -> nn.Module:
        """The model in a state that is the present one or a later one."""
        import koff

        if self.model is None:
            self.model = llama(self.bench, self.shape)
        if self.states.index(state) < self.states.index(self.state):
            raise ValueError(f"e2e: state must not go back, got {state} after {self.state}")
        while self.state != state:
            if self.state == "stock":
                self._attach(0.0)
            elif self.state == "dense":
                koff.detach(self.model)
                self._attach(REMOVED)
            else:
                koff.binarize(self.model, per_layer="uniform")
                self.model = koff.compact(self.model, inplace=True)
            self.state = self.states[self.states.index(self.state) + 1]
        return self.model

    def _attach(self, sparsity: float) -> None:
        import koff

        tokens = 8 if self.bench.dry else 128
        koff.attach(
            self.model,
            koff.KoffConfig(
                memories=NAMES,
                target_sparsity=sparsity,
                lora=koff.LoRAConfig(r=16, alpha=32, target_modules="all-linear"),
                kv=koff.KVConfig(num_tokens=tokens, init="normal"),
            ),
        )
        with torch.no_grad():
            for name, parameter in self.model.koff.memories.named_parameters():
                if name.endswith(".b"):  # zero at first
                    parameter.normal_(std=0.02)

    def tokens(self, rows: int, length: int) -> Tensor:
        """Random ids [rows, length]."""
        return torch.randint(3, self.shape.vocab, (rows, length), device=self.bench.device)

    def memory(self, memories: int, rows: int) -> dict[str, object]:
        """The ``memory`` argument: none, one for all rows, or all in turn."""
        if self.state == "stock":
            return {}
        if memories == 0:
            return {"memory": None}
        if memories == 1:
            return {"memory": NAMES[0]}
        return {"memory": [NAMES[row % memories] for row in range(rows)]}

    def seconds(self, call: Callable[[], object], repeats: int) -> list[float]:
        """Wall time of calls that end with the GPU idle, after one that does not count."""
        if self.bench.warm:
            call()
            return [1.0]
        times = []
        for turn in range(1 + repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            if turn:
                times.append(time.perf_counter() - start)
        return times

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> float:
        """GB that were allocated at most since ``reset``."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.bench.device.type == "cuda" else 0.0

    def reset(self) -> None:
        """Start counting memory."""
        if self.bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @torch.no_grad()
    def decode(self, state: str, memories: int, rows: int, cache: str) -> list[dict]:
        """Tokens per second of generate beyond the first token.

        ``cache``: "dynamic"; "static", launch by launch; "graph", a static cache as users ask for
        it: koff replays a CUDA graph, and plain transformers compiles.
        """
        model, ids = self.at(state), self.tokens(rows, self.prompt)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if cache != "dynamic":
            options |= {"cache_implementation": "static", "disable_compile": cache == "static"}

        def generate(new: int) -> Tensor:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                **options,
                **self.memory(memories, rows),
            )
            if out.shape[1] != self.prompt + new:
                raise ValueError(f"generate must give {new} tokens, got {out.shape[1]}")
            return out

        self.reset()
        if self.bench.warm:
            generate(3)
            return [{"name": name_of(state, memories, rows, cache), "text": "ran"}]
        one = statistics.median(self.seconds(lambda: generate(1), 2))
        all_ = statistics.median(self.seconds(lambda: generate(self.new), 2))
        step = max(all_ - one, 1e-9) / (self.new - 1)
        row = {
            "name": name_of(state, memories, rows, cache),
            "us": step * 1e6,
            "us_per_layer": step * 1e6 / self.shape.layers,
            "first_token_us": one * 1e6,
            "tokens_per_second": rows / step,
            "peak_gb": self.peak(),
            "prompt": self.prompt,
            "new": self.new,
        }
        text = f"{rows / step:.0f} tok/s, {step * 1e3:.2f} ms a token"
        return [row | {"text": f"{text}, first {one * 1e3:.1f} ms, {row['peak_gb']:.1f} GB"}]

    @torch.no_grad()
    def prefill(self, state: str, memories: int) -> list[dict]:
        """One forward of 8 x 1024 tokens, the last one's logits."""
        model, rows, length = self.at(state), self.shape.rows, self.shape.tokens
        ids, extra = self.tokens(rows, length), self.memory(memories, rows)

        def forward() -> object:
            return model(input_ids=ids, use_cache=False, logits_to_keep=1, **extra)

        self.reset()
        took = statistics.median(self.seconds(forward, 4))
        return [self._row(f"prefill-{state}-{memories}", took, rows * length)]

    def train(self, state: str, memories: int) -> list[dict]:
        """Forward and backward of 4 x 1024 tokens: LoRA and, by koff, learned keys and values."""
        rows, length = max(1, self.shape.rows // 2), self.shape.tokens
        rows = 1 if self.bench.warm else rows  # beside other processes memory is short
        model, ids = self.at(state), self.tokens(rows, length)
        peft, name = None, f"train-{state}-{memories}"
        if state == "stock":
            from peft import LoraConfig, get_peft_model

            from ..peers.peft_step import LINEARS

            config = LoraConfig(
                r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM", lora_dropout=0.0
            )
            peft = model = get_peft_model(model, config)
            name = "train-peft"
        extra = self.memory(memories, rows)
        trained = [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            loss = model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
            loss.backward()
            for parameter in trained:
                parameter.grad = None

        model.train()
        try:
            self.reset()
            took = statistics.median(self.seconds(step, 3))
            row = self._row(name, took, rows * length)
        finally:
            model.eval()
            if peft is not None:
                self.model = peft.unload()
        return [row]

    def _row(self, name: str, took: float, tokens: int) -> dict:
        row = {"name": name, "us": took * 1e6, "tokens_per_second": tokens / took}
        row["peak_gb"] = self.peak()
        text = f"{tokens / took:.0f} tok/s, {took * 1e3:.1f} ms, {row['peak_gb']:.1f} GB"
        return row | {"text": text}


def name_of(state: str, memories: int, rows: int, cache: str) -> str:
    """ "generate-pruned-8-memories-batch-64-static"."""
    text = f"generate-{state}-{memories}-memories-batch-{rows}"
    return text if cache == "dynamic" else f"{text}-{cache}"


def cases(bench: Bench) -> Iterator[Case]:
    """In the order of the model's states, which do not go back."""
    model = EndToEnd(bench)

    def generate(state: str, memories: int, rows: int, cache: str = "dynamic") -> Case:
        name = name_of(state, memories, rows, cache)
        return name, lambda: model.decode(state, memories, rows, cache)

    for rows in BATCHES:
        yield generate("stock", 0, rows)
    yield "prefill-stock-0", lambda: model.prefill("stock", 0)
    yield "train-peft", lambda: model.train("stock", 0)
    yield "prefill-dense-1", lambda: model.prefill("dense", 1)
    yield "train-gated-1", lambda: model.train("gated", 1)
    yield "train-gated-8", lambda: model.train("gated", 8)
    yield generate("pruned", 1, 1)
    yield generate("pruned", 1, 1, "graph")
    yield generate("pruned", 8, 8, "graph")
    yield generate("pruned", 8, 64, "graph")
    yield generate("pruned", 8, 64)
    yield "prefill-pruned-1", lambda: model.prefill("pruned", 1)
    yield "train-pruned-1", lambda: model.train("pruned", 1)
    yield generate("pruned", 0, 1, "graph")
    yield generate("pruned", 8, 8)
    yield generate("pruned", 1, 1, "static")
    yield "prefill-pruned-8", lambda: model.prefill("pruned", 8)
    # Compiling takes most of a minute, so this comes last, on a model of its own.
    plain = EndToEnd(bench)
    yield name_of("stock", 0, 1, "graph"), lambda: plain.decode("stock", 0, 1, "graph")
    yield generate("pruned", 0, 1)
    yield generate("pruned", 0, 8)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Run everything."""
    results.note(dtype=bench.dtype_name)
    results.run(cases(bench), deadline, only)
