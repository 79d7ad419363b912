"""Task files made from documents."""

import json
import random

import yaml

from bench.tasks import CHOICES, CONTEXT, CONTINUATION, goes_on, math_questions, write_task


def test_the_right_continuation_is_the_one_of_the_document():
    words = [f"w{i}" for i in range(400)]
    found = goes_on([" ".join(words), "too short"], 50, random.Random(0))
    assert len(found) == 50 and {doc["gold"] for doc in found} == set(range(CHOICES))
    for doc in found:
        context = doc["question"].split()
        at = words.index(context[0])
        assert context == words[at : at + CONTEXT]
        right = words[at + CONTEXT : at + CONTEXT + CONTINUATION]
        assert doc["choices"][doc["gold"]].split() == right and len(set(doc["choices"])) == CHOICES
        for i, choice in enumerate(doc["choices"]):
            assert i == doc["gold"] or not set(choice.split()) & {*context, *right}


def test_math_questions_end_before_their_number():
    texts = ["Question: a\nAnswer: 2*9=18\n#### 18\n", "no number", "b\n#### 1,200"]
    first, second = math_questions(texts, 10)
    assert first["question"] == "Question: a\nAnswer:" and first["choices"][first["gold"]] == "18"
    assert first["reasoning"].endswith("2*9=18\n####")
    assert second["choices"][second["gold"]] == "1200" and second["gold"] == 1
    assert len(set(first["choices"])) == CHOICES and len(math_questions(texts, 1)) == 1


def test_a_task_file_is_plain_data(tmp_path):
    write_task(tmp_path, "a", [{"question": "é", "choices": ["1", "2"], "gold": 1}], generate=True)
    task = yaml.safe_load((tmp_path / "a.yaml").read_text("utf-8"))
    assert task["task"] == "a" and task["output_type"] == "generate_until"
    (line,) = (tmp_path / "a.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["question"] == "é"
    from koff.commands.tasks import check_task_folder

    check_task_folder(tmp_path)
