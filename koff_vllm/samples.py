"""What koff goes on with after one short prompt, memory by memory, and whether vLLM does the same.

``koff serve`` asks koff before it starts a server, and the server asks its engine before it takes
requests. So a memory whose LoRA or keys did not arrive, a kernel that is wrong on this device, or
another version of vLLM that works otherwise is found before anybody is served.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PROMPT, NEW = 12, 6  # tokens of a sample
VARIABLE = "KOFF_VLLM_SAMPLES"  # the file, in the environment of a server
# How near the log-probabilities of one token come in the two engines, measured on the CPU with
# trained memories (bench/results/cpu-serve-rounding.json, 64 samples each). 16 bits round every
# activation, and vLLM rounds LoRA and learned keys to them too, which koff keeps in fp32.
#   bfloat16: up to 0.29 (SmolLM2-135M, koff in bf16 as well); allowed is twice that.
#   float16: up to 0.011 (a model of 6 M parameters, whose bf16 came to 0.067). Its steps are 8
#       times finer, so an eighth of what bf16 may.
#   float32: up to 1e-5. A model of many layers adds up more; a wrong memory is far above.
CLOSE = {"float32": 1e-3, "float16": 0.075, "bfloat16": 0.6}


@dataclass(frozen=True)
class Sample:
    """koff's greedy continuation of a prompt.

    Args:
        prompt: ids of the prompt.
        ids: of the tokens that follow.
        logprobs: of each of these.
        margins: by how much each was more probable, in log-probability, than the next one.
        dtype: in which koff computed them.
    """

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    margins: list[float]
    dtype: str

    def close(self, dtype: str) -> float:
        """Return the largest difference of log-probabilities that is rounding.

        Args:
            dtype: in which the other engine computes.
        """
        return max(CLOSE[self.dtype], CLOSE[dtype])

    def difference(self, ids: list[int], logprobs: list[float], close: float) -> str | None:
        """Return how another continuation differs by more than rounding; None if it does not.

        Args:
            ids: what another engine went on with.
            logprobs: of each of these.
            close: the largest difference of log-probabilities that is rounding.
        """
        for place, (wanted, got) in enumerate(zip(self.ids, ids, strict=True)):
            apart = abs(self.logprobs[place] - logprobs[place])
            if not apart <= close:  # NaN is no rounding
                return (
                    f"token {place} has log-probability {logprobs[place]:.4f} instead of "
                    f"{self.logprobs[place]:.4f}"
                )
            if wanted != got:
                # A tie, which either engine may break in its way; from here on texts differ.
                tie = self.margins[place] <= 2 * close
                return None if tie else f"token {place} is {got} instead of {wanted}"
        return None


def write_samples(path: Path, samples: dict[str, Sample]) -> None:
    """Write samples by the names of memories' versions, and "" for the backbone's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({name: asdict(sample) for name, sample in samples.items()}))
    new.replace(path)


def read_samples(path: Path) -> dict[str, Sample]:
    """Return what ``write_samples`` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return {name: Sample(**sample) for name, sample in values.items()}
