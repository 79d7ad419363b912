"""The checkpoint that a model in few bits was quantised from, read by name, one at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..errors import asker
from ..model import arch
from ..model.few_bits import dense_weight

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# As safetensors names them.
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Of weights that are about normal, NF4 loses a tenth (Frobenius norm of the difference over that of
# the weight), FP4 an eighth, int8 less than a hundredth. Another model's differ by more than all.
_MOST_LOST = 0.5


class Original:
    """The safetensors of a checkpoint, of which nothing is read before it is asked for.

    Args:
        model: in few bits.
        source: folder or hub id; None: where the model was loaded from.
        revision: of a hub id.

    Attributes:
        source: where it is.
        dtype: of its linear layers.

    Raises:
        ValueError: no safetensors there, or tensors that are not those of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: str | Path | None = None,
        revision: str | None = None,
    ):
        if source is None:
            source = model.config._name_or_path or model.name_or_path
            # The very files that it was made of, whatever has been uploaded since.
            revision = revision or getattr(model.config, "_commit_hash", None)
        self.source = str(source or "")
        if not self.source:
            self._refuse("be known", "a model that names no folder or hub id")
        self._files: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        self._stack = ExitStack()
        # In transformers' order: without a network the cache knows what it has asked for.
        path = self._find(_ONE, revision)
        if path is not None:
            self._files = dict.fromkeys(self._opened(path).keys(), path)
        else:
            index = self._find(_INDEX, revision)
            if index is None:
                self._refuse("be in safetensors", f"{self.source} without {_ONE} or {_INDEX}")
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = {shard: self._find(shard, revision) for shard in sorted(set(shards.values()))}
            missing = [shard for shard, path in paths.items() if path is None]
            if missing:
                self._refuse("be whole", f"{self.source} without {missing[0]}")
            self._files = {name: paths[shard] for name, shard in shards.items()}
        self.dtype = self._check(model)

    def __enter__(self) -> Original:
        return self

    def __exit__(self, *exception) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in the model, on the CPU, in the dtype of the file."""
        stored = self._stored(name)
        return self._opened(self._files[stored]).get_tensor(stored)

    def _find(self, name: str, revision: str | None) -> Path | None:
        found = cached_file(
            self.source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if found is None else Path(found)

    def _opened(self, path: Path):
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[path]

    def _stored(self, name: str) -> str:
        """The name of a tensor in the files: its own, or, in a multimodal checkpoint, that with the
        language model's name within it."""
        if name in self._files:
            return name
        ending = "." + name.partition(".")[2]
        found = [stored for stored in self._files if stored.endswith(f"language_model{ending}")]
        if len(found) != 1:
            self._refuse("hold the model's tensors", f"{self.source} without {name}")
        return found[0]

    def _check(self, model: PreTrainedModel) -> torch.dtype:
        """Compare names, shapes and dtypes of all linear layers, and the values of two.

        Returns:
            Their dtype.
        """
        dtypes = {}
        for site, linear in arch.sites(model):
            name = f"{arch.site_path(site, model)}.weight"
            stored = self._stored(name)
            piece = self._opened(self._files[stored]).get_slice(stored)
            size = linear.out_features, linear.in_features
            if tuple(piece.get_shape()) != size or piece.get_dtype() not in _DTYPES:
                got = f"{piece.get_dtype()} {tuple(piece.get_shape())}"
                self._refuse(f"hold {name} as {size} in 16 or 32 bits", f"{got} in {self.source}")
            dtypes[site] = _DTYPES[piece.get_dtype()]
        sites = dict(arch.sites(model))
        for site in (min(sites), max(sites)):
            own = dense_weight(sites[site], torch.float32).cpu()
            stored = self.read(f"{arch.site_path(site, model)}.weight").float()
            lost = float((own - stored).norm() / stored.norm())
            if not lost < _MOST_LOST:
                self._refuse(
                    "be what the model was quantised from",
                    f"a {site.linear} in layer {site.layer} of {self.source} that differs by "
                    f"{100 * lost:.0f} %",
                )
        return dtypes[min(sites)]

    def _refuse(self, rule: str, got: str) -> None:
        raise ValueError(
            f"{asker()}: the original checkpoint of a model in few bits must {rule}, got {got}; "
            "name one in safetensors (koff.compact has base= for that), or go on with the rounded "
            "weights (koff.compact with dequantize=True)"
        )
