"""Which neurons a mask removes: those that one language alone uses, or those that all use?

Language-specific neurons are found on the unpruned base by LAPE (Tang et al. 2024,
arXiv 2402.16438): how evenly the languages use a neuron, by the entropy of their shares.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.blocks import PackedBlocks
from ..errors import asked_by, asker
from ..model import arch
from .perplexity import check_sizes, check_vocabulary, evaluating

# LAPE's own: a language uses a neuron much if its share is among the 5 % largest of all shares,
# and 1 % of all neurons are specific, those of the lowest entropy.
MUCH, SPECIFIC = 0.95, 0.01
_DRAWS = 100_000  # random masks; a p of 0.001 then has a standard error of a tenth of it
_Z = 1.959963984540054  # 95 % of a normal distribution lie within


@dataclass(frozen=True)
class PruneRate:
    """How many of some neurons a mask removes, and what a random mask of the same widths would.

    Args:
        neurons: how many these are.
        pruned: how many of them the mask removes.
        rate: the share of them, NaN of none.
        low, high: its 95 % confidence interval, by Wilson.
        expected: mean share that random masks remove, which take from each layer as many.
        expected_low, expected_high: where 95 % of these masks lie.
        p: share of random masks that are as far from their mean, two-sided. None where every mask
            of these widths removes the same number.
    """

    neurons: int
    pruned: int
    rate: float
    low: float
    high: float
    expected: float
    expected_low: float
    expected_high: float
    p: float | None


@dataclass(frozen=True)
class NeuronReport:
    """What a mask does to specific and general neurons.

    Args:
        languages: that were compared.
        tokens: {language: tokens that were read}.
        much: the share of tokens from which on a neuron counts as used much.
        rates: "specific", "general" (used much in every language), "others" (all but the
            specific), and "specific to NAME" for each language.
        layers: of each layer, its number of neurons, and of specific and other ones, all and
            pruned.
    """

    languages: list[str]
    tokens: dict[str, int]
    much: float
    rates: dict[str, PruneRate]
    layers: list[dict[str, int]]

    def sentence(self) -> str:
        """Return the finding in plain words."""
        found = self.rates["specific"]
        if not found.neurons:
            return "No neuron is specific to a language, so nothing can be said of such."
        if found.p is None:
            return (
                "Every mask of these widths removes as many specific neurons: nothing to compare."
            )
        shown = f"{100 * found.rate:.1f} % of the {found.neurons} language-specific neurons are "
        shown += f"pruned (95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %), and "
        shown += f"{100 * found.expected:.1f} % by random masks of the same widths: "
        p = f"p = {found.p:.2g}"
        if found.p >= 0.05:
            return f"{shown}no difference that could not be chance ({p})."
        word = "preferentially pruned" if found.rate > found.expected else "preferentially kept"
        return f"{shown}language-specific neurons are {word} ({p})."

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self) | {"sentence": self.sentence()}


@asked_by("neuron_report")
def neuron_report(
    model: PreTrainedModel,
    texts: Mapping[str, PackedBlocks],
    pruned: Sequence[Tensor],
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> NeuronReport:
    """Compare how a mask treats language-specific and other neurons.

    Args:
        model: the unpruned base, a causal LM of transformers.
        texts: {language: its packed text}, at least two.
        pruned: bool [I] of each layer, whether the mask removes a neuron.
        batch_size: blocks per forward.
        seed: of the random masks.

    Raises:
        ValueError: one language, or a mask of another model.
    """
    widths = arch.widths(model)
    if [len(mask) for mask in pruned] != widths:
        raise ValueError(
            f"{asker()}: the mask must have {widths} neurons, as the base has, got "
            f"{[len(mask) for mask in pruned]}; give the base that was pruned"
        )
    shares = active_shares(model, texts, batch_size)
    specific, general, much = classify(shares)
    own = [mask.any(0) for mask in specific]  # [I] of each layer
    chosen = {"specific": own, "general": general, "others": [~mask for mask in own]}
    for index, name in enumerate(texts):
        chosen[f"specific to {name}"] = [mask[index] for mask in specific]
    layers = [
        {
            "neurons": len(gone),
            "specific": int(mine.sum()),
            "specific_pruned": int((mine & gone).sum()),
            "others": int((~mine).sum()),
            "others_pruned": int((~mine & gone).sum()),
        }
        for mine, gone in zip(own, pruned, strict=True)
    ]
    return NeuronReport(
        languages=list(texts),
        tokens={name: int(data.lengths.sum()) for name, data in texts.items()},
        much=much,
        rates={name: prune_rate(masks, pruned, seed) for name, masks in chosen.items()},
        layers=layers,
    )


def active_shares(
    model: PreTrainedModel, texts: Mapping[str, PackedBlocks], batch_size: int = 8
) -> list[Tensor]:
    """Return for how many of a language's tokens each neuron is active, act(gate) > 0.

    Every activation that koff knows is above 0 where its argument is.

    Args:
        model: a causal LM of transformers, without gates.
        texts: {language: its packed text}.
        batch_size: blocks per forward.

    Returns:
        fp64 [languages, I] of each layer, on the CPU.
    """
    if len(texts) < 2:
        raise ValueError(
            f"{asker()}: there must be at least two languages to compare, got {list(texts)}; name "
            "more domains"
        )
    decoder, found = arch.decoder(model), []
    with evaluating(model), torch.inference_mode():
        for name, data in texts.items():
            check_sizes(model, data.blocks.shape[1], batch_size)
            check_vocabulary(model, data, f"the text of {name!r}")
            real = torch.arange(data.blocks.shape[1]) < data.lengths[:, None]
            with _counted(model) as (counts, mask):
                for rows in torch.arange(len(data)).split(batch_size):
                    # What fills a block up counts for nothing; attention is causal, so that no
                    # token before it sees it.
                    mask[:] = [real[rows].to(model.device)]
                    decoder(input_ids=data.blocks[rows].to(model.device), use_cache=False)
            found.append([count.cpu() / int(real.sum()) for count in counts])
    return [torch.stack(languages) for languages in zip(*found, strict=True)]


@contextlib.contextmanager
def _counted(model: PreTrainedModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Count inside, per layer and neuron, the tokens for which its gate's argument is above 0.

    Gives the counts, fp64 [I] of each layer, and a list whose one entry, bool [B, T], says which
    tokens of the next forward count.
    """
    mlps = arch.mlps(model)
    counts = [torch.zeros(arch.width(m), dtype=torch.float64, device=model.device) for m in mlps]
    mask: list[Tensor] = []

    def watch(index: int, linear: nn.Module) -> Any:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # Where gate and up are one layer, the gate's rows are the first.
            active = (output[..., : len(counts[index])] > 0) & mask[0][..., None]
            counts[index] += active.sum((0, 1))

        return linear.register_forward_hook(count)

    hooks = [watch(i, next(iter(arch.mlp_linears(m).values()))) for i, m in enumerate(mlps)]
    try:
        yield counts, mask
    finally:
        for hook in hooks:
            hook.remove()


def classify(shares: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], float]:
    """Find the neurons that few languages use, and those that all use.

    Of a neuron with shares p_l let q_l = p_l / sum p. Its LAPE is - sum q_l ln q_l. Specific are
    the 1 % of all neurons with the lowest, among those that some language uses much.

    Args:
        shares: fp64 [languages, I] of each layer, in 0..1.

    Returns:
        bool [languages, I] of each layer, whether a neuron is specific to the language (it may be
        to several); bool [I] of each, whether every language uses it much; and from which share on
        it is much.
    """
    sizes = [layer.shape[1] for layer in shares]
    flat = torch.cat(list(shares), 1)  # [languages, N]
    # As in LAPE's own code: the k-th smallest of all shares, of all languages.
    much = flat.flatten().kthvalue(max(1, round(MUCH * flat.numel()))).values
    used = flat > much
    q = flat / flat.sum(0).clamp(min=torch.finfo(flat.dtype).tiny)
    entropy = -torch.special.xlogy(q, q).sum(0)
    entropy[~used.any(0)] = math.inf
    lowest = entropy.topk(round(SPECIFIC * flat.shape[1]), largest=False).indices
    specific = torch.zeros(flat.shape[1], dtype=torch.bool)
    specific[lowest] = entropy[lowest].isfinite()
    own = (used & specific).split(sizes, 1)
    return list(own), list((used.all(0) & ~specific).split(sizes)), float(much)


def prune_rate(chosen: Sequence[Tensor], pruned: Sequence[Tensor], seed: int = 0) -> PruneRate:
    """Compare a mask with random ones on some neurons.

    A random mask removes as many neurons of each layer as the mask does: so a layer that is pruned
    more, and happens to have many of them, makes no difference. How many of the chosen ones it
    removes is then a sum of hypergeometric numbers, which are drawn here: a permutation test whose
    permutations stay within layers.

    Args:
        chosen: bool [I] of each layer.
        pruned: bool [I] of each layer.
        seed: of the random masks.
    """
    layers = list(zip(chosen, pruned, strict=True))
    count = sum(int(mine.sum()) for mine, _ in layers)
    gone = sum(int((mine & out).sum()) for mine, out in layers)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(_DRAWS, dtype=np.int64)
    expected = 0.0
    for mine, out in layers:
        removed, own = int(out.sum()), int(mine.sum())
        if own:
            drawn += generator.hypergeometric(removed, len(out) - removed, own, _DRAWS)
            expected += own * removed / len(out)
    if not count:
        nan = math.nan
        return PruneRate(0, 0, nan, nan, nan, nan, nan, nan, None)
    low, high = wilson(gone, count)
    far = np.abs(drawn - expected) >= abs(gone - expected) - 1e-9
    # The mask itself is one of those that could have been drawn, so that p is never 0.
    p = None if drawn.min() == drawn.max() == gone else (1 + int(far.sum())) / (1 + _DRAWS)
    ends = np.quantile(drawn, (0.025, 0.975)) / count
    rate = gone / count
    return PruneRate(count, gone, rate, low, high, expected / count, *map(float, ends), p)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share, by Wilson (1927).

    Args:
        successes: of ``count``.
        count: at least 1.
    """
    share, z2 = successes / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)
