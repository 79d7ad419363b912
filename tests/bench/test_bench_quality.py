"""bench.quality end to end on a tiny recipe: the runs, what is skipped, and what the files hold."""

import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from support.command_line import invoke
from transformers import AutoModelForCausalLM

import koff
from bench.quality import __main__ as command
from bench.quality import plan as planning
from bench.quality.collect import budget
from bench.quality.plan import Plan, Run
from bench.quality.runner import Runner
from bench.quality.text import _budget

pytestmark = pytest.mark.usefixtures("no_data_root")

OPTIONS = ("--sparsity", "0.25", "--seeds", "0", "1", "--set", "train.save_every=0")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Runs `koff` in this process instead of a child: the same commands, no time to import."""
    calls = []

    def run(self, arguments, log):
        calls.append(arguments)
        result = invoke(*arguments)
        with log.open("a") as file:
            file.write(result.output)
        return result.exit_code

    monkeypatch.setattr(Runner, "_run", run)
    return calls


def bench(root: Path, output: Path, *options: str) -> int:
    folders = ("--output", output, "--results", output / "results")
    parts = ("--recipe", root / "recipe.yaml", *folders, "--device", "cpu", *OPTIONS, *options)
    return command.main([str(part) for part in parts])


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The output of a whole plan, and what was printed."""
    output = tmp_path_factory.mktemp("quality") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KOFF_DATA", raising=False)
        in_this_process.__wrapped__(patch)
        assert bench(root, output) == 0
    return output


def record_of(output: Path) -> dict:
    return json.loads((output / "results" / "quality-recipe-test.json").read_text("utf-8"))


NAMES = [f"{kind}-seed{seed}" for seed in (0, 1) for kind in ("dense", "koff-0.25", "gates-0.25")]


def test_bench_quality_makes_every_run_by_the_users_commands(finished):
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


def test_bench_quality_counts_what_is_in_the_models(finished, root):
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


def test_bench_quality_table_by_hand(finished, root, tmp_path, capsys):
    output = Path(shutil.copytree(finished, tmp_path / "runs"))
    rewrite(output, PERPLEXITIES)
    assert bench(root, output) == 0
    part = record_of(output)["sparsities"][0]
    text = (output / "results" / "quality-recipe-test.md").read_text("utf-8")
    assert text in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
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
    assert (
        budget["exceeded"] and f"- budget: **EXCEEDED**, {100 * budget['ratio']:.1f} % of" in text
    )
    assert "    OMP_NUM_THREADS=" in text and str(finished.parent) not in text


def test_bench_quality_says_what_has_no_value(finished, root, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "runs"))
    gained_nothing = [(20.0, 10.0, 24.0, 21.0, 26.0), (20.0, 10.0, 19.0, 18.0, 27.0)]
    rewrite(output, PERPLEXITIES | {"en": gained_nothing})
    assert bench(root, output) == 0
    text = (output / "results" / "quality-recipe-test.md").read_text("utf-8")
    reason = "en, seed 1: share won back: gates only must be above the dense 20, got 19"
    assert f"on perplexity undefined ({reason}" in text
    assert "Not positive" in text and "so nothing was offloaded" in text


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (((39, 100), (40, 100)), "budget: 40.0 % of the 100 parameters removed: a memory has 40"),
        (((39, 100), (41, 100)), "budget: **EXCEEDED**, 41.0 % of the 100 parameters removed"),
        (((39, 100), (41, 0)), "budget: **EXCEEDED**, nothing was removed (at most 40 %)"),
    ],
)
def test_bench_quality_budget_is_that_of_the_worst_seed(sizes, text):
    names = ("memory_parameters", "removed_parameters", "ratio")
    runs = [
        dict(zip(names, (size, removed, size / removed if removed else None), strict=True))
        for size, removed in sizes
    ]
    assert _budget(budget(runs)).startswith(text)


def test_bench_quality_leaves_finished_runs_alone(finished, root, in_this_process, capsys):
    before = record_of(finished)
    assert bench(root, finished) == 0
    assert not in_this_process and "6 runs, 6 finished before" in capsys.readouterr().out
    assert record_of(finished)["sparsities"] == before["sparsities"]
    assert bench(root, finished, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(line.endswith("# done") for line in lines)
    file = finished / "koff-0.25-seed1" / "eval-test.json"
    rows = file.read_text("utf-8")
    file.write_text(rows[:100], "utf-8")  # as if cut off
    assert bench(root, finished) == 0
    assert [arguments[0] for arguments in in_this_process] == ["eval"]
    assert file.read_text("utf-8") == rows
    (finished / "dense-seed0" / "eval-test.json").write_text(rows, "utf-8")  # without the base's
    assert bench(root, finished) == 0
    assert [(a[0], "--base" in a) for a in in_this_process] == [("eval", False), ("eval", True)]


def test_bench_quality_refuses_holes_and_says_where(finished, root, capsys):
    file = finished / "koff-0.25-seed1" / "eval-test.json"
    text = file.read_text("utf-8")
    rows = json.loads(text)
    try:
        rows[1]["perplexity"] = None
        file.write_text(json.dumps(rows), "utf-8")
        (finished / "results" / "quality-recipe-test.md").unlink()
        assert bench(root, finished) == 1
        named = "koff-0.25-seed1: the perplexity of en with memory fr must be a finite number"
        assert named in capsys.readouterr().err
        del rows[1]
        file.write_text(json.dumps(rows), "utf-8")
        assert bench(root, finished) == 1
        assert "of en with memory fr must have been measured" in capsys.readouterr().err
        rows = json.loads(text)
        for row in rows:
            row["tokens"] += 1  # as if the split had changed since
        file.write_text(json.dumps(rows), "utf-8")
        assert bench(root, finished) == 1
        error = capsys.readouterr().err
        assert "koff-0.25-seed1: the en text must have" in error and "as for dense-seed0" in error
        assert not (finished / "results" / "quality-recipe-test.md").exists()
    finally:
        file.write_text(text, "utf-8")
    assert bench(root, finished) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "train.steps=5"), "must hold a run of the same recipe (dense-seed0), got one "
         "with another train.steps"),
        (("--set", "seed=5"), "--set must not set seed"),
        (("--set", "koff.target_sparsity=0.5"), "use --seeds and --sparsity"),
        (("--sparsity", "0"), "--sparsity must be above 0, got 0.0"),
        (("--sparsity", "0.99"), "target_sparsity must lie in 0..0.953"),
        (("--set", "train.stpes=5"), "did you mean 'steps'?"),
        (("--set", "koff.lora=null", "--set", "koff.kv=null"), "must learn something"),
        (("--split", "validation"), "must name a validation split for some domain"),
        (("--set", "data.en.test=null"), "every domain must have a test split, got none for en"),
        (("--set", "data.en.train=none.jsonl"), "none.jsonl must be an existing file"),
        (("--name", "../x"), "--name must be letters, digits, '.', '-' and '_', got '../x'"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--recipe", "no.yaml"), "no.yaml must be an existing file"),
    ],
)  # fmt: skip
def test_bench_quality_refuses_a_plan_before_it_starts(
    finished, root, in_this_process, options, message, capsys
):  # fmt: skip
    folder = finished if "train.steps=5" in options else finished / "new"
    assert bench(root, folder, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not in_this_process and not (finished / "new").exists()


def test_bench_quality_tables_of_one_recipe_may_have_names(finished, root):
    before = record_of(finished)
    assert bench(root, finished, "--name", "other-0.25") == 0
    files = finished / "results"
    text = (files / "quality-other-0.25-test.md").read_text("utf-8")
    assert text.startswith("# Quality of other-0.25, test split\n")
    named = json.loads((files / "quality-other-0.25-test.json").read_text("utf-8"))
    assert named["sparsities"] == before["sparsities"] and record_of(finished) == before


def test_bench_quality_refuses_a_foreign_model(root, tmp_path, finished, capsys):
    (tmp_path / "koff-0.25-seed0").mkdir()
    (tmp_path / "koff-0.25-seed0" / "koff.json").write_text("{}", "utf-8")
    assert bench(root, tmp_path) == 2
    assert "be a folder of this table, got a model without a recipe" in capsys.readouterr().err


def test_bench_quality_failed_runs_cost_no_others(root, tmp_path, monkeypatch, capsys):
    run = Runner._run

    def some_fail(self, arguments, log):
        if arguments[0] == "eval" and "gates-0.25-seed1" in arguments[1]:
            log.write_text("".join(f"line {n}\n" for n in range(40)) + "1 %\r2 %\rOut of memory\n")
            return 1
        return run(self, arguments, log)

    monkeypatch.setattr(Runner, "_run", some_fail)
    assert bench(root, tmp_path) == 1
    error = capsys.readouterr().err
    assert "gates-0.25-seed1 FAILED, the end of gates-0.25-seed1.log:\nline 28\n" in error
    assert "1 %\n2 %\nOut of memory" in error and "no table: 1 of 6 runs failed" in error
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(Runner, "_run", run)
    assert bench(root, tmp_path) == 0  # the next call makes what is missing
    assert (tmp_path / "results" / "quality-recipe-test.md").is_file()


def test_bench_quality_a_child_is_the_users_command():
    result = subprocess.run(planning.child(["--help"]), capture_output=True, text=True)
    assert result.returncode == 0 and "analyse" in result.stdout


def test_bench_quality_names_and_order():
    plan = Plan(Path("r.yaml"), Path("/out"), (0.2, 0.4), (3, 1), split="validation")
    assert [run.name for run in plan.runs[:5]] == [
        "dense-seed3", "koff-0.2-seed3", "gates-0.2-seed3", "koff-0.4-seed3", "gates-0.4-seed3"
    ]  # fmt: skip
    assert [run.base for run in plan.runs] == [True] + [False] * 9
    assert plan.of("koff", 0.4) == [Run("koff", 0.4, 3), Run("koff", 0.4, 1)]
    assert plan.scores(plan.runs[0]) == Path("/out/dense-seed3/eval-validation.json")
    assert torch.get_num_threads() == 1  # planning runs nothing


def test_bench_quality_variants_and_memories_that_come_later(root, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copy(root / f"math.{split}.jsonl", tmp_path / f"sums.{split}.jsonl")
    runs = tmp_path / "runs"
    extras = ("--variant", "small", "koff.lora.r=1", "koff.kv.num_tokens=2")
    extras += ("--later", f"sums={tmp_path}")
    assert bench(root, runs, *extras) == 0
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
    for part in ("--name sums", "train.steps=4", "train.block_size=16", "seed=1",
                 "train.distillation_weight=0"):  # fmt: skip
        assert part in command
    assert str(runs) not in json.dumps(record)
    memories = ("en", "fr", "sums", None)
    for name in ("dense-seed1+sums", "koff-0.25-seed0+sums"):
        rows = {(r["domain"], r["memory"]) for r in found[name]["rows"] if r["variant"] == "koff"}
        assert {("sums", memory) for memory in memories} <= rows
    based = [
        name for name, run in found.items() if any(r["variant"] == "base" for r in run["rows"])
    ]
    assert based == ["dense-seed0", "dense-seed0+sums"]
    text = (runs / "results" / "quality-recipe-test.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith(("| small |", "| sums |"))]
    assert len(lines) == 2 and "nan" not in text
    base = next(
        r
        for r in found["dense-seed0+sums"]["rows"]
        if (r["variant"], r["domain"]) == ("base", "sums")
    )
    assert lines[1].startswith(f"| sums | {base['perplexity']:.2f} | ")
    capsys.readouterr()
    assert bench(root, runs, *extras) == 0
    assert "12 runs, 12 finished before" in capsys.readouterr().out


def test_bench_quality_when_the_time_is_up_shows_the_seeds_that_are_whole(
    root, tmp_path, monkeypatch, capsys
):
    run = Runner._run

    def until(self, arguments, log):
        if "gates-0.25-seed1" in str(log):
            self._stop()
            return -15
        return run(self, arguments, log)

    monkeypatch.setattr(Runner, "_run", until)
    extras = ("--minutes", "60", "--variant", "small", "koff.lora.r=1")
    assert bench(root, tmp_path, *extras) == 1
    assert "gates-0.25-seed1: train ended" in capsys.readouterr().out
    record = record_of(tmp_path)
    assert record["seeds"] == [0] and record["sparsities"][0]["variants"] == {}
    assert [run["name"] for run in record["runs"]] == NAMES[:3]
    monkeypatch.setattr(Runner, "_run", run)
    assert bench(root, tmp_path, *extras) == 0
    record = record_of(tmp_path)
    assert record["seeds"] == [0, 1] and set(record["sparsities"][0]["variants"]) == {"small"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variant", "gates", "koff.lora.r=1"), "other than dense, koff and gates, got 'gates'"),
        (("--variant", "a/b", "koff.lora.r=1"), "--variant must begin with a name"),
        (("--variant", "small", "seed=1"), "--set must not set seed"),
        (("--variant", "small", "koff.lora.rank=1"), "rank"),
        (("--later", "en=."), "--later must name no domain of the recipe, got 'en'"),
        (("--later", "sums=none"), "sums.train.jsonl must be an existing file"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--minutes", "0"), "--minutes must be above 0, got 0.0"),
    ],
)
def test_bench_quality_refuses_wrong_extras(
    root, tmp_path, in_this_process, options, message, capsys
):
    assert bench(root, tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert not in_this_process and not (tmp_path / "new").exists()
