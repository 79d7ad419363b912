"""The README's first example runs as it stands, on a tiny model in place of the named one."""

import random
import re
from pathlib import Path

import torch
from support.character_tokenizer import make_tokenizer
from support.models import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMED = "meta-llama/Llama-3.2-3B"


def test_readme_names_the_two_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert f"make {command}" in README and re.search(rf"^{command}:", makefile, re.M)


def test_readme_first_screen_is_for_strangers():
    """At most 12 numbers in the first 60 lines, those of the example included."""
    first = "\n".join(README.splitlines()[:60])
    assert len(re.findall(r"\d+(?:[.,]\d+)?", first)) <= 12


def test_readme_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert code.count(NAMED) == 1 and "max_steps=2000" in code
    tokenizer = make_tokenizer(
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    model = tiny("llama", max_position_embeddings=1024, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(8)]
    for name, lines in dict(en=texts, fr=texts[::-1], es=texts[2:]).items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    names = {}
    code = code.replace(NAMED, str(tmp_path / "base")).replace("max_steps=2000", "max_steps=2")
    code = code.replace('("run", ', '("run", use_cpu=True, ')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    assert names["small"].dtype == torch.bfloat16
    assert names["small"].koff.memory_names == ("en", "fr", "es")
    assert (tmp_path / "out" / "koff.json").is_file()
