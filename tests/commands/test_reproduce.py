"""koff reproduce on a tiny recipe, end to end: runs, what is skipped, and what the files hold."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from support.command_line import fail, invoke, succeed
from transformers import AutoModelForCausalLM

import koff
from koff.commands.reproduce import plan as planning
from koff.commands.reproduce.claims import Claim
from koff.commands.reproduce.collect import budget
from koff.commands.reproduce.page import _budget
from koff.commands.reproduce.plan import Plan, Run
from koff.commands.reproduce.runner import Runner
from koff.evaluation.measures import BETTER_THAN_DENSE

pytestmark = pytest.mark.usefixtures("no_data_root")

OPTIONS = ("--sparsity", "0.25", "--seeds", "0,1", "--set", "train.save_every=0", "--only", "main")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Runs `koff` in this process instead of a child: the same commands, no time to import."""
    calls = []

    def run(self, arguments, log):
        calls.append(arguments)
        result = invoke(*arguments)
        with log.open("a") as file:
            file.write(f"$ {planning.shown(arguments, self.threads)}\n{result.output}")
        return result.exit_code

    monkeypatch.setattr(Runner, "_run", run)
    return calls


def asked(root: Path, output: Path, *options: object) -> list[object]:
    """The arguments of a small grid."""
    parts = ["reproduce", root / "recipe.yaml", "--output", output, "--device", "cpu"]
    return [*parts, *OPTIONS, *options]


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The output of a whole plan."""
    output = tmp_path_factory.mktemp("reproduce") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KOFF_DATA", raising=False)
        in_this_process.__wrapped__(patch)
        succeed(*asked(root, output))
    return output


def record_of(output: Path) -> dict:
    return json.loads((output / "reproduction.json").read_text("utf-8"))


def text_of(output: Path) -> str:
    return (output / "reproduction.md").read_text("utf-8")


NAMES = [f"{kind}-seed{seed}" for seed in (0, 1) for kind in ("dense", "koff-0.25", "gates-0.25")]


def test_reproduce_makes_every_run_by_the_users_commands(finished):
    record = record_of(finished)
    assert [run["name"] for run in record["runs"]] == NAMES
    base = [run["name"] for run in record["runs"] if "--base" in run["commands"][1]]
    assert base == ["dense-seed0"]  # measured once
    for run in record["runs"]:
        train, measure = run["commands"]
        assert train.startswith("OMP_NUM_THREADS=") and f"koff eval runs/{run['name']} " in measure
        assert f"koff train recipe.yaml --output runs/{run['name']} --set" in train
        assert ("--without lora --without kv" in train) == (run["kind"] == "gates")
        assert str(finished) not in train + measure
        assert run["training_seconds"] > 0 and not run["resumed"] and run["versions"]["torch"]
        memories = {None} if run["kind"] == "gates" else {None, "en", "fr"}
        rows = [row for row in run["rows"] if row["variant"] == "koff"]
        assert {(r["domain"], r["memory"]) for r in rows} == {
            (domain, memory) for domain in ("en", "fr", "math") for memory in memories
        }
        assert all(row["tokens"] > 0 and row["split"] == "test" for row in rows)
    assert record["recipe"]["train"]["steps"] == 4 and record["seeds"] == [0, 1]
    assert record["environment"]["torch"] and record["environment"]["device"] == "cpu"
    assert str(finished.parent) not in json.dumps(record)


def test_reproduce_counts_what_is_in_the_models(finished, root):
    dense = AutoModelForCausalLM.from_pretrained(root / "model").num_parameters()
    for run in record_of(finished)["runs"]:
        model = koff.load(finished / run["name"])
        own = sum(p.numel() for p in model.koff.parameters())
        assert run["removed_parameters"] == dense - (model.num_parameters() - own)
        sizes = [
            sum(t.numel() for t in [*memory.parameters(), *memory.buffers()])
            for memory in model.koff.memories
        ]
        assert run["memory_parameters"] == max(sizes, default=0)
        assert (run["removed_parameters"] > 0) == (run["kind"] != "dense")
        if run["kind"] == "koff":
            assert run["ratio"] == run["memory_parameters"] / run["removed_parameters"]


# (dense, dense with its own memory, gates only, own memory, wrong memory or none) of seeds 0 and 1.
PERPLEXITIES = {
    "en": [(20.0, 18.0, 24.0, 21.0, 26.0), (20.0, 18.0, 25.0, 22.0, 27.0)],
    "fr": [(10.0, 9.5, 12.0, 11.0, 13.0), (10.0, 9.0, 11.0, 10.1, 14.0)],
    "math": [(5.0, 5.0, 6.0, 6.0, 7.0), (5.0, 5.0, 6.5, 6.0, 8.0)],
}


def rewrite(output: Path, perplexities: dict) -> None:
    """Puts given perplexities into the files of finished runs."""
    for file in output.glob("*/eval-test.json"):
        kind, seed = file.parent.name.split("-")[0], int(file.parent.name[-1])
        rows = json.loads(file.read_text("utf-8"))
        for row in rows:
            dense, dense_own, gates, own, other = perplexities[row["domain"]][seed]
            mine = row["memory"] == row["domain"]
            of = {"dense": dense_own, "gates": gates, "koff": own if mine else other}
            row["perplexity"] = dense if row["variant"] == "base" else of[kind]
        file.write_text(json.dumps(rows), "utf-8")


def test_reproduce_table_by_hand(finished, root, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "runs"))
    rewrite(output, PERPLEXITIES)
    succeed(*asked(root, output))
    record, text = record_of(output), text_of(output)
    part = record["sparsities"][0]
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|  | dense"))
    assert lines[first : first + 5] == [
        "|  | dense | dense, own memory | gates only | koff, own memory | koff, memory en "
        "| koff, memory fr | koff, no memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| en | 20.00 | 18.00 ± 0.00 | 24.50 ± 0.71 | 21.50 ± 0.71 | · | 26.50 ± 0.71 "
        "| 26.50 ± 0.71 |",
        "| fr | 10.00 | 9.25 ± 0.35 | 11.50 ± 0.71 | 10.55 ± 0.64 | 13.50 ± 0.71 | · "
        "| 13.50 ± 0.71 |",
        "| math | 5.00 | – | 6.25 ± 0.35 | – | 7.50 ± 0.71 | 7.50 ± 0.71 | 7.50 ± 0.71 |",
    ]
    share = part["share_won_back"]["perplexity"]  # en 3/4, 3/5; fr 1/2, 0.9/1; means 0.625, 0.75
    assert share["mean"]["mean"] == pytest.approx(0.6875)
    assert share["mean"]["sd"] == pytest.approx(0.125 / math.sqrt(2))
    assert share["languages"]["en"]["mean"] == pytest.approx(0.675)
    logs = [math.log(24 / 21) / math.log(24 / 20), math.log(25 / 22) / math.log(25 / 20)]
    found = part["share_won_back"]["log_perplexity"]["languages"]["en"]["mean"]
    assert found == pytest.approx(statistics.fmean(logs))
    assert "on perplexity 68.8 ± 8.8 % (en 67.5 ± 10.6 %, fr 70.0 ± 28.3 %)" in text
    gain = part["offloading_gain_nats"]
    values = [math.log(24 / 21) - math.log(20 / 18), math.log(25 / 22) - math.log(20 / 18)]
    assert gain["languages"]["en"]["mean"] == pytest.approx(statistics.fmean(values))
    assert gain["languages"]["en"]["sd"] == pytest.approx(statistics.stdev(values))
    assert "nothing was offloaded" not in text
    budget = part["budget"]  # two learned matrices and a cache are large beside so few neurons
    assert budget["exceeded"] and f"budget: EXCEEDED, {100 * budget['ratio']:.1f} % of" in text
    found = {claim["sentence"]: claim for claim in record["claims"]}
    claim = found["memories win back what pruning loses"]
    assert claim["mean"] == pytest.approx(0.6875) and claim["verdict"] == "undecided"
    # Student's t of one degree of freedom: 12.706 standard errors, 0.125 / 2 each.
    assert claim["interval_95"] == pytest.approx([0.6875 - 12.706 / 16, 0.6875 + 12.706 / 16])
    claim = found["pruning without memories costs perplexity"]
    costs = [math.log(24 / 20 * 12 / 10) / 2, math.log(25 / 20 * 11 / 10) / 2]
    assert claim["values"] == pytest.approx(costs) and claim["note"].startswith("18.")
    claim = found["a memory serves its own domain"]
    costs = [math.log(26 / 21 * 13 / 11) / 2, math.log(27 / 22 * 14 / 10.1) / 2]
    assert claim["values"] == pytest.approx(costs) and "worse in 4 of 4 swaps" in claim["note"]
    assert "koff train recipe.yaml" in text and str(finished.parent) not in text
    pictures = re.findall(r"\((reproduction-figures/.*\.png)\)", text)
    assert len(pictures) == 2 and all((output / name).is_file() for name in pictures)
    page = (output / "reproduction.html").read_text("utf-8")
    assert "memories win back what pruning loses" in page and "<svg" in page


def test_reproduce_says_what_has_no_value(finished, root, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "runs"))
    gained_nothing = [(20.0, 10.0, 24.0, 21.0, 26.0), (20.0, 10.0, 19.0, 18.0, 27.0)]
    rewrite(output, PERPLEXITIES | {"en": gained_nothing})
    succeed(*asked(root, output))
    text = text_of(output)
    reason = "en, seed 1: share won back: gates only must be above the dense 20, got 19"
    assert f"on perplexity undefined ({reason}" in text
    assert "Not positive" in text and "so nothing was offloaded" in text


def test_reproduce_says_what_a_share_above_one_is(finished, root, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "runs"))
    assert BETTER_THAN_DENSE not in text_of(finished)
    better = [(20.0, 18.0, 24.0, 17.0, 26.0), (20.0, 18.0, 25.0, 16.0, 27.0)]
    rewrite(output, PERPLEXITIES | {"en": better})
    succeed(*asked(root, output))
    record = record_of(output)
    notes = {claim["sentence"]: claim["note"] for claim in record["claims"]}
    assert notes["memories win back what pruning loses"] == BETTER_THAN_DENSE
    assert BETTER_THAN_DENSE.capitalize() in text_of(output)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (((39, 100), (40, 100)), "budget: 40.0 % of the 100 parameters removed: a memory has 40"),
        (((39, 100), (41, 100)), "budget: EXCEEDED, 41.0 % of the 100 parameters removed"),
        (((39, 100), (41, 0)), "budget: EXCEEDED, nothing was removed (at most 40 %)"),
    ],
)
def test_reproduce_budget_is_that_of_the_worst_seed(sizes, text):
    names = ("memory_parameters", "removed_parameters", "ratio")
    runs = [
        dict(zip(names, (size, removed, size / removed if removed else None), strict=True))
        for size, removed in sizes
    ]
    assert _budget(budget(runs)).startswith(text)


def test_reproduce_leaves_finished_runs_alone(finished, root, in_this_process):
    before = record_of(finished)
    shown = succeed(*asked(root, finished))
    assert not in_this_process and "6 runs, 6 finished before" in shown
    assert record_of(finished)["sparsities"] == before["sparsities"]
    lines = succeed(*asked(root, finished, "--dry-run")).splitlines()
    assert len(lines) == 12 and all(line.endswith("# done") for line in lines)
    file = finished / "koff-0.25-seed1" / "eval-test.json"
    rows = file.read_text("utf-8")
    file.write_text(rows[:100], "utf-8")  # as if cut off
    succeed(*asked(root, finished))
    assert [arguments[0] for arguments in in_this_process] == ["eval"]
    assert file.read_text("utf-8") == rows
    (finished / "dense-seed0" / "eval-test.json").write_text(rows, "utf-8")  # without the base's
    succeed(*asked(root, finished))
    assert [(a[0], "--base" in a) for a in in_this_process] == [("eval", False), ("eval", True)]


def test_reproduce_takes_runs_of_a_koff_that_knew_fewer_settings(finished, root, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "runs"))
    for file in output.glob("*/recipe.json"):
        stored = json.loads(file.read_text("utf-8"))
        del stored["recipe"]["train"]["mask"], stored["recipe"]["train"]["no_memory_rows"]
        file.write_text(json.dumps(stored), "utf-8")
    assert "6 runs, 6 finished before" in succeed(*asked(root, output))


def test_reproduce_refuses_holes_and_says_where(finished, root):
    file = finished / "koff-0.25-seed1" / "eval-test.json"
    text = file.read_text("utf-8")
    rows = json.loads(text)
    try:
        rows[1]["perplexity"] = None
        file.write_text(json.dumps(rows), "utf-8")
        (finished / "reproduction.md").unlink()
        named = "koff-0.25-seed1: the perplexity of en with memory fr must be a finite number"
        assert named in fail(*asked(root, finished))
        del rows[1]
        file.write_text(json.dumps(rows), "utf-8")
        assert "of en with memory fr must have been measured" in fail(*asked(root, finished))
        rows = json.loads(text)
        for row in rows:
            row["tokens"] += 1  # as if the split had changed since
        file.write_text(json.dumps(rows), "utf-8")
        error = fail(*asked(root, finished))
        assert "koff-0.25-seed1: the en text must have" in error and "as for dense-seed0" in error
        assert not (finished / "reproduction.md").exists()
    finally:
        file.write_text(text, "utf-8")
    succeed(*asked(root, finished))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "train.steps=5"), "must hold a run of the same recipe (dense-seed0), got one "
         "with another train.steps"),
        (("--set", "seed=5"), "--set must not set seed"),
        (("--set", "koff.target_sparsity=0.5"), "use --seeds and --sparsity"),
        (("--sparsity", "0"), "--sparsity must be above 0, got 0.0"),
        (("--sparsity", "0.99"), "target_sparsity must lie in 0..0.953"),
        (("--sparsity", "0.2 4"), "--sparsity must be numbers with commas between, got '0.2 4'"),
        (("--seeds", "1.5"), "--seeds must be numbers with commas between, got '1.5'"),
        (("--only", "main,part"), "--only must name main, parts, general, masks, languages, swaps"),
        (("--only", "general", "--set", "train.general_every=0"), "must have general steps for "
         "--only general"),
        (("--only", "swaps", "--set", "data.fr=null"), "have a second domain for --only swaps"),
        (("--only", "parts", "--set", "koff.kv=null"), "both a LoRA and a KV part of its memories"),
        (("--set", "train.stpes=5"), "did you mean 'steps'?"),
        (("--set", "koff.lora=null", "--set", "koff.kv=null"), "must learn something"),
        (("--split", "validation"), "must name a validation split for some domain"),
        (("--set", "data.en.test=null"), "every domain must have a test split, got none for en"),
        (("--set", "data.en.train=none.jsonl"), "none.jsonl must be an existing file"),
        (("--name", "../x"), "--name must be letters, digits, '.', '-' and '_', got '../x'"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--variant", "gates koff.lora.r=1"), "other than dense, koff, gates, lora, kv, no-gener"),
        (("--variant", "a/b"), "--variant must begin with a name"),
        (("--variant", "small seed=1"), "--set must not set seed"),
        (("--variant", "small koff.lora.rank=1"), "rank"),
        (("--later", "en=."), "--later must name no domain of the recipe, got 'en'"),
        (("--later", "sums=none"), "sums.train.jsonl must be an existing file"),
        (("--set", "train.width_multiple_of=60"), "must let 25 % of the MLP neurons go, got 60"),
        (("--variant", "wide train.width_multiple_of=99"), "got 99, by which a layer can only kee"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--max-tokens", "0"), "--max-tokens must be at least 1, got 0"),
        (("--minutes", "0"), "--minutes must be above 0, got 0.0"),
    ],
)  # fmt: skip
def test_reproduce_refuses_a_plan_before_it_starts(
    finished, root, in_this_process, options, message
):  # fmt: skip
    folder = finished if "train.steps=5" in options else finished / "new"
    assert message in fail(*asked(root, folder, *options))
    assert not in_this_process and not (finished / "new").exists()


def test_reproduce_refuses_a_recipe_that_is_not_there(tmp_path):
    assert "recipe.yaml must be an existing file" in fail(*asked(tmp_path, tmp_path / "out"))


def test_reproduce_answers_may_have_names_and_cost_no_run(finished, root, in_this_process):
    before = record_of(finished)
    succeed(*asked(root, finished, "--name", "other-0.25", "--collect"))
    text = (finished / "other-0.25.md").read_text("utf-8")
    assert text.startswith("# Knowledge offloading with recipe\n")
    named = json.loads((finished / "other-0.25.json").read_text("utf-8"))
    assert named["sparsities"] == before["sparsities"] and record_of(finished) == before
    assert not in_this_process


def test_reproduce_refuses_a_foreign_model(root, tmp_path, finished):
    (tmp_path / "koff-0.25-seed0").mkdir()
    (tmp_path / "koff-0.25-seed0" / "koff.json").write_text("{}", "utf-8")
    error = fail(*asked(root, tmp_path))
    assert "be a folder of this grid, got a model without a recipe" in error


@pytest.mark.slow
def test_reproduce_failed_runs_cost_no_others(root, tmp_path, monkeypatch):
    run = Runner._run

    def some_fail(self, arguments, log):
        if arguments[0] == "eval" and "gates-0.25-seed1" in arguments[1]:
            log.write_text("".join(f"line {n}\n" for n in range(40)) + "1 %\r2 %\rOut of memory\n")
            return 1
        return run(self, arguments, log)

    monkeypatch.setattr(Runner, "_run", some_fail)
    result = invoke(*asked(root, tmp_path))
    assert result.exit_code == 1
    shown = result.stdout
    assert "gates-0.25-seed1 FAILED, the end of gates-0.25-seed1.log:\nline 28\n" in shown
    assert "1 %\n2 %\nOut of memory" in shown and "no answers: 1 of 6 runs are not there" in shown
    assert not (tmp_path / "reproduction.json").exists()
    monkeypatch.setattr(Runner, "_run", run)
    succeed(*asked(root, tmp_path))  # the next call makes what is missing
    assert (tmp_path / "reproduction.md").is_file()


def test_reproduce_a_child_is_the_users_command():
    assert planning.child(["--help"]) == [sys.executable, "-m", "koff.cli", "--help"]


def small(root: Path, *sparsities: float, **changes) -> Plan:
    return Plan(root / "recipe.yaml", Path("/out"), sparsities, **changes)


def test_reproduce_names_and_order(root):
    plan = small(root, 0.2, 0.4, seeds=(3, 1), split="validation", questions=())
    assert [run.name for run in plan.runs[:5]] == [
        "dense-seed3", "koff-0.2-seed3", "gates-0.2-seed3", "koff-0.4-seed3", "gates-0.4-seed3"
    ]  # fmt: skip
    assert [run.base for run in plan.runs] == [True] + [False] * 9
    assert plan.of("koff", 0.4) == [Run("koff", 0.4, 3), Run("koff", 0.4, 1)]
    assert plan.scores(plan.runs[0]) == Path("/out/dense-seed3/eval-validation.json")
    assert torch.get_num_threads() == 1  # planning runs nothing


def test_reproduce_the_whole_grid_by_default(root):
    plan = small(root, 0.2, 0.4, seeds=(3, 1))
    once = ["no-general", "mask-random", "mask-magnitude", "mask-saliency", "koff-en", "gates-en"]
    every = [f"{kind}-{at}" for at in (0.2, 0.4) for kind in ("koff", "gates", "lora", "kv")]
    names = [f"{name}-seed{seed}" for seed in (3, 1) for name in ("dense", *every)]
    assert [run.name for run in plan.runs] == [*names, *(f"{kind}-0.2-seed3" for kind in once)]
    commands = {run.name: [" ".join(c) for c in plan.commands(run)] for run in plan.runs}
    assert " --without kv --sparsity 0.4" in commands["lora-0.4-seed1"][0]
    assert "--set train.general_every=0 " in commands["no-general-0.2-seed3"][0]
    assert "--set train.mask=saliency " in commands["mask-saliency-0.2-seed3"][0]
    assert "--set data.fr=null --without lora --without kv" in commands["gates-en-0.2-seed3"][0]
    several = {name: len(parts) for name, parts in commands.items() if len(parts) > 2}
    assert several == {
        f"{k}-0.2-seed{s}": n for k, n in (("koff", 4), ("gates", 3)) for s in (3, 1)
    }
    assert "--swaps" in commands["koff-0.2-seed1"][2]
    assert "--neurons" in commands["koff-0.2-seed1"][3]
    assert plan.load(plan.of("koff-en", 0.2)[0]).koff.memories == ("en",)
    # A recipe with less has fewer questions.
    plan = small(root, 0.2, seeds=(0,), overrides=("data.fr=null", "koff.kv=null", "general=null"))
    assert plan.asked == ("masks",)


def test_reproduce_verdicts():
    def verdict(*values):
        return Claim("", "", 0.2, "share", values).verdict

    assert verdict(1.0) == "one seed: for it" and verdict(-1.0) == "one seed: against it"
    # 4.303 standard errors of three values: 4.303 / sqrt 3 = 2.484 standard deviations.
    assert verdict(2.4, 3.4, 1.4) == "undecided" and verdict(2.5, 3.5, 1.5) == "holds"
    assert verdict(-2.5, -3.5, -1.5) == "does not hold" and verdict() == "undefined"


@pytest.mark.slow
def test_reproduce_variants_and_memories_that_come_later(root, tmp_path):
    for split in ("train", "test"):
        shutil.copy(root / f"math.{split}.jsonl", tmp_path / f"sums.{split}.jsonl")
    runs = tmp_path / "runs"
    extras = ("--variant", "small koff.lora.r=1 koff.kv.num_tokens=2")
    extras += ("--later", f"sums={tmp_path}")
    succeed(*asked(root, runs, *extras))
    record = record_of(runs)
    found = {run["name"]: run for run in record["runs"]}
    assert set(found) == {
        *NAMES, "small-0.25-seed0", "small-0.25-seed1",
        *(f"{kind}-seed{seed}+sums" for kind in ("dense", "koff-0.25") for seed in (0, 1)),
    }  # fmt: skip
    main, small = found["koff-0.25-seed1"], found["small-0.25-seed1"]
    assert 0 < small["memory_parameters"] < main["memory_parameters"]
    assert small["sparsity"] == main["sparsity"] and "--set koff.lora.r=1" in small["commands"][0]
    facts = record["sparsities"][0]["variants"]["small"]
    assert facts["budget"]["ratio"] < record["sparsities"][0]["budget"]["ratio"]
    assert facts["overrides"] == ["koff.lora.r=1", "koff.kv.num_tokens=2"]
    # The recipe's own settings of training, but for the teacher that is gone.
    command = found["koff-0.25-seed1+sums"]["commands"][0]
    assert "--name sums" in command and "train.distillation_weight=0" in command
    for kind in ("dense", "koff-0.25"):
        facts = json.loads((runs / f"{kind}-seed1" / "koff.json").read_text("utf-8"))
        added = facts["metadata"]["added"]["sums"]
        train = added["train"]
        assert (added["seed"], train["steps"], train["block_size"]) == (1, 4, 16)
        assert train["distillation_weight"] == 0
    assert str(runs) not in json.dumps(record)
    memories = ("en", "fr", "sums", None)
    for name in ("dense-seed1+sums", "koff-0.25-seed0+sums"):
        rows = {(r["domain"], r["memory"]) for r in found[name]["rows"] if r["variant"] == "koff"}
        assert {("sums", memory) for memory in memories} <= rows
    based = [
        name for name, run in found.items() if any(r["variant"] == "base" for r in run["rows"])
    ]
    assert based == ["dense-seed0", "dense-seed0+sums"]
    text = text_of(runs)
    lines = [line for line in text.splitlines() if line.startswith(("| small |", "| sums |"))]
    assert len(lines) == 2 and "nan" not in text
    base = next(
        r
        for r in found["dense-seed0+sums"]["rows"]
        if (r["variant"], r["domain"]) == ("base", "sums")
    )
    assert lines[1].startswith(f"| sums | {base['perplexity']:.2f} | ")
    assert "12 runs, 12 finished before" in succeed(*asked(root, runs, *extras))


@pytest.mark.slow
def test_reproduce_when_the_time_is_up_shows_the_seeds_that_are_whole(root, tmp_path, monkeypatch):
    run = Runner._run

    def until(self, arguments, log):
        if "gates-0.25-seed1" in str(log):
            self._stop("the time was up")
            return -15
        return run(self, arguments, log)

    monkeypatch.setattr(Runner, "_run", until)
    extras = ("--minutes", "60", "--variant", "small koff.lora.r=1")
    result = invoke(*asked(root, tmp_path, *extras))
    assert result.exit_code == 1 and "gates-0.25-seed1: train ended" in result.stdout
    record = record_of(tmp_path)
    assert record["seeds"] == [0] and record["sparsities"][0]["variants"] == {}
    assert [run["name"] for run in record["runs"]] == NAMES[:3]
    monkeypatch.setattr(Runner, "_run", run)
    succeed(*asked(root, tmp_path, *extras))
    record = record_of(tmp_path)
    assert record["seeds"] == [0, 1] and set(record["sparsities"][0]["variants"]) == {"small"}


@pytest.fixture
def in_children(monkeypatch, in_this_process):
    """Undo ``in_this_process``."""
    monkeypatch.undo()
    monkeypatch.delenv("KOFF_DATA", raising=False)


def trainings(runs: Path) -> list[str]:
    """The folders for which a training was started, by the logs."""
    return [
        line.split(" --output ")[1].split()[0]
        for log in runs.glob("*.log")
        for line in log.read_text("utf-8").splitlines()
        if line.startswith("$ ") and " koff train " in line
    ]


@pytest.mark.slow
def test_reproduce_a_grid_killed_in_the_middle_goes_on(root, tmp_path, in_children, monkeypatch):
    """Every question by one command, its process killed while a training runs: that training,
    which outlives it, is waited for, and nothing is made twice."""
    folder, runs = tmp_path / "here", tmp_path / "runs"
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("out"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    recipe["train"] |= {"save_every": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    options = ["--sparsity", "0.25", "--seeds", "0", "--device", "cpu"]
    command = ["reproduce", str(folder / "recipe.yaml"), "--output", str(runs), *options]
    killed = subprocess.Popen(planning.child([*command, "--jobs", "2"]), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while not (runs / "koff-0.25-seed0" / "recipe.json").exists():
            assert time.monotonic() < until and killed.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    # Whoever looks before a training has imported torch does not see that there is one.
    while not all((Path(folder) / "recipe.json").exists() for folder in trainings(runs)):
        assert time.monotonic() < until
        time.sleep(0.02)
    in_this_process.__wrapped__(monkeypatch)  # twenty children would import torch for minutes
    succeed(*command)
    started = trainings(runs)
    assert len(started) == len(set(started)) == 11
    record = json.loads((runs / "reproduction.json").read_text("utf-8"))
    sentences = [claim["sentence"] for claim in record["claims"]]
    assert len(sentences) == len(set(sentences)) == 16
    for start in ("LoRA and KV are", "the KV of a memory", "learning the mask with the memories is "
                  "better than pruning by random", "general steps keep", "memories win back what "
                  "pruning loses, with en alone", "general neurons stay (gates only)"):  # fmt: skip
        assert any(sentence.startswith(start) for sentence in sentences), start
    text = (runs / "reproduction.md").read_text("utf-8")
    assert "## Swaps" in text and "| mask-magnitude | " in text and "nan" not in text
