"""vLLM computes what koff does: tokens and log-probabilities, memories mixed in one batch."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tolerance import CLOSE
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

import koff_vllm
from koff_vllm.connector import MemoryConnector

MATRIX = [*itertools.product(("llama", "qwen2", "qwen3"), ("uniform", "global"))]
MATRIX += [("mistral", "global"), ("granite", "global"), ("phi3", "global")]
MATRIX += itertools.product(("olmo2", "smollm3"), ("uniform", "global"))


def run(llm, folder, rows, **sampling):
    """Outputs for [(memory, expected row)], all in one call."""
    greedy = {"temperature": 0, "max_tokens": 20, "logprobs": 0} | sampling
    prompts = [{"prompt_token_ids": row["prompt"]} for _, row in rows]
    memories = [koff_vllm.memory(folder, memory or None) for memory, _ in rows]
    return llm.generate(prompts, SamplingParams(**greedy), lora_request=memories, use_tqdm=False)


def jobs(expected, names=None):
    """Every memory with every prompt, neighbours of different memories."""
    names = list(expected) if names is None else names
    rows = zip(*(expected[name] for name in names), strict=True)
    return [(name, row) for group in rows for name, row in zip(names, group, strict=True)]


def check(outputs, rows):
    """Compare tokens, log-probabilities, and what callers see of the prompt."""
    for output, (memory, row) in zip(outputs, rows, strict=True):
        got = output.outputs[0]
        assert list(got.token_ids) == row["ids"], memory
        chosen = [each[token].logprob for each, token in zip(got.logprobs, row["ids"], strict=True)]
        assert chosen == pytest.approx(row["logprobs"], abs=CLOSE)
        assert output.prompt_token_ids == row["prompt"]
        assert 0 <= output.num_cached_tokens < len(row["prompt"])


def check_prompt(outputs, rows):
    """Compare the log-probabilities of prompts."""
    for output, (memory, row) in zip(outputs, rows, strict=True):
        first, *others = output.prompt_logprobs
        got = [each[token].logprob for each, token in zip(others, row["prompt"][1:], strict=True)]
        assert first is None and got == pytest.approx(row["prompt_logprobs"], abs=CLOSE), memory


@pytest.mark.parametrize("case", MATRIX, ids="-".join)
def test_matrix(engine, root, expected, case):
    name = "-".join(case)
    llm, rows = engine(name), jobs(expected[name])
    assert len(rows) == 16
    check(run(llm, root / name, rows), rows)
    outputs = run(llm, root / name, rows, prompt_logprobs=0)
    check(outputs, rows)
    check_prompt(outputs, rows)


@pytest.mark.parametrize("kind", ["uniform", "global"])
def test_recurrent_layers(engine, root, expected, kind, monkeypatch):
    """Qwen3.5, in bf16, which is all that vLLM's operators for these layers take on the CPU. It
    rounds elsewhere than koff does, but not more: twice what koff's own bf16 is off by is allowed,
    and what another memory says is much further away."""
    pictures = str(Path(__file__).parent / "pictures")
    monkeypatch.syspath_prepend(pictures)
    monkeypatch.setenv("PYTHONPATH", pictures)  # of the process where vLLM looks at the model
    name = f"qwen3_5_text-{kind}"
    llm, own = engine(name, dtype="bfloat16"), expected[name]
    # Not the prompt of one token: vLLM's convolution takes it for one that is not transposed.
    rows = [(memory, row) for memory, row in jobs(own) if len(row["prompt"]) > 1]
    outputs = run(llm, root / name, rows, prompt_logprobs=0)
    got = {memory: [] for memory in own}
    for output, (memory, row) in zip(outputs, rows, strict=True):
        pairs = zip(output.prompt_logprobs[1:], row["prompt"][1:], strict=True)
        got[memory] += [each[token].logprob for each, token in pairs]
    for memory in own:
        exact, rounded = (
            [value for row in own[memory] for value in row[key]]
            for key in ("prompt_logprobs", "prompt_logprobs_bf16")
        )
        allowed = 2 * apart(rounded, exact)
        assert apart(got[memory], exact) < allowed
        assert all(apart(got[other], exact) > 3 * allowed for other in own if other != memory)


def apart(one, other):
    """The mean distance of two lists of log-probabilities."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


@pytest.mark.parametrize("name", ["llama-global", "qwen3-global"])
def test_transformers_backend(engine, root, expected, name):
    """vLLM's model of the code that lies beside a backbone, instead of its own."""
    llm, rows = (
        engine(name, model_impl="transformers", trust_remote_code=True),
        jobs(expected[name]),
    )
    ((outer, inner),) = llm.apply_model(lambda model: (type(model), type(model.model)))
    assert outer.__name__ == "TransformersForCausalLM"
    assert inner.__module__.split(".")[0] == "transformers_modules"
    check(run(llm, root / name, rows), rows)


def test_penalties_see_the_prompt_alone(engine, root, expected):
    llm, own = engine("llama-global"), expected["llama-global"]
    rows = [(memory, own[memory][1]) for memory in own]
    for output, (_, row) in zip(
        run(llm, root / "llama-global", rows, repetition_penalty=1.3), rows, strict=True
    ):
        assert list(output.outputs[0].token_ids) == row["penalised"]
    assert any(row["penalised"] != row["ids"] for _, row in rows)


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no_caching"])
def test_lengths_around_a_block(engine, root, expected, caching):
    llm = engine("lengths", block_size=32, enable_prefix_caching=caching)
    rows = jobs(expected["lengths"])
    for _ in range(2):  # the second time from the cache
        outputs = run(llm, root / "lengths", rows)
        check(outputs, rows)
    hits = [output.num_cached_tokens for output in outputs]
    # 40 tokens of text behind 16, 32 or 40 learned keys fill whole blocks, which are found again.
    assert any(hits) == caching
    check_prompt(run(llm, root / "lengths", rows, prompt_logprobs=0), rows)


def test_chunked_prefill(engine, root, expected):
    llm = engine("lengths", block_size=32, max_num_batched_tokens=16, max_num_seqs=4)
    rows = jobs(expected["lengths"])
    check(run(llm, root / "lengths", rows), rows)
    check_prompt(run(llm, root / "lengths", rows, prompt_logprobs=0), rows)


def test_preemption(engine, root, expected):
    llm = engine("lengths", block_size=32, num_gpu_blocks_override=12)
    rows = jobs(expected["lengths"])
    check(run(llm, root / "lengths", rows), rows)
    counts = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(counts) > 0


def test_more_memories_than_slots(engine, root, expected):
    llm, own = engine("many", max_loras=4, max_cpu_loras=8), expected["many"]
    assert len(own) == 41
    rows = jobs(own)
    backbone = ("", own[""][0])
    mixed = [job for pair in zip(rows, [backbone] * len(rows), strict=True) for job in pair]
    check(run(llm, root / "many", mixed), mixed)
    check(run(llm, root / "many", mixed[::-1]), mixed[::-1])


@pytest.mark.parametrize("name", ["llama-global", "qwen2-uniform", "olmo2-global"])
def test_tensor_parallel(engine, root, expected, name, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm, rows = engine(name, tensor_parallel_size=2), jobs(expected[name])
    check(run(llm, root / name, rows), rows)
    check_prompt(run(llm, root / name, rows, prompt_logprobs=0), rows)


def test_memories_of_two_versions(engine, root, expected):
    """One name, two contents: neither is served from the other's blocks, in one batch either."""
    llm = engine("before", max_loras=4)
    for _ in range(2):
        outputs, rows = [], []
        prompts, memories = [], []
        for version in ("before", "after"):
            for row in expected[version]["aa"]:
                rows.append(("aa", row))
                prompts.append({"prompt_token_ids": row["prompt"]})
                memories.append(koff_vllm.memory(root / version, "aa"))
        greedy = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
        outputs = llm.generate(prompts, greedy, lora_request=memories, use_tqdm=False)
        check(outputs, rows)


def test_what_cannot_be_served_whole_is_refused(engine, root, expected):
    llm, own = engine("before", kv_transfer_config=None), expected["before"]
    greedy = SamplingParams(temperature=0, max_tokens=20)
    prompt = {"prompt_token_ids": own[""][0]["prompt"]}
    path = str(root / "before/memories/aa/lora")
    cases = {
        "has learned keys, which need kv_transfer_config": koff_vllm.memory(root / "before", "aa"),
        "must be served on its backbone": koff_vllm.memory(root / "other", "aa"),
        "must be served with its learned keys": LoRARequest("aa", 1, path),
    }
    for message, memory in cases.items():
        with pytest.raises(VLLMValidationError, match=message):
            llm.generate(prompt, greedy, lora_request=memory, use_tqdm=False)
    rows = [("", row) for row in own[""]]
    check(run(llm, root / "before", rows), rows)  # the engine goes on


def test_a_lost_guard_is_found(engine, root, expected, monkeypatch):
    """As if vLLM left the learned keys out after all: it stops, and computes no placeholder."""
    llm, own = engine("before"), expected["before"]
    monkeypatch.setattr(MemoryConnector, "get_num_new_matched_tokens", lambda *_: (0, False))
    with pytest.raises(RuntimeError, match="must start behind its 7 learned keys, got token 0"):
        run(llm, root / "before", [("aa", own["aa"][0])])


def test_keys_that_do_not_load_fail_their_requests(engine, root, expected, monkeypatch):
    llm, own = engine("before", enable_prefix_caching=False), expected["before"]
    original = MemoryConnector._write

    def write(self, load):
        if "/bb@" in load.lora_path:
            raise OSError("gone")
        original(self, load)

    monkeypatch.setattr(MemoryConnector, "_write", write)
    rows = jobs(own)
    outputs = run(llm, root / "before", rows)
    reasons = {memory: set() for memory in own}
    for output, (memory, _) in zip(outputs, rows, strict=True):
        reasons[memory].add(output.outputs[0].finish_reason)
    assert reasons == {"": {"length"}, "aa": {"length"}, "bb": {"error"}}
    good = [(o, job) for o, job in zip(outputs, rows, strict=True) if job[0] != "bb"]
    check(*zip(*good, strict=True))


def test_a_model_of_others_is_left_alone(engine, root, expected, tmp_path):
    """No koff.json, and a LoRA that is nobody's half: what vLLM always did, without a connector."""
    own, plain = expected["llama-uniform"], tmp_path / "plain"
    weights = ("*.json", "*.safetensors")
    plain.mkdir()
    for path in (path for pattern in weights for path in (root / "llama-uniform").glob(pattern)):
        shutil.copy(path, plain)
    (plain / "koff.json").unlink()
    shutil.copytree(root / "llama-uniform/memories/lora/lora", tmp_path / "adapter")
    settings = {"kv_transfer_config": None, "model": str(plain)}
    llm = engine("llama-uniform", **settings)
    adapter = LoRARequest("mine", 1, str(tmp_path / "adapter"))
    for name, lora in (("", None), ("lora", adapter)):
        prompts = [{"prompt_token_ids": row["prompt"]} for row in own[name]]
        greedy = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
        outputs = llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)
        check(outputs, [(name, row) for row in own[name]])


def test_the_plugin_costs_a_process_nothing():
    """In a process of vLLM's that serves something else: a few hundredths of a second."""
    code = """
import sys, time
from vllm.engine.arg_utils import EngineArgs
before, start = set(sys.modules), time.perf_counter()
import koff_vllm
koff_vllm.register()
taken = time.perf_counter() - start
print(taken, *sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, *brought = done.stdout.split()[-3:]
    assert float(taken) < 0.2 and set(brought) <= {"koff_vllm", "transformers"}


# The last one: where it has imported numba, vLLM makes no other engine in this process.
def test_speculation(engine, root, expected):
    method = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    llm = engine("llama-global", speculative_config=method | {"prompt_lookup_min": 1})
    rows = jobs(expected["llama-global"])
    check(run(llm, root / "llama-global", rows), rows)
