"""Recipes: one YAML file that says which model is trained on which data, and how.

Reading one needs neither torch nor transformers, so a misspelt key is refused at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.sources import Completion, DataSource, check_source
from ..errors import asker
from ..model.config import KoffConfig
from ..storage.files import File
from ..training.settings import Settings
from .schema import build, convert, join, unknown_key

RECIPE_FILE, LOG_FILE = "recipe.json", "train_log.json"  # in the output folder of a run
SHIPPED = Path(__file__).parents[1] / "recipes"

# numpy, which transformers seeds too, takes no larger one.
_MOST_SEED = (1 << 32) - 1
# Far beyond any run: a slip of the keyboard is refused here, and not by an overflow in a schedule.
_MOST_STEPS = 10**9

Columns = str | tuple[str, ...] | Completion


@dataclass(frozen=True)
class SourceData:
    """One split, in local files or of a dataset of the Hugging Face hub; the fields are those of
    ``DataSource``."""

    files: str | tuple[str, ...] | None = None
    hub: str | None = None
    name: str | None = None
    split: str = "train"
    field: Columns | None = None
    skip: int = 0
    limit: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if (not self.files) == (self.hub is None):
            raise ValueError(
                f"a split must have either files or hub, got files={self.files!r} and "
                f"hub={self.hub!r}; give exactly one of them"
            )
        if self.hub is None and (self.name is not None or self.split != "train"):
            raise ValueError(
                "name and split must be left out where there are files, got "
                f"{self.name!r} and {self.split!r}; they belong to hub"
            )


Split = str | tuple[str, ...] | SourceData


@dataclass(frozen=True)
class DomainData:
    """The splits of one domain: local files (one, several, a folder, a pattern) or hub datasets,
    and the columns that hold what is learned, as in ``DataSource``."""

    train: Split
    validation: Split | None = None
    test: Split | None = None
    field: Columns = "text"


@dataclass(frozen=True)
class GeneralData(DomainData):
    """A part of the general mixture; ``weight``: its share in the draws, relative to the others."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}; 1.0 is neutral")


@dataclass
class TrainSettings(Settings):
    """How long and how fast, beside koff's own ``Settings``.

    Args:
        steps: of the optimiser.
        batch_size: rows of one forward, per device.
        gradient_accumulation: forwards of one step.
        lr_scheduler: of LoRA and KV, one of transformers' names.
        warmup_ratio: share of the steps over which their rates rise from 0.
        weight_decay: of the LoRA matrices.
        max_grad_norm: of gates, LoRA and KV, each by itself.
        bf16: mixed precision; a base that is loaded in bfloat16 needs none.
        activation_checkpointing: keep the layers' inputs alone, and compute the rest again.
        save_every: steps from one checkpoint to the next; 0: none is written.
        keep_checkpoints: so many of the newest stay.
        logging_every: steps from one logged line to the next.
        dataset_num_proc: processes that tokenise what is not yet in the cache.
    """

    steps: int = 1000
    batch_size: int = 8
    gradient_accumulation: int = 1
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    activation_checkpointing: bool = False
    save_every: int = 0
    keep_checkpoints: int = 2
    logging_every: int = 10
    dataset_num_proc: int = 1

    def __post_init__(self) -> None:
        at_least_1 = ("steps", "batch_size", "gradient_accumulation", "width_multiple_of")
        for name in (*at_least_1, "logging_every", "keep_checkpoints", "dataset_num_proc"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.steps > _MOST_STEPS:
            raise ValueError(f"steps must be at most {_MOST_STEPS}, got {self.steps}; lower it")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie in 0..1, got {self.warmup_ratio}; correct it")
        if self.save_every < 0 or self.general_every < 0:
            raise ValueError(
                "save_every and general_every must be 0 (never) or positive, got "
                f"{self.save_every} and {self.general_every}; correct them"
            )


@dataclass
class Recipe:
    """A checked recipe: every key known, every type right, paths not yet looked at.

    Args:
        model: hub id, or folder of a pretrained model.
        data: {domain: its splits}; the domains are the memories.
        general: {name: its splits and weight}, the mixture of the general steps; may be empty.
        koff: what is attached to the model.
        train: steps, rates and batches.
        seed: seed of the initialisation and of the data order.
        revision: revision of a hub model.
        dtype: dtype the model is loaded in; "auto" takes that of its checkpoint.
        gguf_file: name of a GGUF file in the model's folder or hub repository; its weights are
            dequantised.
        root: folder that relative paths start from; not part of the file.
    """

    model: str
    data: dict[str, DomainData]
    koff: KoffConfig
    general: dict[str, GeneralData] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 0
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gguf_file: str | None = None
    root: Path = field(default=Path(), init=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, paths as written, ready for JSON and for ``parse``."""
        values = dataclasses.asdict(self)
        del values["root"]
        # Through JSON, so that it equals what was stored and read again: tuples become lists.
        return json.loads(json.dumps(values))

    def model_path(self) -> str:
        """Return the folder of the model, or its hub id.

        Raises:
            FileNotFoundError: the value can only be a folder, and there is none.
        """
        folder = self.root / Path(self.model).expanduser()
        if folder.exists():
            return str(folder)
        if self.model.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"recipe: model must be an existing folder or a hub id, got {self.model!r} "
                f"(nothing at {folder}); correct the path, or set KOFF_DATA"
            )
        return self.model

    def sources(self, split: str, *, general: bool = False) -> dict[str, DataSource]:
        """Return {name: source} of one split, of the domains or of the general mixture.

        Args:
            split: "train", "validation" or "test"; what has no such split is left out.
            general: the general mixture instead of the domains.
        """
        parts: Mapping[str, DomainData] = self.general if general else self.data
        found = {}
        for name, part in parts.items():
            value = getattr(part, split)
            if value is None:
                continue
            if not isinstance(value, SourceData):
                value = SourceData(files=value)
            settings = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
            files = settings.pop("files") or ()
            paths = tuple(
                self.root / file for file in ([files] if isinstance(files, str) else files)
            )
            settings["path"] = (paths[0] if len(paths) == 1 else paths) or None
            settings["field"] = part.field if value.field is None else value.field
            found[name] = DataSource(**settings)
        return found

    def data_names(self, *, general: bool = False) -> dict[str, str]:
        """Return {name: what it was trained on}: hub ids, and names of files, folders and patterns
        without the folders they lie in.

        Args:
            general: the general mixture instead of the domains.
        """
        sources = self.sources("train", general=general)
        return {
            name: ", ".join(path.name for path in source.paths) or str(source)
            for name, source in sources.items()
        }

    def check_files(self) -> None:
        """Refuse local files that are missing or of an unknown kind.

        Raises:
            FileNotFoundError, ValueError: so.
        """
        for split in ("train", "validation", "test"):
            for general in (False, True):
                for source in self.sources(split, general=general).values():
                    check_source(source)


def shipped_recipes() -> dict[str, Path]:
    """Return {name: file} of the recipes that come with koff."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply overrides and check it.

    Args:
        path: the YAML file, or the name of a recipe that comes with koff.
        overrides: "key.path=value" texts, values in YAML; they may add keys.

    Returns:
        The recipe; relative paths in it start from $KOFF_DATA if set, else from the file's folder,
        or the working directory for a recipe that comes with koff.

    Raises:
        FileNotFoundError: no such file.
        KeyError, ValueError: malformed YAML, unknown keys, wrong types or values.
    """
    from .strict_yaml import read_yaml

    path, shipped = Path(path), shipped_recipes()
    start = path.parent
    if not path.is_file():
        if str(path) not in shipped:
            raise FileNotFoundError(
                f"recipe: {path} must be an existing file or one of koff's own recipes "
                f"({', '.join(shipped)}), got nothing there; correct it"
            )
        path, start = shipped[str(path)], Path.cwd()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"recipe: {path} must be UTF-8 text, got a byte that is not ({error.reason} at "
            f"{error.start}); convert the file"
        ) from None
    values = read_yaml(text, f"recipe: {path}")
    if not isinstance(values, Mapping):
        raise ValueError(
            f"recipe: {path} must hold a mapping of keys to values, got {type(values).__name__}; "
            f"start from a file in {SHIPPED}"
        )
    return parse(apply_overrides(values, overrides), data_root(start))


def data_root(default: Path) -> Path:
    """Return the folder that relative paths start from: $KOFF_DATA if set, else ``default``."""
    folder = os.environ.get("KOFF_DATA")
    return (Path(folder) if folder else default).resolve()


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested values with "key.path=value" texts applied, values read as YAML.

    Args:
        values: what the recipe file holds.
        overrides: texts such as "train.steps=10" or "koff.kv=null"; "data.fr=null" and
            "general.math=null" leave a domain or a general part out.

    Raises:
        KeyError: a part to be left out that is not there. ValueError: a text without "=", malformed
            YAML, or a path through something without keys.
    """
    from .strict_yaml import read_yaml

    result = json.loads(json.dumps(values))  # a deep copy
    for text in overrides:
        key_path, equals, value = text.partition("=")
        keys = key_path.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(
                f"recipe: an override must read KEY=VALUE, got {text!r}; add the value"
            )
        place = result
        for depth, key in enumerate(keys[:-1]):
            inner = place.get(key)
            if inner is None:
                inner = place[key] = {}
            if not isinstance(inner, dict):
                raise ValueError(
                    f"recipe: {'.'.join(keys[: depth + 1])} must have keys to be set by {text!r}, "
                    f"got {inner!r}; correct the key"
                )
            place = inner
        value = read_yaml(value, f"recipe: the value of {key_path}")
        if value is None and len(keys) == 2 and keys[0] in ("data", "general"):
            if keys[1] not in place:
                raise KeyError(
                    f"recipe: what {text!r} leaves out must be one of {sorted(place)}, got "
                    f"{keys[1]!r}; correct the name"
                )
            del place[keys[1]]
        else:
            place[keys[-1]] = value
    return result


def parse(values: Mapping[str, Any], root: Path) -> Recipe:
    """Build and check a recipe from plain values.

    Args:
        values: nested mappings as in the YAML file.
        root: folder that relative paths start from.

    Raises:
        KeyError, ValueError: unknown keys, wrong types or values, memories other than the domains.
    """
    values = dict(values)
    known = [item.name for item in dataclasses.fields(Recipe) if item.init]
    for key in values:
        if key not in known:
            raise unknown_key(str(key), key, known)
    data = convert(dict[str, DomainData], values.get("data") or {}, "data")
    if not data:
        raise KeyError(
            "recipe: data must name at least one domain, got none; add data.<name>.train"
        )
    seed = convert(int, values.get("seed", 0), "seed")
    if not 0 <= seed <= _MOST_SEED:
        raise ValueError(f"recipe: seed must lie in 0..{_MOST_SEED}, got {seed}; correct it")
    values["koff"] = _koff_values(values.get("koff") or {}, list(data), seed)
    for name in ("general", "train"):  # "train:" with nothing below it is null to YAML
        values[name] = values.get(name) or {}
    train, old, new = values["train"], "gradient_checkpointing", "activation_checkpointing"
    if isinstance(train, Mapping) and old in train and new not in train:
        # As transformers called it, and older runs have stored it.
        values["train"] = {(new if key == old else key): train[key] for key in train}
    recipe = build(Recipe, values, "")
    recipe.root = root
    memories = recipe.koff.memories
    if memories and set(memories) != set(data):
        raise ValueError(
            f"recipe: koff.memories must be the domains of data {sorted(data)}, got "
            f"{sorted(memories)}; leave koff.memories out, or add or remove data"
        )
    return recipe


def _koff_values(values: Any, domains: list[str], seed: int) -> Any:
    """Return the koff section with the defaults that depend on the rest: domains as memories, the
    recipe's seed.
    """
    if not isinstance(values, Mapping):
        return values  # build() says what is wrong with it
    values = {"memories": domains, "seed": seed} | dict(values)
    if "lora" in values and "kv" in values and values["lora"] is None and values["kv"] is None:
        # Memories that hold nothing are no memories: this is how a gates-only run is asked for.
        values["memories"] = []
    return values


def stored_recipe(output: Path) -> tuple[dict[str, Any], str]:
    """Read what a run stored of its recipe.

    Args:
        output: folder of the run, with its recipe.json.

    Returns:
        The values, and the folder that relative paths in them start from.

    Raises:
        ValueError: a damaged recipe.json.
    """
    values = File(output / RECIPE_FILE).json()
    recipe, root = values.get("recipe"), values.get("root")
    if not isinstance(recipe, dict) or not isinstance(root, str):
        raise ValueError(
            f"{asker()}: {RECIPE_FILE} must hold the recipe and its folder, got "
            f"{repr(values)[:80]}; copy the file again"
        )
    return recipe, root


def added_data(record: dict[str, Any], name: str) -> DomainData:
    """Return the splits of a domain that was added later, local paths made absolute.

    Args:
        record: what `koff add-memory` stored of it.
        name: of the memory, for errors.
    """
    root, values = data_root(Path(record["root"])), dict(record["data"])

    def absolute(files: Any) -> Any:
        return str(root / files) if isinstance(files, str) else [str(root / f) for f in files or ()]

    for split in ("train", "validation", "test"):
        value = values.get(split)
        if isinstance(value, str | list):
            values[split] = absolute(value)
        elif isinstance(value, dict) and value.get("files"):
            values[split] = value | {"files": absolute(value["files"])}
    return build(DomainData, values, f"data.{name}")


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Return the key path of the first difference between nested plain values, None if equal.

    Args:
        a, b: nested mappings, lists and scalars.
        path: key path of both.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            if key not in a or key not in b:
                return join(path, key)
            found = first_difference(a[key], b[key], join(path, key))
            if found is not None:
                return found
        return None
    return None if a == b else path
