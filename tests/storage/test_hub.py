"""Hub ids wherever a folder goes: real uploads and downloads, against a hub of our own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import bare
from support.character_tokenizer import make_tokenizer
from support.fake_hub import Hub
from support.models import attached
from support.widths import spread

import koff
from koff.storage import change, push
from koff.storage.files import sha256
from koff.storage.hub import resolve
from koff.storage.manifest import seal_of
from koff.storage.saved_folder import open_saved

pytestmark = pytest.mark.usefixtures("no_real_fsync")

ONLINE = """
import json, sys
from pathlib import Path
import koff, torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
folder, place = Path(sys.argv[1]), Path(sys.argv[2])
first = koff.push_to_hub(folder, "someone/model").rsplit("/", 1)[1]
model = koff.load("someone/model")
ids = torch.arange(3, 12)[None]
logits = {"first": model(ids, memory="keys").logits}
koff.remove_memory(folder, "keys")
(folder / "config.json").touch()
koff.push_to_hub(folder, "someone/model", message="without keys")
names = {"now": koff.load("someone/model").koff.memory_names}
old = koff.load("someone/model", revision=first)
names["before"] = old.koff.memory_names
names["at"] = koff.load(f"someone/model@{first}").koff.memory_names
logits["before"] = old(ids, memory="keys").logits
tokenizer = AutoTokenizer.from_pretrained(folder)
koff.push_to_hub(old, "someone/other", tokenizer=tokenizer, private=True)
logits["other"] = koff.load("someone/other")(ids, memory="keys").logits
save_file({k: v.detach() for k, v in logits.items()}, place / "logits.safetensors")
for wrong in (("someone/none", None), ("someone/model", "nobody")):
    try:
        koff.load(wrong[0], revision=wrong[1])
    except FileNotFoundError as error:
        names[str(wrong)] = str(error)
(place / "names.json").write_text(json.dumps(names))
"""
OFFLINE = """
import json, sys
from pathlib import Path
import koff
from typer.testing import CliRunner
from koff.cli import app
place = Path(sys.argv[1])
out = {"names": koff.load("someone/other").koff.memory_names}
for name, arguments in {
    "info": ["info", "someone/other"],
    "generate": ["generate", "someone/other", "abc", "--memory", "en", "--device", "cpu"],
    "export": ["export", "someone/other", "--merged", "en", "--output", str(place / "exported")],
    "none": ["info", "someone/none"],
    "change": ["remove-memory", "someone/other", "en"],
}.items():
    result = CliRunner().invoke(app, arguments)
    out[name] = (result.exit_code, result.stdout, result.stderr)
print(json.dumps(out))
"""


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


def build(folder, metadata=None):
    changes = {"vocab_size": len(make_tokenizer()), "eos_token_id": None}
    model = spread(attached("llama", changes=changes, target_sparsity=0.4))
    koff.binarize(model, multiple_of=8)
    tokenizer = make_tokenizer(bos_token="<s>")
    small = koff.compact(model, inplace=True)
    return koff.save(small, folder, tokenizer=tokenizer, metadata=metadata)


@pytest.mark.slow
def test_upload_and_download(hub, tmp_path):
    """What was pushed comes back bit for bit, also by revision and offline; a second push removes
    what is gone; neither code nor local paths travel."""
    folder = build(tmp_path / "saved")
    (folder / "checkpoints/checkpoint-1").mkdir(parents=True)
    (folder / "checkpoints/checkpoint-1/a.json").write_text("{}")
    (folder / "train_log.json").write_text(json.dumps({"resumed_from": str(tmp_path)}))
    (folder / "recipe.json").write_text(json.dumps({"root": str(tmp_path), "recipe": {}}))
    (folder / "notes.py").write_text("raise SystemExit")
    ids = torch.arange(3, 12)[None]
    wanted = koff.load(folder)(ids, memory="keys").logits
    env = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    env |= {"PYTHONPATH": str(bare.ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    bare.run(bare.sys.executable, ONLINE, folder, tmp_path, cwd=tmp_path, **env)

    names = json.loads((tmp_path / "names.json").read_text())
    assert names["now"] == ["en", "es"] and names["before"] == names["at"] == ["en", "keys", "es"]
    for wrong in ("('someone/none', None)", "('someone/model', 'nobody')"):
        assert "must be an existing folder or a repository of the hub" in names[wrong]
    for got in load_file(tmp_path / "logits.safetensors").values():
        assert torch.equal(got, wanted)
    files = hub.files["someone/model"]
    assert not [n for n in files if "keys" in n or "checkpoint" in n or "train_log" in n]
    assert [n for n in files if n.endswith(".py")] == ["modeling_koff.py"]
    assert json.loads(files["recipe.json"])["root"] == "."
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    assert json.loads((folder / "recipe.json").read_text())["root"] == str(tmp_path)
    assert not [call for call in hub.log if ".py" in call.split("/resolve/")[-1]]

    out = bare.run(bare.sys.executable, OFFLINE, tmp_path, cwd=tmp_path, PYTHONPATH=str(bare.ROOT))
    out = json.loads(out.splitlines()[-1])
    assert out["names"] == ["en", "keys", "es"]
    for name in ("info", "generate", "export"):
        assert out[name][0] == 0, out[name]
    assert "memory keys" in out["info"][1] and out["generate"][1].startswith("abc")
    assert (tmp_path / "exported/model.safetensors").is_file()
    assert out["none"][0] == 2 and "'someone/none' must be an existing folder or" in out["none"][2]
    assert out["change"][0] == 2 and "must be a saved model, got no folder" in out["change"][2]


def test_what_is_no_saved_model_is_not_pushed(hub, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="must be a saved model, got a folder without"):
        koff.push_to_hub(tmp_path, "someone/model")
    with pytest.raises(ValueError, match="must be compacted, got one with gates"):
        koff.push_to_hub(attached("llama"), "someone/model")
    assert not hub.log


def test_folders_come_before_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone/model").mkdir(parents=True)
    assert str(resolve("someone/model")) == "someone/model"
    for text in ("./a/b", "../a", "/a/b", "a", "a/b/c", "~/a"):
        assert str(resolve(text)) == str(text).removeprefix("./")
    with pytest.raises(ValueError, match="revision must be left out for a folder, got 'x'"):
        koff.load(tmp_path, revision="x")


def test_a_changed_download_is_refused(tmp_path):
    """The cache's links into its blobs are followed; a link elsewhere, or another content, is not
    accepted."""
    folder = build(tmp_path / "saved")
    cache = tmp_path / "models--someone--model"
    snapshot = cache / "snapshots/abc"
    for index, path in enumerate(p for p in folder.rglob("*") if p.is_file()):
        blob, link = cache / f"blobs/{index}", snapshot / path.relative_to(folder)
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(blob)
    ids = torch.arange(3, 12)[None]
    want = koff.load(folder)(ids, memory="en").logits
    assert torch.equal(koff.load(snapshot)(ids, memory="en").logits, want)
    weights = snapshot / "memories/en/lora/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({n: t + 1 for n, t in tensors.items()}, weights.resolve(), {"format": "pt"})
    with pytest.raises(ValueError, match="must have the sha256"):
        koff.load(snapshot)


def test_local_paths_stay_here(tmp_path):
    """In everything that is uploaded the last part of a path is left, hashes and seal agree with
    that, and the folder itself is as before."""
    folder = build(tmp_path / "saved", metadata={"base": f"{tmp_path}/models/base", "note": "a/b"})
    record = {
        "source": "de.jsonl",
        "root": str(tmp_path),
        "data": {"train": f"{tmp_path}/de.jsonl"},
    }
    model = koff.import_memory(koff.load(folder), "de", **parts(folder))
    change.put_memory(folder, model, "de", record)
    splits = {"train": f"{tmp_path}/en/train.jsonl", "test": "en/test.jsonl", "field": "text"}
    recipe = {"model": f"{tmp_path}/models/base", "data": {"en": splits}, "revision": None}
    recipe["general"] = {"math": {"train": f"{tmp_path}/fr/train.jsonl", "weight": 1.0}}
    stored = {"root": str(tmp_path), "recipe": recipe}
    (folder / "recipe.json").write_text(json.dumps(stored))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert any(b"models/base" in data for path, data in before.items() if path.name == "README.md")

    staging = push._portable(folder, tmp_path / "staging")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    files = {p: p.read_bytes() for p in staging.rglob("*") if p.is_file()}
    assert not [path for path, data in files.items() if str(tmp_path).encode() in data]
    pushed = json.loads((staging / "recipe.json").read_text())
    assert pushed["root"] == "." and pushed["recipe"]["model"] == "base"
    assert pushed["recipe"]["data"]["en"] == splits | {"train": "en/train.jsonl"}
    assert pushed["recipe"]["general"]["math"]["train"] == "fr/train.jsonl"
    saved = open_saved(staging)
    manifest = saved.manifest
    assert manifest.base == "base" and manifest.metadata["note"] == "a/b"
    assert manifest.metadata["added"]["de"] == record | {"root": ".", "data": {"train": "de.jsonl"}}
    saved.verify(manifest.files)
    adapter = json.loads((staging / "memories/en/lora/adapter_config.json").read_text())
    # An adapter of a pruned backbone names no base: on the dense one it would be wrong.
    assert adapter["base_model_name_or_path"] is None
    assert "from `base`" in (staging / "README.md").read_text()
    ids = torch.arange(3, 12)[None]
    want = koff.load(folder)(ids, memory="de").logits
    assert torch.equal(koff.load(staging)(ids, memory="de").logits, want)
    assert saved.load_tokenizer() is not None


def parts(folder):
    return {part: folder / "memories/en" / part for part in ("lora", "kv")}


def test_a_card_of_ones_own_and_hub_ids_are_pushed_as_they_are(tmp_path):
    folder = build(tmp_path / "saved", metadata={"base": "someone/base"})
    (folder / "README.md").write_text("see /home/me")
    (folder / "extra.bin").write_text("x")
    facts = json.loads((folder / "koff.json").read_text())
    facts["files"]["extra.bin"] = sha256(folder / "extra.bin")
    facts["checksum"] = seal_of(facts)
    (folder / "koff.json").write_text(json.dumps(facts))
    staging = push._portable(folder, tmp_path / "staging")
    assert (staging / "README.md").read_text() == "see /home/me"
    manifest = open_saved(staging).manifest
    assert manifest.base == "someone/base"
    assert "extra.bin" not in manifest.files  # nothing that is not uploaded is listed


def test_short_names_tell_paths_apart():
    paths = ["/a/en/x", "/a/fr/x", "~/y", r"C:\data\z", "/b/w/", "/q", "/p/q", "/c/d/e.jsonl"]
    texts = ["a/b", "../x", "~ 5 %", "~5 and/or 6", "/", "//", "two\n/lines", "C: d", "y", ""]
    near = {"train": {"train": "d/e.jsonl"}, "/key": 5}
    assert push._short_names([paths, texts, near, None]) == {
        "/a/en/x": "en/x",
        "/a/fr/x": "fr/x",
        "~/y": "y",
        r"C:\data\z": "z",
        "/b/w/": "w",
        "/q": "q",
        "/p/q": "p/q",
        "/c/d/e.jsonl": "c/d/e.jsonl",  # another file than the one named from the data's folder
    }
