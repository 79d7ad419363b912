"""Read a saved koff folder for vLLM, and lay its memories out as vLLM takes them.

A folder may be damaged, half copied or hostile, so it is looked at as ``koff.load`` does: JSON and
safetensors alone, sizes against the headers before anything of that size is made, hashes against
koff.json, no link that leads out of it.

vLLM knows a LoRA by the path of its folder. It reads the folder again whenever it has forgotten the
adapter, and takes what it computed under that path for valid as long as it runs. So a memory is
copied to a folder of its own, named by its content: it cannot change or vanish under a running
server, and a memory that is trained again is another one. A memory without a LoRA gets one of zeros
there, since by a LoRA vLLM tells the memories apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

MARKER, FORMAT = "koff.json", 1
# A new version on its way into place; until it is there, it is the one that counts.
COMMITTED = ".koff-committed"
# The fields of koff.json under its checksum.
SEALED = "format config memories dense_widths widths kept sparsity backbone_sha256 files".split()
# Backbones whose layers differ in width: model_type -> where vLLM finds its model of the family.
NARROW = {
    "koff_llama": "koff_vllm.models:KoffLlamaForCausalLM",
    "koff_qwen2": "koff_vllm.models:KoffQwen2ForCausalLM",
    "koff_qwen3": "koff_vllm.models:KoffQwen3ForCausalLM",
    "koff_mistral": "koff_vllm.models:KoffMistralForCausalLM",
    "koff_granite": "koff_vllm.models:KoffGraniteForCausalLM",
    "koff_phi3": "koff_vllm.models:KoffPhi3ForCausalLM",
    "koff_qwen3_5_text": "koff_vllm.qwen3_5:KoffQwen3_5ForCausalLM",
    "koff_olmo2": "koff_vllm.transformers_models:KoffOlmo2ForCausalLM",
    "koff_smollm3": "koff_vllm.transformers_models:KoffSmolLM3ForCausalLM",
}
# The families with recurrent layers. vLLM keeps their state beside keys and values, and then takes
# no KV connector; what a memory has learned of such a state has no way in.
RECURRENT = ("qwen3_5_text", "koff_qwen3_5_text")
# All linear layers of a decoder layer, which are all that a memory's LoRA may be on; some families
# have the three of attention, or gate and up, in one. Those of a recurrent layer come last.
LINEARS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
LINEARS += ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
LINEARS += ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
# Beside each copied memory: what the other processes of vLLM need to know of it.
STAGED, KV_FILE = "koff_vllm.json", "kv.safetensors"

_WEIGHTS = re.compile(r"model[A-Za-z0-9_-]*\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PART = r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}"
_PLAIN = re.compile(rf"{_PART}(/{_PART}){{0,4}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FLOATING = ("F16", "BF16", "F32", "F64")
_MOST_JSON = 1 << 26  # Python's parser needs many times a file's size
_BLOCK = 1 << 22
_CACHE = "prompt_embeddings"  # PEFT's name of the one tensor of a CARTRIDGE
# Settings of PEFT under which an adapter does not compute W + alpha / r * B A. koff writes none of
# them, and vLLM ignores some.
_VARIANTS = (
    "use_rslora use_dora use_qalora lora_bias rank_pattern alpha_pattern modules_to_save "
    "layers_to_transform fan_in_fan_out trainable_token_indices target_parameters "
    "layer_replication alora_invocation_tokens"
).split()


@dataclass(frozen=True)
class StagedMemory:
    """A memory as it lies ready for vLLM.

    Args:
        name: in the koff folder.
        digest: sha256 over the names and hashes of its files, one of which names its backbone.
        backbone_sha256: of the backbone that it was trained with.
        num_tokens: P, the number of learned keys; 0 without a KV part.
        num_layers, num_heads, head_dim: of the learned keys.
        linears: names of the linear layers that its LoRA is on; empty without a LoRA.
        files: name -> sha256 of what lies in its folder.
    """

    name: str
    digest: str
    backbone_sha256: str
    num_tokens: int
    num_layers: int
    num_heads: int
    head_dim: int
    linears: list[str]
    files: dict[str, str]

    @property
    def label(self) -> str:
        """A name that no other content has: "fr@0123456789ab"."""
        return label_of(self.name, self.digest)

    @property
    def lora_id(self) -> int:
        """vLLM's number of the adapter, the same in every process: 60 bits of the digest."""
        return int(self.digest[:15], 16) + 1  # 0 is no adapter


def label_of(name: str, digest: str) -> str:
    """Return "fr@0123456789ab" for a memory's name and digest."""
    return f"{name}@{digest[:12]}"


class SavedModel:
    """A folder that ``koff.save`` wrote.

    Args:
        directory: of the saved model. If a save was interrupted after its commit, the complete new
            version inside it is read.

    Attributes:
        directory: as it was given.
        path: where the files are now.
        backbone_sha256: over the names and hashes of the weight files.
        memories: name -> digest, in order.
        files: name -> sha256 of every file that was saved.

    Raises:
        FileNotFoundError, ValueError: no saved model, or a koff.json that is not as it was saved.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self.directory = directory.parent if directory.name == COMMITTED else directory
        committed = self.directory / COMMITTED
        whole = committed.is_dir() and not committed.is_symlink()
        self.path = committed if whole else self.directory
        if not (self.path / MARKER).is_file():
            got = "a folder without koff.json" if self.directory.is_dir() else "no folder there"
            raise FileNotFoundError(
                f"koff_vllm: {self.directory} must be a model that koff.save wrote, got {got}; "
                "correct the path"
            )
        values = self._json(MARKER)
        if type(values.get("format")) is not int or values["format"] != FORMAT:  # True == 1
            raise ValueError(
                f"koff_vllm: the format version must be {FORMAT}, got {values.get('format')!r}; "
                "update koff"
            )
        sealed = {name: values.get(name) for name in SEALED}
        seal = hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
        if values.get("checksum") != seal:
            raise _damaged(f"{MARKER} must match its checksum, got another content")
        names, files = sealed["memories"], sealed["files"]
        if not isinstance(names, list) or not all(
            isinstance(name, str) and _NAME.fullmatch(name) for name in names
        ):
            raise _damaged(f"'memories' in {MARKER} must be a list of names, got {names!r:.80}")
        if not isinstance(files, dict) or not all(
            _PLAIN.fullmatch(name) and isinstance(sha, str) and _SHA256.fullmatch(sha)
            for name, sha in files.items()
        ):
            raise _damaged(f"'files' in {MARKER} must be file names and their sha256, got others")
        self.files: dict[str, str] = files
        self.backbone_sha256 = self._digest(_WEIGHTS.fullmatch)
        if sealed["backbone_sha256"] != self.backbone_sha256:
            raise _damaged(f"'backbone_sha256' in {MARKER} must fit its weight files, got another")
        self.memories = {
            name: self._digest(lambda file, name=name: file.startswith(f"memories/{name}/"))
            for name in names
        }

    def verify(self) -> None:
        """Compare the hashes of backbone and tokenizer with koff.json; it reads them once.

        Raises:
            FileNotFoundError, ValueError: a missing or changed file.
        """
        free = ("memories/", "README.md")  # verified when staged; a card may be edited
        for name in sorted({*self.files, "config.json"}):
            if not name.startswith(free) and not name.endswith(".py"):
                self._checked(name)

    def check_family(self) -> None:
        """Refuse a backbone that vLLM has no model for, and memories that have no way into it.

        Raises:
            ValueError: layers of different widths in a family without a narrow model; or learned
                keys and states for a family with recurrent layers.
        """
        got = self._checked_json("config.json").get("model_type")
        if isinstance(got, str) and got.startswith("koff_") and got not in NARROW:
            raise ValueError(
                f"koff_vllm: layers of different widths must be of {', '.join(NARROW)}, got {got}; "
                "prune to equal widths (per_layer='uniform'), which vLLM serves of all families"
            )
        for name in self.memories if self.is_recurrent() else ():
            place = f"memories/{name}/"
            own = {file for file in self.files if file.startswith(place)}
            if all(f.startswith(f"{place}lora/") or f == f"{place}memory.json" for f in own):
                continue
            raise ValueError(
                f"koff_vllm: memories for {got} must be LoRA alone, got learned keys and states in "
                f"{name!r}: vLLM takes none beside recurrent layers; train with kv: null, or "
                "serve it by koff.load and generate"
            )

    def is_recurrent(self) -> bool:
        """Whether the backbone has recurrent layers."""
        return self._checked_json("config.json").get("model_type") in RECURRENT

    def rank(self, name: str) -> int:
        """Return the rank of a memory's LoRA; 1, that of zeros, if it has none."""
        config = f"memories/{name}/lora/adapter_config.json"
        return self._lora_settings(config)["r"] if config in self.files else 1

    def stage(self, name: str) -> tuple[StagedMemory, Path]:
        """Copy a memory to where vLLM finds it, unless it lies there.

        Args:
            name: of the memory.

        Returns:
            (what it is, the folder of its LoRA).

        Raises:
            KeyError, FileNotFoundError, ValueError: no such memory, a damaged one, or one of
                another backbone.
        """
        if name not in self.memories:
            raise KeyError(
                f"koff_vllm: the memory must be one of {list(self.memories)}, got {name!r}; "
                "correct the name"
            )
        digest = self.memories[name]
        target = stage_root() / label_of(name, digest)
        staged = _whole(target)
        if staged is None or staged.digest != digest:
            target.parent.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
            try:
                staged = self._copy(name, new)
                if _whole(target) != staged:  # unless another process was faster
                    shutil.rmtree(target, ignore_errors=True)  # what is left of a damaged one
                    new.rename(target)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return staged, target / "lora"

    def _copy(self, name: str, folder: Path) -> StagedMemory:
        """Copy a memory's files into a new folder, each after it has been looked at."""
        place = f"memories/{name}"
        facts = self._checked_json(f"{place}/memory.json")
        if facts.get("backbone_sha256") != self.backbone_sha256:
            raise ValueError(
                f"koff_vllm: memory {name!r} must belong to this backbone, "
                f"got {facts.get('backbone_sha256')}; a memory works only on the backbone it was "
                "trained with"
            )
        adapter = ("adapter_config.json", "adapter_model.safetensors")
        known = {f"{place}/{part}/{file}" for part in ("lora", "kv") for file in adapter}
        own = {file for file in self.files if file.startswith(f"{place}/")}
        others = sorted(own - known - {f"{place}/memory.json"})
        if others:  # koff's caches of recurrent layers, for one
            raise ValueError(
                f"koff_vllm: memory {name!r} must consist of a LoRA and learned keys, got "
                f"{others[0]} too; vLLM cannot serve it"
            )
        lora, kv = (f"{place}/{part}/adapter_model.safetensors" for part in ("lora", "kv"))
        if not self.files.keys() & {lora, kv}:
            raise _damaged(f"memory {name!r} must have a LoRA or a KV part, got none")
        (folder / "lora").mkdir()
        weights, num_tokens, linears = folder / "lora/adapter_model.safetensors", 0, []
        layers, heads, width = self._kv_shape()
        if lora in self.files:
            settings = self._lora_settings(f"{place}/lora/adapter_config.json")
            linears = self._check_lora(lora, settings["r"])
            shutil.copyfile(self._checked(lora), weights)
            _check_finite(weights, lora)
        else:
            settings = self._write_zeros(weights)
        text = json.dumps(settings)
        (folder / "lora/adapter_config.json").write_text(text, encoding="utf-8")
        if kv in self.files:
            values = self._checked_json(f"{place}/kv/adapter_config.json")
            num_tokens = values.get("num_virtual_tokens")
            if values.get("peft_type") != "CARTRIDGE" or not _is_size(num_tokens):
                raise _damaged(f"{place}/kv must be a CARTRIDGE of at least one token, got another")
            want = {_CACHE: (num_tokens, 2 * layers * heads * width)}
            got = self._header(kv)
            if got != want:
                raise ValueError(
                    f"koff_vllm: the learned cache of memory {name!r} must be {want}, got {got}; "
                    f"this model has {layers} layers, {heads} kv heads and head_dim {width}"
                )
            shutil.copyfile(self._checked(kv), folder / KV_FILE)
            _check_finite(folder / KV_FILE, kv)
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        staged = StagedMemory(
            name=name,
            digest=self.memories[name],
            backbone_sha256=self.backbone_sha256,
            num_tokens=num_tokens,
            num_layers=layers,
            num_heads=heads,
            head_dim=width,
            linears=linears,
            files={path.relative_to(folder).as_posix(): _sha256(path) for path in found},
        )
        (folder / STAGED).write_text(json.dumps(asdict(staged)), encoding="utf-8")
        return staged

    def _lora_settings(self, name: str) -> dict[str, Any]:
        """The settings of a plain LoRA, and no others."""
        values = self._checked_json(name)
        rank, alpha, targets = (values.get(key) for key in ("r", "lora_alpha", "target_modules"))
        variants = [key for key in _VARIANTS if values.get(key)]
        if values.get("peft_type") != "LORA" or values.get("bias") != "none" or variants:
            raise ValueError(
                f"koff_vllm: {name} must describe a plain LoRA, "
                f"got {variants or values.get('peft_type')}; merge or retrain it"
            )
        is_list = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        if not _is_size(rank) or type(alpha) not in (int, float) or not is_list:
            raise _damaged(
                f"{name} must have r, lora_alpha and target_modules, got {rank!r}, {alpha!r} and "
                f"{targets!r:.80}"
            )
        kept = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"} | kept

    def _check_lora(self, name: str, rank: int) -> list[str]:
        """Compare each A [r, in] and B [out, r] with its weight [out, in] in the backbone; return
        the names of the linear layers that they are on."""
        backbone, linears = self._backbone_header(), set()
        for key, shape in self._header(name).items():
            path, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
            linear = path.rpartition(".")[2]
            if linear not in LINEARS:  # vLLM would leave it out, and say nothing
                raise ValueError(
                    f"koff_vllm: a LoRA must be on {', '.join(LINEARS)}, got one on {path} in "
                    f"{name}; retrain the memory"
                )
            weight = backbone.get(f"{path}.weight", ())
            want = {"A.weight": (rank, *weight[1:]), "B.weight": (*weight[:1], rank)}.get(part)
            if len(weight) != 2 or shape != want:
                raise ValueError(
                    f"koff_vllm: {key} must have the shape {want} on this backbone, got {shape}; "
                    "copy the folder again"
                )
            linears.add(linear)
        return sorted(linears)

    def _write_zeros(self, path: Path) -> dict[str, Any]:
        """Write a LoRA that changes nothing, on one matrix of the backbone; its settings."""
        import torch
        from safetensors.torch import save_file

        weights = self._backbone_header()
        key = min(name for name in weights if name.endswith(".o_proj.weight"))
        stem, (width_out, width_in) = key.removesuffix(".weight"), weights[key]
        tensors = {"A": torch.zeros(1, width_in), "B": torch.zeros(width_out, 1)}
        named = {f"base_model.model.{stem}.lora_{part}.weight": t for part, t in tensors.items()}
        save_file(named, str(path), metadata={"format": "pt"})
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
        return settings | {"r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]}

    def _kv_shape(self) -> tuple[int, int, int]:
        """(layers, kv heads, head_dim) of the backbone."""
        config = self._checked_json("config.json")
        heads = config.get("num_attention_heads")
        if not _is_size(heads) or not _is_size(config.get("hidden_size")):
            raise _damaged("config.json must have num_attention_heads and hidden_size, got neither")
        layers, kv_heads = config.get("num_hidden_layers"), config.get("num_key_value_heads", heads)
        width = config.get("head_dim") or config["hidden_size"] // heads
        if not all(map(_is_size, (layers, kv_heads, width))):
            raise _damaged(
                "config.json must have layers, heads and head_dim of at least 1, got less"
            )
        return layers, kv_heads, width

    def _digest(self, chosen: Any) -> str:
        lines = (f"{name} {self.files[name]}\n" for name in sorted(self.files) if chosen(name))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    # ---- one file ----

    def _file(self, name: str) -> Path:
        """A file of the folder; no link leads out of it, but to the blobs of the hub's cache."""
        path, root = self.path / name, self.path.resolve()
        if not path.is_file():
            raise FileNotFoundError(
                f"koff_vllm: {name} must be there, got no such file; check {self.directory}"
            )
        roots, repo = [root], root.parent.parent
        if root.parent.name == "snapshots" and repo.name.startswith("models--"):
            roots.append(repo / "blobs")
        if not any(path.resolve().is_relative_to(place) for place in roots):
            raise ValueError(
                f"koff_vllm: {name} must lie in its folder, got a link to {path.resolve()}; copy "
                "the folder again, with its files instead of links"
            )
        return path

    def _checked(self, name: str) -> Path:
        """A file whose sha256 is the one that koff.json recorded."""
        path = self._file(name)
        wanted, got = self.files.get(name), _sha256(path)
        if got != wanted:
            raise _damaged(f"{name} must have the sha256 {wanted}, got {got}")
        return path

    def _json(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        if path.stat().st_size > _MOST_JSON:
            raise _damaged(f"{name} must have at most {_MOST_JSON} bytes, got more")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # "[[[[..." recurses
            raise _damaged(f"{name} must be JSON, got {error}") from None
        if not isinstance(values, dict):
            raise _damaged(f"{name} must hold a JSON object, got {type(values).__name__}")
        return values

    def _checked_json(self, name: str) -> dict[str, Any]:
        self._checked(name)
        return self._json(name)

    def _header(self, name: str) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor of a safetensors file, and no data. The library has checked
        that the tensors fill the file, so what the header claims is there."""
        try:
            with safe_open(str(self._file(name)), framework="np") as file:  # "pt" imports torch
                slices = {key: file.get_slice(key) for key in file.keys()}
                dtypes = {key: part.get_dtype() for key, part in slices.items()}
                shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        except Exception as error:  # the library's own, of several types
            raise _damaged(f"{name} must be a safetensors file, got {error}") from error
        wrong = {key: dtype for key, dtype in dtypes.items() if dtype not in _FLOATING}
        if wrong:
            raise _damaged(f"the dtypes in {name} must be among {_FLOATING}, got {wrong!s:.80}")
        return shapes

    def _backbone_header(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name in self.files:
            if _WEIGHTS.fullmatch(name):
                found |= self._header(name)
        return found


def staged_memory(lora_path: str) -> StagedMemory | None:
    """Return what a LoRA's folder holds if ``SavedModel.stage`` made it; None for any other.

    Args:
        lora_path: of a ``LoRARequest``. Its content is looked at once in a process.
    """
    known = _STAGED.get(lora_path)
    if known is None:
        known = _whole(Path(lora_path).parent) if Path(lora_path).name == "lora" else None
        if known is not None:  # a folder that is none yet may become one
            _STAGED[lora_path] = known
    return known


_STAGED: dict[str, StagedMemory] = {}


def is_inside_a_memory(lora_path: str) -> bool:
    """Whether a LoRA's folder is the half of a memory that also has learned keys."""
    beside = Path(lora_path).parent
    return (beside / "memory.json").is_file() and (beside / "kv").is_dir()


def stage_root() -> Path:
    """Return where memories are laid out: $KOFF_CACHE/vllm, or in the user's cache directory."""
    cache = os.environ.get("KOFF_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(cache) if cache else Path(base) / "koff").absolute() / "vllm"


def _whole(folder: Path) -> StagedMemory | None:
    """A staged memory whose files are all there, as they were written; None for anything else."""
    try:
        values = json.loads((folder / STAGED).read_text(encoding="utf-8"))
        staged = StagedMemory(**values)
        whole = all(_sha256(folder / name) == sha for name, sha in staged.files.items())
        return staged if whole and folder.name == staged.label else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _check_finite(path: Path, name: str) -> None:
    """Refuse NaN and infinity: one poisons every row that uses the memory."""
    from safetensors.torch import load_file

    for key, tensor in load_file(str(path)).items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"koff_vllm: {key} in {name} must be finite, got NaN or infinity; train it again"
            )


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _damaged(fault: str) -> ValueError:
    return ValueError(f"koff_vllm: {fault}; copy the folder again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
