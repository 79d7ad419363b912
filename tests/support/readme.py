"""The README's first example, on a tiny model in place of the one that it names."""

import random
import re
from pathlib import Path

from support.character_tokenizer import make_tokenizer
from support.models import tiny

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
NAMED = "meta-llama/Llama-3.2-3B"


def prepare(folder: Path) -> str:
    """Write a tiny model and the texts that the example reads into a folder; return its code, for
    two steps on the CPU."""
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert code.count(NAMED) == 1 and "max_steps=2000" in code
    tokenizer = make_tokenizer(
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    model = tiny("llama", max_position_embeddings=1024, vocab_size=len(tokenizer))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(8)]
    for name, lines in dict(en=texts, fr=texts[::-1], es=texts[2:]).items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    code = code.replace(NAMED, str(folder / "base")).replace("max_steps=2000", "max_steps=2")
    return code.replace('("run", ', '("run", use_cpu=True, ')
