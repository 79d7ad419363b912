"""`koff eval --tasks`: lm-eval's tasks under a memory, against log-likelihoods by hand."""

import json
import random

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from support.command_line import fail, invoke, succeed

import koff
from koff.commands import tasks
from koff.commands.task_model import SavedKoffLM
from koff.evaluation.harness import KoffLM
from koff.storage.saved_folder import open_saved

LETTERS = "abcdefgh "


def texts(count, seed=0):
    """Random (context, continuation) pairs of many lengths."""
    rng = random.Random(seed)

    def text(low, high):
        return "".join(rng.choices(LETTERS, k=rng.randint(low, high))).strip() or "a"

    return [(text(3, 60), " " + text(1, 20)) for _ in range(count)]


@pytest.fixture(scope="module")
def model(trained):
    return koff.load(trained)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return open_saved(trained).load_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of one's own: a choice, an answer to be written, and a whole text."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(1)
    docs = []
    for context, right in texts(20, seed=1):
        choices = [right.strip(), *(choice.strip() for _, choice in texts(3, seed=len(docs) + 9))]
        gold = rng.randrange(4)
        choices[0], choices[gold] = choices[gold], choices[0]
        docs.append({"question": context, "choices": choices, "gold": gold, "text": context})
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs), "utf-8")
    write_task(folder, "choice", output_type="multiple_choice", doc_to_choice="choices",
               doc_to_text="{{question}}", doc_to_target="gold",
               metric_list=[{"metric": "acc"}])  # fmt: skip
    write_task(folder, "write", output_type="generate_until", doc_to_text="{{question}}",
               doc_to_target="{{choices[gold]}}", metric_list=[{"metric": "exact_match"}],
               generation_kwargs={"until": [" "], "max_gen_toks": 8})  # fmt: skip
    write_task(folder, "rolling", output_type="loglikelihood_rolling", doc_to_text="",
               doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}])  # fmt: skip
    return folder


def write_task(folder, name, **settings):
    """Write a task file over docs.jsonl."""
    task = {
        "task": name, "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")},
                           "cache_dir": str(folder / "cache")},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings), "utf-8")


def by_hand(model, tokenizer, context, continuation, memory):
    """log q(continuation | context) in nats and whether it is greedy, one row at a time."""
    before = [tokenizer.bos_token_id, *tokenizer(context, add_special_tokens=False)["input_ids"]]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([before + after]), memory=memory).logits[0].double()
    at = logits.log_softmax(-1)[len(before) - 1 : -1]
    found = at.gather(1, torch.tensor(after)[:, None])
    return found.sum().item(), at.argmax(-1).tolist() == after


def ask(kind, *arguments):
    """A request as lm-eval makes one."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("memory", ["fr", "en", None])
def test_loglikelihood_is_that_by_hand(memory, model, tokenizer):
    pairs = texts(100)
    lm = KoffLM(model, tokenizer, memory=memory, batch_size=7)
    found = lm.loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    differing = 0
    for pair, (nats, greedy) in zip(pairs, found, strict=True):
        wanted, is_greedy = by_hand(model, tokenizer, *pair, memory)
        assert nats == pytest.approx(wanted, abs=1e-4) and greedy == is_greedy
        other = by_hand(model, tokenizer, *pair, None if memory else "fr")[0]
        differing += abs(nats - other) > 1e-3
    assert differing > 90  # the memory does something


def test_loglikelihood_without_context_starts_from_bos(model, tokenizer):
    lm = KoffLM(model, tokenizer, memory="fr")
    ((nats, _),) = lm.loglikelihood([ask("loglikelihood", "", "abc")], disable_tqdm=True)
    assert nats == pytest.approx(by_hand(model, tokenizer, "", "abc", "fr")[0], abs=1e-4)


def test_rolling_loglikelihood_is_that_by_hand(model, tokenizer):
    lm = KoffLM(model, tokenizer, memory="fr")
    assert lm.max_length == 128 - 4  # beside four learned tokens
    short, long = "abcd efgh", "".join(random.Random(3).choices(LETTERS, k=300))
    found = lm.loglikelihood_rolling([ask("r", short), ask("r", long)])
    assert found[0] == pytest.approx(by_hand(model, tokenizer, "", short, "fr")[0], abs=1e-4)
    # Windows of 123 tokens: what stands before a window's first token is as much as there is room.
    nats, at = 0.0, 0
    while at < len(long):
        end = min(at + 123, len(long))
        start = max(0, end - 123 - 1)
        before = long[start:at] if at else ""
        ids = tokenizer(before, add_special_tokens=False)["input_ids"] if at else [1]
        ids = ids + tokenizer(long[at:end], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), memory="fr").logits[0].double().log_softmax(-1)
        count = end - at
        nats += logits[-count - 1 : -1].gather(1, torch.tensor(ids[-count:])[:, None]).sum().item()
        at = end
    assert found[1] == pytest.approx(nats, abs=1e-3)


def test_generation_is_koffs_own_row_by_row(model, tokenizer):
    lm = KoffLM(model, tokenizer, memory="fr", batch_size=3)
    contexts = [context for context, _ in texts(7, seed=5)]
    options = {"until": ["b"], "max_gen_toks": 12}
    found = lm.generate_until([ask("generate_until", c, options) for c in contexts])
    whole = lm.generate_until([ask("generate_until", c, {"max_gen_toks": 12}) for c in contexts])
    for context, text, all_of_it in zip(contexts, found, whole, strict=True):
        ids = torch.tensor([lm.tok_encode(context)])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), memory="fr", max_new_tokens=12,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        wanted = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert all_of_it == wanted and text == wanted.split("b")[0]
    assert found != whole
    assert options == {"until": ["b"], "max_gen_toks": 12}, "a task's settings are its own"


def test_generation_ends_at_a_stop_text(model, tokenizer, monkeypatch):
    steps = []
    forward = model.generate

    def watched(**kwargs):
        output = forward(**kwargs)
        steps.append(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(model, "generate", watched)
    lm = KoffLM(model, tokenizer, memory="fr", batch_size=1)
    requests = [ask("g", context, {"max_gen_toks": 40}) for context, _ in texts(20, seed=7)]
    found = lm.generate_until(requests)
    text, request = max(zip(found, requests, strict=True), key=lambda pair: len(pair[0]))
    assert len(text) > 6 and len(steps) == 20
    stop = text[2:4]
    (cut,) = lm.generate_until([ask("g", request.args[0], {"until": [stop], "max_gen_toks": 40})])
    assert cut == text.split(stop)[0] and steps[-1] <= 4


def test_long_contexts_are_cut_at_their_beginning_and_counted(model, tokenizer, caplog):
    lm = KoffLM(model, tokenizer, memory="fr")
    long = "".join(random.Random(4).choices(LETTERS, k=200)).strip()
    ((nats, _),) = lm.loglikelihood([ask("l", long, " ab")], disable_tqdm=True)
    assert "1 texts of a task have more than the 124 tokens" in caplog.text
    ids = tokenizer(long + " ab", add_special_tokens=False)["input_ids"][-124:]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), memory="fr").logits[0].double().log_softmax(-1)
    wanted = logits[-4:-1].gather(1, torch.tensor(ids[-3:])[:, None]).sum().item()
    assert nats == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ValueError, match="fit 124 positions with it, got 203 tokens after 1"):
        lm.loglikelihood([ask("l", "", long + "abc"[: 203 - len(long)])], disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks must be below the 124 positions"):
        lm.generate_until([ask("g", "a", {"max_gen_toks": 124})])


def test_one_memory_at_a_time(model, tokenizer):
    with pytest.raises(TypeError, match="memory must be one name or None, got .*one memory at a"):
        KoffLM(model, tokenizer, memory=["fr", "en"])
    with pytest.raises(KeyError, match="memory must be one of .*'en', 'fr'.* or None, got 'it'"):
        KoffLM(model, tokenizer, memory="it")
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        KoffLM(model, tokenizer, batch_size=0)


def test_koff_eval_tasks_gives_what_is_right_by_hand(trained, folder, model, tokenizer, tmp_path):
    rows_file = tmp_path / "rows.json"
    succeed("eval", trained, "--tasks", "choice,write,rolling", "--task-folder", folder, "--memory",
            "fr", "--json", rows_file)  # fmt: skip
    rows = {row["task"]: row for row in json.loads(rows_file.read_text("utf-8"))}
    assert set(rows) == {"choice", "write", "rolling"}
    docs = [json.loads(line) for line in (folder / "docs.jsonl").open(encoding="utf-8")]
    right = 0
    for doc in docs:
        nats = [
            by_hand(model, tokenizer, doc["question"], " " + c, "fr")[0] for c in doc["choices"]
        ]
        right += nats.index(max(nats)) == doc["gold"]
    row = rows["choice"]
    assert row["value"] == pytest.approx(right / 20) and row["samples"] == 20
    assert (row["metric"], row["memory"], row["variant"]) == ("acc", "fr", "koff")
    assert row["harness"].startswith("lm-eval 0.") and row["fewshot"] == 0
    bits = sum(by_hand(model, tokenizer, "", d["text"], "fr")[0] for d in docs)
    size = sum(len(d["text"].encode()) for d in docs)
    assert rows["rolling"]["value"] == pytest.approx(-bits / size / 0.6931471805599453, rel=1e-5)
    assert 0 <= rows["write"]["value"] <= 1


def test_koff_eval_tasks_into_the_card_and_the_page(trained, folder):
    output = succeed("eval", trained, "--tasks", "choice", "--task-folder", folder, "--base",
                     "--limit", 5, "--fewshot", 2, "--card")  # fmt: skip
    assert "dense" in output and "no memory" in output
    metadata = open_saved(trained).manifest.metadata
    kinds = [(row["variant"], row["memory"]) for row in metadata["tasks"]]
    assert kinds == [("base", None), ("koff", "en"), ("koff", "fr"), ("koff", None)]
    assert {(row["samples"], row["fewshot"]) for row in metadata["tasks"]} == {(5, 2)}
    card = (trained / "README.md").read_text("utf-8")
    assert "## Tasks" in card and "| koff | fr | choice | acc |" in card
    koff.load(trained)
    succeed("report", trained)
    page = (trained / "report.html").read_text("utf-8")
    assert "choice: acc" in page and "Tasks" in page


def test_the_registered_model_loads_a_folder(trained, folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.evaluator.evaluate(
        lm=SavedKoffLM.create_from_arg_string(
            f"directory={trained},memory=fr", {"batch_size": 4, "device": "cpu"}
        ),
        task_dict=TaskManager(include_path=folder, include_defaults=False).load(["choice"]),
        log_samples=False,
        limit=5,
    )
    assert lm_eval.api.registry.get_model("koff") is SavedKoffLM
    (row,) = tasks.run_tasks(trained, ["choice"], memories=["fr"], folder=folder, limit=5)
    assert found["results"]["choice"]["acc,none"] == row.value


EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\ndef f(*a, **k):\n    return 'a'\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("task: t\ndoc_to_text: !function evil.f\n", "the tag !function"),
        ("task: t\nclass: !function evil.f\n", "the tag !function"),
        ("task: t\ndoc_to_text: !!python/name:os.system\n", "the tag tag:yaml.org,2002:python"),
        ("task: t\nclass: evil\n", "the key 'class'"),
        ("task: t\ncustom_dataset: evil.f\n", "the key 'custom_dataset'"),
        ("task: t\ntask_list:\n- task: u\n", "the key 'task_list'"),
        ("task: t\ninclude: ../evil.yaml\n", "include: '../evil.yaml'"),
        ("task: t\ninclude: _template\n", "include: '_template'"),
        ("task: t\ndataset_path: pandas\n", "dataset_path: 'pandas'"),
        ("task: t\ndataset_path: someone/data\n", "dataset_path: 'someone/data'"),
        ("task: t\ndataset_kwargs: {trust_remote_code: true}\n", "trust_remote_code"),
        ("task: t\nmetric_list: [{metric: ./evil}]\n", "the metric './evil'"),
        ("task: t\nmetric_list: [{metric: acc, hf_evaluate: true}]\n", "the metric 'acc'"),
        ("group: g\ntask: [{task: t, class: evil}]\n", "tasks written inside"),
        ("- task: t\n", "list and no mapping"),
        ("task: [\n", "no plain YAML"),
    ],
)
def test_task_files_that_would_run_code_are_refused(text, fault, trained, tmp_path):
    folder, mark = tmp_path / "tasks", tmp_path / "mark"
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)), "utf-8")
    (folder / "t.yaml").write_text(text, "utf-8")
    message = fail("eval", trained, "--tasks", "t", "--task-folder", folder)
    assert fault in message and "t.yaml must be a task file that only describes" in message
    assert not mark.exists()


def test_templates_reach_nothing_of_python(trained, folder, tmp_path):
    mark = tmp_path / "mark"
    code = "''.__class__.__mro__[1].__subclasses__()"
    write_task(tmp_path, "t", output_type="generate_until", doc_to_target="a",
               doc_to_text="{{question}}{{ " + code + " }}")  # fmt: skip
    (tmp_path / "docs.jsonl").write_text('{"question": "a"}\n', "utf-8")
    result = invoke("eval", trained, "--tasks", "t", "--task-folder", tmp_path, "--memory", "fr")
    # After a progress bar of the library that reads the questions.
    assert result.exit_code == 2 and "of 'str' object is unsafe" in result.stderr
    assert "Traceback" not in result.output and not mark.exists()
    import lm_eval.utils

    assert "Sandboxed" not in type(lm_eval.utils.env).__name__, "left as it was"


def test_code_of_task_files_runs_where_it_is_asked_for(trained, folder, tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "mine.py").write_text(EVIL.format(mark=str(mark)), "utf-8")
    write_task(tmp_path, "t", output_type="generate_until", doc_to_target="a",
               generation_kwargs={"max_gen_toks": 2}, doc_to_text="X",
               metric_list=[{"metric": "exact_match"}])  # fmt: skip
    path = tmp_path / "t.yaml"
    path.write_text(
        path.read_text("utf-8").replace("doc_to_text: X", "doc_to_text: !function mine.f")
    )
    (tmp_path / "docs.jsonl").write_text('{"question": "a"}\n', "utf-8")
    succeed("eval", trained, "--tasks", "t", "--task-folder", tmp_path, "--run-task-code",
            "--memory", "fr")  # fmt: skip
    assert mark.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "fr"), "--memory must come with --tasks, got ['fr']"),
        (("--limit", "3"), "--limit must come with --tasks, got 3"),
        (("--run-task-code",), "--run-task-code must come with --tasks"),
        (("--tasks", "t", "--max-tokens", "3"), "--max-tokens must not come with --tasks, got 3"),
        (("--tasks", "t", "--split", "validation"), "--split must not come with --tasks"),
        (("--tasks", "t", "--memory", "it"), "--memory must be one of ['en', 'fr'], got 'it'"),
        (("--tasks", "t", "--task-folder", "none"), "must be a folder of task files, got none"),
    ],
)
def test_wrong_options_of_tasks_are_refused(options, message, trained):
    assert message in fail("eval", trained, *options)


def test_unknown_tasks_are_refused(trained, folder, monkeypatch):
    import lm_eval.tasks

    class Fewer(lm_eval.tasks.TaskManager):
        """Does not read lm-eval's own thousands of files."""

        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Fewer)
    for name in ("chioce", str(folder / "choice.yaml")):
        message = fail("eval", trained, "--tasks", name, "--task-folder", folder)
        assert "--tasks must be names of lm-eval's tasks or of" in message and name in message


def test_without_lm_eval_one_is_told_how_to_get_it(trained, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    assert "pip install 'koff[tasks]'" in fail("eval", trained, "--tasks", "arc_easy")
