"""koff.json: what a saved model is made of, and the sha256 of every file that belongs to it.

``Manifest`` is the only place that knows its fields. Those that decide what is loaded are sealed by
a checksum; the others may be edited.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

from ..errors import asker
from ..model.config import KoffConfig, check_memory_name
from .files import DamagedFolder, is_plain
from .layout import MARKER, weight_names
from .metadata import check_shapes

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
# No layer has more neurons. Python reads a number of any length from JSON, and torch would fail on
# one with an error of its own.
_WIDEST = 1 << 31
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _are_sizes(values: list[Any]) -> bool:
    # isinstance would let True pass as a whole number.
    return all(type(value) is int and 1 <= value < _WIDEST for value in values)


def _are_indices(layers: list[Any] | None) -> bool:
    if layers is None:
        return True
    return all(isinstance(rows, list) and all(type(i) is int for i in rows) for rows in layers)


def _are_shares(values: dict[str, Any]) -> bool:
    shares = [values.get(scope) for scope in ("mlp", "model", "non_embedding")]
    return all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)


def _are_hashes(values: dict[str, Any]) -> bool:
    return all(isinstance(value, str) and _SHA256.fullmatch(value) for value in values.values())


_SIZES = f"be a list of whole numbers of at least 1 and below {_WIDEST}"


def _field(
    rule: str, *kinds: type, holds: Callable[[Any], Any] | None = None, sealed: bool = True
) -> Any:
    """A field of koff.json.

    Args:
        rule: what the value must be, in words.
        kinds: Python's types of such JSON.
        holds: what else must be true of it.
        sealed: whether it decides what is loaded; the others only describe.
    """
    metadata = {"rule": rule, "kinds": kinds, "holds": holds, "sealed": sealed}
    return dataclasses.field(metadata=metadata)


@dataclass
class Manifest:
    """The content of koff.json, field by field in the order in which they are written.

    Before them stands ``format``, after them a checksum over the sealed ones.

    Attributes:
        koff: the version that wrote it.
        versions: of torch, transformers and peft.
        created: when, in ISO 8601.
        base: id of the dense model, if it is known.
        revision: of the base, if it is known.
        config: what the model was attached with.
        memories: the names of those there are now.
        dense_widths: MLP neurons of each layer before pruning.
        widths: MLP neurons of each layer now.
        kept: which of the dense neurons these are; None if the model was not pruned.
        sparsity: share that was removed: of MLP neurons, of all weights, of all but embeddings.
        backbone_sha256: over the names and hashes of the weight files; each memory repeats it.
        files: name -> sha256 of every file that ``koff.save`` wrote.
        metadata: what the caller of ``koff.save`` gave (``storage.metadata``).
        others: fields that koff does not know, which are written back as they were.
    """

    koff: str = _field("be a text", str, sealed=False)
    versions: dict[str, Any] = _field("be an object", dict, sealed=False)
    created: str = _field("be a text", str, sealed=False)
    base: str | None = _field("be a text or null", str, NoneType, sealed=False)
    revision: str | None = _field("be a text or null", str, NoneType, sealed=False)
    config: KoffConfig = _field("be an object", dict)
    memories: list[str] = _field("be a list", list)
    dense_widths: list[int] = _field(_SIZES, list, holds=_are_sizes)
    widths: list[int] = _field(_SIZES, list, holds=_are_sizes)
    kept: list[list[int]] | None = _field(
        "be null or one list of whole numbers per layer", list, NoneType, holds=_are_indices
    )
    sparsity: dict[str, float] = _field(
        "hold the shares mlp, model and non_embedding", dict, holds=_are_shares
    )
    backbone_sha256: str = _field("be a sha256", str, holds=_SHA256.fullmatch)
    files: dict[str, str] = _field(
        "be an object of file names and their sha256", dict, holds=_are_hashes
    )
    metadata: dict[str, Any] = _field("be an object", dict, sealed=False)
    others: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Manifest:
        """Check the format, the type of every field, and what can be checked without other files.

        Args:
            values: koff.json as ``json`` read it.

        Raises:
            ValueError: of another format, or malformed.
        """
        version = values.get("format")
        if type(version) is not int or version != FORMAT:  # True == 1
            raise ValueError(
                f"{asker()}: the format version must be {FORMAT}, got {version!r}; update koff"
            )
        # A field that is left out counts as null: base and revision may be.
        for field in _FIELDS:
            value, holds = values.get(field.name), field.metadata["holds"]
            if not isinstance(value, field.metadata["kinds"]) or (holds and not holds(value)):
                got = repr(values.get(field.name, "nothing"))[:80]  # "kept" can be a megabyte
                raise DamagedFolder(
                    f"{field.name!r} in {MARKER} must {field.metadata['rule']}, got {got}"
                )
        known = {field.name: values.get(field.name) for field in _FIELDS}
        try:
            for name in known["memories"]:
                check_memory_name(name)
            known["config"] = KoffConfig.from_dict(known["config"])
        except TypeError as error:  # a mistake in a call, but in a file it is damage
            raise ValueError(str(error)) from None
        others = {n: v for n, v in values.items() if n not in {*known, "format", "checksum"}}
        manifest = cls(**known, others=others)
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Refuse fields that contradict each other, or hold what koff would not have written."""
        if len(set(self.memories)) != len(self.memories):
            raise DamagedFolder(f"the memories must differ, got {self.memories}")
        same_layers = len(self.widths) == len(self.dense_widths)
        if self.widths != self.dense_widths and (self.kept is None or not same_layers):
            raise DamagedFolder(
                f"the backbone's widths must be {self.dense_widths} without kept neurons, and one "
                f"per layer with them, got {self.widths}"
            )
        if self.kept is not None and len(self.kept) != len(self.dense_widths):
            raise DamagedFolder(
                f"'kept' in {MARKER} must have one list of kept neurons for each of "
                f"{len(self.dense_widths)} layers, got {len(self.kept)}"
            )
        # Not sealed, so it may have been edited since; the card and the commands read it.
        check_shapes(self.metadata, f"the metadata of {MARKER}", "correct or remove it")
        for name in self.files:
            if not is_plain(name):
                raise DamagedFolder(f"a file name must lie in the folder, got {name!r}")

    def kept_neurons(self) -> list[Tensor] | None:
        """Return the kept neurons of each layer as int64 [width]; None for a dense backbone.

        Raises:
            ValueError: they are not increasing indices, as many as the layer has neurons.
        """
        import torch  # whatever else one reads of a manifest needs none

        if self.kept is None:
            return None
        layers = zip(self.kept, self.widths, self.dense_widths, strict=True)
        for index, (rows, width, dense) in enumerate(layers):
            increasing = rows == sorted(set(rows)) and len(rows) == width
            if not increasing or rows[0] < 0 or rows[-1] >= dense:
                raise ValueError(
                    f"{asker()}: the kept neurons of layer {index} must be {width} increasing "
                    f"indices below {dense}, got {len(rows)} entries; copy koff.json again"
                )
        return [torch.tensor(rows) for rows in self.kept]

    def to_json(self) -> dict[str, Any]:
        """Return the inverse of ``from_json``, with a checksum."""
        fields = {field.name: getattr(self, field.name) for field in _FIELDS}
        values = {"format": FORMAT, **fields, "config": self.config.to_dict(), **self.others}
        return {**values, "checksum": seal_of(values)}  # last, as a reader of the file expects it

    def to_text(self) -> str:
        """Return the text of koff.json."""
        return json.dumps(self.to_json(), indent=1)


_FIELDS = tuple(field for field in dataclasses.fields(Manifest) if field.name != "others")
SEALED = ("format", *(field.name for field in _FIELDS if field.metadata["sealed"]))


def seal_of(values: Mapping[str, Any]) -> str:
    """Return the checksum of a koff.json: sha256 over its sealed fields.

    It finds accidents, not forgers, who can compute it too.
    """
    sealed = {name: values.get(name) for name in SEALED}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def backbone_digest(files: Mapping[str, str]) -> str:
    """Return one sha256 for the backbone: over the names and hashes of its weight files.

    Args:
        files: name -> sha256.
    """
    lines = [f"{name} {files[name]}\n" for name in sorted(weight_names(files))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
