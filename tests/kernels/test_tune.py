"""koffkernels.tune and the tables it writes: a dry run on the CPU, and what routes make of them."""

import json

import pytest
import torch

import koffkernels
from koffkernels import routes, tune
from koffkernels.clock import WallClock

GPU = "Some GPU 80GB"
CUDA = torch.device("cuda", 0)
TINY = tune.ModelShape(64, (96, 128), 2, 1, 64)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A cache and a folder of shipped tables of each test's own, and a GPU by name."""
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(routes, "FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(routes, "_gpu", lambda index: GPU)
    routes.forget()
    yield
    routes.forget()


def row(op="gated_mlp", m=16, k=4096, n=11904, route="fused", **other):
    return {
        "op": op,
        "pass": "forward",
        "m": m,
        "k": k,
        "n": n,
        "r": 16,
        "mixed": False,
        "dtype": "bf16",
        "route": route,
        "config": None,
        "us": 10.0,
        "usual_us": 11.0,
        **routes.versions(),
        **other,
    }


def chosen(op="gated_mlp", m=16, k=4096, n=11904, mixed=False, dtype=torch.bfloat16):
    routes.forget()
    return routes.choose(routes.Shape(op, "forward", m, k, n, dtype, mixed), CUDA)


def own(*rows):
    tune.write(routes.own_table_path(GPU), GPU, list(rows))


def shipped(*rows):
    tune.write(routes.table_path(GPU), GPU, list(rows))


def dry(keys, path, until=None):
    """Tune on the CPU, at tiny sizes and by plain torch: routes are chosen and ignored."""
    machine = tune.Machine(torch.device("cpu"), torch.bfloat16, WallClock(), 0)
    left = iter(range(until if until is not None else 1000))
    with koffkernels.force_backend("torch"):
        return tune.tune(machine, keys, path, GPU, lambda: next(left, None) is None)


def tiny_keys():
    keys = tune.keys_of([TINY], rank=4)
    few = {"lora_linear": {}, "gated_mlp": {}, "prefix_attention": {"n": 4}}
    return list(dict.fromkeys(key._replace(m=4, **few[key.op]) for key in keys))


def test_tune_measures_every_kind_of_shape_and_keeps_the_fastest(tmp_path, capsys):
    keys, path = tiny_keys(), tmp_path / "table.json"
    rows = dry(keys, path)
    assert {(key.op, key.direction, key.mixed) for key in keys} >= {
        (op, direction, False)
        for op in ("gated_mlp", "lora_linear", "prefix_attention")
        for direction in ("forward", "backward")
    }
    assert [(row["op"], row["pass"], row["k"]) for row in rows] == [
        (key.op, key.direction, key.k) for key in keys
    ]
    assert all(0 < row["us"] and row["us"] <= row["usual_us"] / tune.MARGIN for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(keys) and f"{len(keys)}/{len(keys)}" in printed[-1]


def test_tune_down_is_a_linear_layer_of_its_own():
    wanted = {("lora_linear", width, 64) for width in TINY.widths}
    assert wanted <= {(key.op, key.k, key.n) for key in tune.keys_of([TINY])}


QKV = 64 * (2 + 1 + 1)  # TINY's outputs of q, k and v side by side


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mixed", [False, True])
def test_tune_measures_q_k_and_v_as_they_run(direction, mixed, monkeypatch):
    """Together, at their own widths, with memory ids and without; and none of them alone."""
    k, n = (64, QKV) if direction == "forward" else (QKV, 64)
    found = [
        key
        for key in tune.keys_of([TINY], rank=4)
        if key.op == "lora_linear" and (key.direction, key.mixed) == (direction, mixed)
    ]
    together = [key for key in found if key.heads]
    assert {key[3:] for key in together} == {(k, n, 4, mixed, 2, 1)}
    assert {key.m for key in together} == {key.m for key in found}
    alone = {(key.k, key.n) if direction == "forward" else (key.n, key.k) for key in found}
    assert alone - {(64, QKV)} == {(96, 64), (128, 64)}  # down of two widths; o is as wide as one

    seen, real = [], tune.lora_linears

    def spy(x, weights, **other):
        ids = other["memory_ids"]
        seen.append((x.numel() // x.shape[-1], [(*w.shape,) for w in weights], ids is not None))
        assert [part.b.shape[:2] for part in other["lora"]] == [
            (8 if mixed else 1, len(w)) for w in weights
        ]
        return real(x, weights, **other)

    monkeypatch.setattr(tune, "lora_linears", spy)
    machine = tune.Machine(torch.device("cpu"), torch.bfloat16, WallClock(), 0)
    rows = tune.measure_key(machine, together[0]._replace(m=16))
    assert seen and all(call == (16, [(128, 64), (64, 64), (64, 64)], mixed) for call in seen)
    other = "fused" if direction == "backward" else "decode"
    assert {row["route"] for row in rows} == {"vendor", other}
    assert not [row for row in rows if "error" in row]


def test_tune_that_is_cut_goes_on_where_it_stopped(tmp_path, capsys):
    keys, path = tiny_keys()[:4], tmp_path / "table.json"
    before = dry(keys, path, until=2)
    assert len(before) == 2 and "2 shapes left" in capsys.readouterr().out
    machine = tune.Machine(torch.device("cpu"), torch.bfloat16, WallClock(), 0)
    todo = tune.missing(machine, keys, path)
    assert todo == keys[2:]
    after = dry(todo, path)
    assert after[:2] == before and len(after) == 4
    assert tune.missing(machine, keys, path) == []


def test_tune_killed_while_it_writes_leaves_the_table_before(tmp_path, monkeypatch):
    keys, path = tiny_keys()[:2], tmp_path / "table.json"
    before = dry(keys[:1], path)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        dry(keys[1:], path)
    assert routes.read(path) == before


def test_tune_measures_again_under_other_versions(tmp_path):
    keys, path = tiny_keys()[:1], tmp_path / "table.json"
    (old,) = dry(keys, path)
    tune.write(path, GPU, [old | {"triton": "1.0"}])
    machine = tune.Machine(torch.device("cpu"), torch.bfloat16, WallClock(), 0)
    assert tune.missing(machine, keys, path) == keys
    assert len(dry(keys, path)) == 2  # the other version's row stays


def test_tune_an_error_of_one_candidate_costs_only_it(tmp_path, monkeypatch):
    def broken(x, weights, **other):
        forced = routes._FORCED_FOR["lora_linear"]
        if forced.name == "decode":
            raise RuntimeError("out of shared memory")
        return [x @ weight.t() for weight in weights]

    monkeypatch.setattr(tune, "lora_linears", broken)
    machine = tune.Machine(torch.device("cpu"), torch.bfloat16, WallClock(), 0)
    key = tune.Key("lora_linear", "forward", 4, 64, 96, 4)
    rows = tune.measure_key(machine, key)
    errors = [row for row in rows if "error" in row]
    assert errors and errors[0]["error"] == "RuntimeError: out of shared memory"
    (best,) = tune.winners(rows)
    assert best["route"] == "vendor" and best["usual_us"] is None


def test_tune_another_route_must_beat_the_usual_by_the_margin():
    usual = row(route="decode", us=100.0) | {"usual": True, "heads": 0, "kv_heads": 0}
    vendor = usual | {"route": "vendor", "usual": False}
    assert tune.winners([usual, vendor | {"us": 99.5}])[0]["route"] == "decode"
    assert tune.winners([vendor | {"us": 98.0}, usual])[0]["route"] == "vendor"


def test_tune_candidates():
    key = tune.Key("lora_linear", "forward", 16, 64, 64, 16)
    few = [c.name for c in tune.candidates(key, 90)]
    assert few[0] == "vendor" and set(few[1:]) == {
        f"decode:{name}" for name in tune.configurations("lora_linear", "forward", "decode", 90)
    }
    for many in (key._replace(m=65), key._replace(direction="backward")):
        assert {c.route for c in tune.candidates(many, 90)} == {"vendor", "fused"}
    mlp = ("gated_mlp", "backward", "fused")
    assert tune.configurations(*mlp, 90) == tune.configurations("lora_linear", *mlp[1:], 90)
    attention = tune.Key("prefix_attention", "forward", 512, 64, 512, 0, heads=4, kv_heads=2)
    names = [c.name for c in tune.candidates(attention, 90)]
    assert names[:3] == ["vendor", "vendor:cudnn", "vendor:flash"] and "fused:128x32" in names


def test_tune_reads_the_sizes_of_a_model(tmp_path):
    config = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = tune.model_shape(tune.read_config(str(tmp_path)))
    assert shape == tune.ModelShape(576, (1536,), 9, 3, 64)
    pruned = config | {"intermediate_sizes": [64, 1536, 128, 128, 256], "head_dim": 32}
    assert tune.model_shape({"text_config": pruned}) == ((576, (64, 256, 1536), 9, 3, 32))
    with pytest.raises(ValueError, match="config.json must have hidden_size"):
        tune.model_shape({"model_type": "mamba"})


def test_tune_a_hub_id_needs_the_hub(monkeypatch):
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install huggingface_hub"):
        tune.read_config("somebody/model")


def test_tune_without_a_gpu_says_so(capsys):
    assert tune.main([]) == 2 and "must be visible" in capsys.readouterr().err


def test_routes_the_users_table_comes_before_the_shipped_one():
    assert chosen() == ("decode", None, f"unmeasured on {GPU}", False)
    shipped(row(route="vendor"))
    assert chosen().name == "vendor"
    own(row(route="fused", config="a", us=50.0))
    assert chosen()[:2] == ("fused", "a")


def test_routes_rows_of_other_versions_count_only_where_there_are_no_others():
    own(row(route="vendor", triton="1.0"))
    assert chosen().name == "vendor"
    shipped(row(route="fused", m=64))
    assert chosen().name == "fused"


def test_routes_a_row_knows_memory_ids():
    own(row(route="vendor"), row(route="fused", mixed=True))
    assert chosen(mixed=True).name == "fused" and chosen().name == "vendor"
    assert chosen(m=32, mixed=True).name == "fused"


def test_routes_a_row_knows_q_k_and_v():
    """A table from before they were one operation still counts, where nothing is nearer."""

    def of(several, n=6144):
        routes.forget()
        shape = routes.Shape("lora_linear", "forward", 16, 4096, n, torch.bfloat16, False, several)
        return routes.choose(shape, CUDA).name

    alone = row("lora_linear", n=4096, route="vendor")
    own(alone)
    assert of(True) == of(False) == "vendor"
    own(alone, row("lora_linear", n=6144, heads=32, kv_heads=8))
    assert of(True) == of(True, 5120) == "fused" and of(False) == of(False, 4096) == "vendor"
    own(row("lora_linear", n=6144, heads=32, kv_heads=8))
    assert of(False) == "fused" and of(False, 1024) == "decode"  # too far
    own(row("prefix_attention", n=4096, heads=32, kv_heads=8, route="vendor"))
    assert chosen("prefix_attention", n=4096).reason.startswith("measured")


def test_routes_a_row_says_nothing_of_what_is_far():
    """Nor of more tokens than the decode kernels take, if it was measured at fewer."""
    own(row(route="fused", m=8192), row(route="vendor", m=1))
    assert chosen(m=4096).name == "fused" and chosen(m=100).name == "vendor"
    assert chosen(m=64, n=64).name == "decode"
    assert chosen(m=64).reason.startswith("unmeasured")
    own(row(route="fused", m=64))
    assert chosen(m=65) == ("vendor", None, f"unmeasured on {GPU}", False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"rows": 3}',
        '{"rows": [1, null, {}]}',
        json.dumps({"rows": [row(route="shell")]}),
        json.dumps({"rows": [row(m=0)]}),
        json.dumps({"rows": [row(config=3)]}),
        json.dumps({"rows": [row(heads="2")]}),
    ],
)
def test_routes_a_broken_table_is_none(text):
    path = routes.own_table_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert chosen() == ("decode", None, f"unmeasured on {GPU}", False)


def test_backends_says_which_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert routes.describe("gated_mlp").startswith("decode kernels up to 64 tokens")
    own(row(), row(m=64))
    shipped(row(op="lora_linear", torch="1.0"))
    routes.forget()
    said = routes.describe("gated_mlp")
    assert said == f"2 routes of {routes.own_table_path(GPU)}; measured on {GPU}"
    said = routes.describe("lora_linear")
    assert said.startswith(f"1 routes of {routes.table_path(GPU)}, measured with torch 1.0 and ")
    assert "run python -m koffkernels.tune" in said


def test_routes_on_rocm_are_the_vendors(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert chosen() == ("vendor", None, f"unmeasured on {GPU}", False)


def test_force_route_of_one_operation():
    with koffkernels.force_route("fused"), koffkernels.force_route("vendor", "gated_mlp"):
        assert chosen().name == "vendor" and chosen("lora_linear").name == "fused"
    assert not routes._FORCED_FOR and routes._FORCED is None
