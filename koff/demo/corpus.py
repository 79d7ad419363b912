"""The demo's corpus: what every Python installation carries, and generated arithmetic.

``python -m koff.demo.corpus FOLDER`` writes it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from .cached import made_once

DOMAINS = ("code", "prose", "math")
# Bytes per split and domain: enough for one pass of the demo's pretraining, quick to evaluate.
SIZES = {"train": 1_000_000, "validation": 40_000, "test": 60_000}
# Installed packages differ from machine to machine, tests and tables of encodings are no code to
# learn from, and the topics of pydoc are read by _topics().
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data",
    "encodings", "__pycache__",
}  # fmt: skip
_DOCUMENT = 4000  # characters; longer modules and topics are cut at line ends
_NAMES = ("Ada", "Ben", "Chloe", "Diego", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jun")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "stamps", "tickets")

Corpus = dict[str, dict[str, list[str]]]


def build_corpus(seed: int = 0) -> Corpus:
    """Build the three domains, split by document so that no two splits share one.

    Args:
        seed: seed of the generated arithmetic.

    Returns:
        {domain: {split: documents}} for the domains "code" (library source without docstrings),
        "prose" (docstrings and the help topics of pydoc) and "math" (arithmetic with answers).

    Raises:
        FileNotFoundError: this Python has no library source to read.
    """
    code: dict[str, list[str]] = {split: [] for split in SIZES}
    prose: dict[str, list[str]] = {split: [] for split in SIZES}
    for name, text in _topics():
        prose[_split_of(name)] += _cut(text)
    for name, source in _modules():
        split = _split_of(name)  # code and docstrings of one module land in the same split
        if not (_is_full(code[split], split) and _is_full(prose[split], split)):
            body, docs = separate(source)
            code[split] += _cut(body)
            prose[split] += _cut(docs)
    corpus = {"code": code, "prose": prose, "math": _arithmetic(seed)}
    for domain, splits in corpus.items():
        for split, documents in splits.items():
            splits[split] = _limited(documents, SIZES[split])
            if not splits[split]:
                raise FileNotFoundError(
                    f"koff demo: the {split} split of {domain} must not be empty, got no source in "
                    f"{_library()}; use a Python that carries its library's source"
                )
    return corpus


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """Write a corpus to a new folder, as ``<domain>.<split>.jsonl``."""
    folder.mkdir()
    for domain, splits in corpus.items():
        for split, documents in splits.items():
            lines = (json.dumps({"text": document}) + "\n" for document in documents)
            (folder / f"{domain}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def prepare_corpus(cache: Path) -> Path:
    """Write the corpus into the cache, or find it there.

    Args:
        cache: folder of caches.

    Returns:
        A folder with ``<domain>.<split>.jsonl``.
    """
    corpus = build_corpus()
    # Named by what it holds: another Python carries other sources.
    name = hashlib.sha256(json.dumps(corpus, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"demo-corpus-{name}"
    return made_once(folder, f"{DOMAINS[0]}.train.jsonl", lambda place: write_corpus(corpus, place))


def separate(source: str) -> tuple[str, str]:
    """Split Python source into code without docstrings, and the docstrings.

    Args:
        source: a module.

    Returns:
        The code, and the docstrings one below the other; both empty if it does not parse.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", ""
    lines, docs = source.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        if len(text) > 80:  # more than one line: "Return the size." is hardly prose
            docs.append(text)
        literal = node.body[0]
        for index in range(literal.lineno - 1, literal.end_lineno or literal.lineno):
            lines[index] = ""
    return "".join(lines).strip(), "\n\n".join(docs)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules() -> Iterator[tuple[str, str]]:
    """Names and sources of the library's modules, in an order that is a function of the names."""
    root = _library()
    files = {str(path.relative_to(root)): path for path in root.rglob("*.py")}
    for name in sorted(files, key=_hash):
        if _SKIPPED.isdisjoint(Path(name).parts):
            try:
                yield name, files[name].read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the docstrings remain
        return
    yield from sorted(topics.items(), key=lambda item: _hash(item[0]))


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def _split_of(name: str) -> str:
    # Of the library's documents 8 % and 5 % are enough for these splits' SIZES.
    share = _hash("split " + name) % 100
    return "test" if share < 8 else "validation" if share < 13 else "train"


def _is_full(documents: list[str], split: str) -> bool:
    return sum(map(len, documents)) >= SIZES[split]


def _cut(text: str) -> list[str]:
    pieces, piece, size = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _DOCUMENT:
            pieces.append("".join(piece))
            piece, size = [], 0
    pieces.append("".join(piece))
    return [piece for piece in pieces if len(piece) >= 200]  # some fifty tokens; less says little


def _limited(documents: list[str], size: int) -> list[str]:
    first, total = [], 0
    for document in documents:
        if total >= size:
            break
        first.append(document)
        total += len(document)
    return first


def _arithmetic(seed: int) -> dict[str, list[str]]:
    """Problems for every split; a problem of an earlier split is not drawn again. The large split
    comes last, so that the small ones do not have to look for what it left."""
    rng, seen = random.Random(seed), set()
    splits = {}
    for split in ("test", "validation", "train"):
        documents: list[str] = []
        total = 0
        while total < SIZES[split]:
            problem = _sum(rng) if rng.random() < 0.4 else _story(rng)
            if problem not in seen:
                documents.append(problem)
                total += len(problem)
        seen.update(documents)
        splits[split] = documents
    return splits


def _sum(rng: random.Random) -> str:
    a, b, c = rng.randrange(10, 1000), rng.randrange(10, 1000), rng.randrange(2, 20)
    high, low = max(a, b), min(a, b)
    question, steps, answer = rng.choice(
        (
            (f"{a} + {b} + {c}", f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}", a + b + c),
            (f"{high} - {low}", f"{high}-{low}={high - low}", high - low),
            (f"{a} times {c}", f"{a}*{c}={a * c}", a * c),
            (f"{a * c} divided by {c}", f"{a * c}/{c}={a}", a),
        )
    )
    return f"Question: What is {question}?\nAnswer: {steps}\n#### {answer}\n"


def _story(rng: random.Random) -> str:
    who, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    a, b, c = rng.randrange(3, 90), rng.randrange(2, 40), rng.randrange(2, 12)
    kind = rng.randrange(3)
    if kind == 0:
        return (
            f"Question: {who} has {a} {thing}. {other} has {b} more {thing} than {who}. How many "
            f"{thing} do they have together?\nAnswer: {other} has {a}+{b}={a + b} {thing}.\n"
            f"Together they have {a}+{a + b}={a + a + b} {thing}.\n#### {a + a + b}\n"
        )
    if kind == 1:
        return (
            f"Question: {who} buys {c} boxes of {thing}. Each box holds {a} {thing}, and {who} "
            f"already has {b}. How many {thing} does {who} have now?\nAnswer: The boxes hold "
            f"{c}*{a}={c * a} {thing}.\n{who} now has {c * a}+{b}={c * a + b} {thing}.\n"
            f"#### {c * a + b}\n"
        )
    total = a * c
    return (
        f"Question: {who} shares {total} {thing} equally among {c} friends, and {other} is one of "
        f"them. {other} then gives away {min(b, a)} {thing}. How many {thing} are left to "
        f"{other}?\nAnswer: Each friend gets {total}/{c}={a} {thing}.\n{other} has {a}-{min(b, a)}="
        f"{a - min(b, a)} {thing} left.\n#### {a - min(b, a)}\n"
    )


if __name__ == "__main__":
    write_corpus(build_corpus(), Path(sys.argv[1]))
