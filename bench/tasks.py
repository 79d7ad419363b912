"""Writes task files for `koff eval --tasks` from documents: questions of GSM8K, and for each
language the choice of how a page goes on.

    python -m bench.tasks --data DATA --output DIR [--domains en fr es] [--questions 200]
    koff eval RUN --tasks goes_on_fr,math_choice,math_write --task-folder DIR

``DATA`` holds NAME.test.jsonl with a "text" per line, as the recipes read them. A text of math is a
question whose answer ends with "#### " and a number.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

CONTEXT, CONTINUATION, CHOICES = 60, 12, 4  # words


def goes_on(documents: list[str], questions: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return questions: words of a document, and which of four pieces follows them. The others come
    from other places of the same document where it is long enough: to know the topic is not enough.

    Args:
        documents: texts of one language.
        questions: at most so many.
        rng: of places and order.
    """
    need = CONTEXT + CHOICES * CONTINUATION
    long = [words for words in (text.split() for text in documents) if len(words) >= need]
    found = []
    for _ in range(questions):
        words = rng.choice(long)
        at = rng.randrange(len(words) - CONTEXT - CONTINUATION + 1)
        end = at + CONTEXT
        others = [
            start
            for start in range(0, len(words) - CONTINUATION + 1, CONTINUATION)
            if start + CONTINUATION <= at or start >= end + CONTINUATION
        ]
        if len(others) < CHOICES - 1:
            continue
        starts = [end, *rng.sample(others, CHOICES - 1)]
        order = rng.sample(range(CHOICES), CHOICES)
        choices = [" ".join(words[starts[i] : starts[i] + CONTINUATION]) for i in order]
        question = " ".join(words[at:end])
        found.append({"question": question, "choices": choices, "gold": order.index(0)})
    return found


def math_questions(documents: list[str], questions: int) -> list[dict[str, Any]]:
    """Return questions, their reasoning and, as choices, four numbers one of which is right."""
    found = []
    for text in documents:
        match = re.fullmatch(r"(.*)####\s*(-?[\d,]+)\s*", text, re.DOTALL)
        if not match or len(found) == questions:
            continue
        number = int(match[2].replace(",", ""))
        others = [number + 1, number * 2 + 1, abs(number - 3) + 7]
        choices = [str(value) for value in dict.fromkeys((number, *others))]
        if len(choices) == CHOICES:
            gold = len(found) % CHOICES
            choices[0], choices[gold] = choices[gold], choices[0]
            # Written with its reasoning, the number is there to be read off; without, it is to be
            # guessed.
            question = match[1].partition("Answer:")[0] + "Answer: "
            doc = {"question": question.rstrip(), "reasoning": f"{match[1]}####"}
            found.append(doc | {"choices": choices, "gold": gold})
    return found


def write_task(
    output: Path, name: str, docs: list[dict[str, Any]], *, generate: bool = False
) -> None:
    """Write questions and the file that makes a task of them.

    Args:
        output: folder.
        name: of the task.
        docs: questions with choices.
        generate: the model writes its answer instead of choosing one.
    """
    data = output / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs), "utf-8")
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    if generate:
        task |= {
            "output_type": "generate_until",
            "doc_to_text": "{{reasoning}}",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match", "ignore_punctuation": True}],
            "filter_list": [
                {
                    "name": "number",
                    "filter": [
                        {"function": "regex", "regex_pattern": "(-?[0-9]+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
        }
    else:
        task |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        }
    (output / f"{name}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), "utf-8")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m bench.tasks", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--domains", nargs="+", default=["en", "fr", "es"])
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    def read(name: str) -> list[str]:
        with (args.data / f"{name}.test.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]

    for name in args.domains:
        docs = goes_on(read(name), args.questions, random.Random(name))
        write_task(args.output, f"goes_on_{name}", docs)
    docs = math_questions(read("math"), args.questions)
    write_task(args.output, "math_choice", docs)
    write_task(args.output, "math_write", docs, generate=True)


if __name__ == "__main__":
    main()
