"""Checkpoints: exact round-trips, whole or absent, damage named, a full disk harmless."""

from __future__ import annotations

import json
import math
import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import checkpoint as C
from agents.runfolder import RunFolder, UsageError, read_jsonl

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(max_examples=200, deadline=None)
@given(trees)
def test_plain_trees_come_back_exactly(tree):
    packed = json.loads(json.dumps(C.pack(tree, {}), allow_nan=False))
    assert same(C.unpack(packed, {}), tree)


def state(seed=0):
    draw = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    return {"model": {"w": draw, "tied": draw}, "part": {("a", 1): draw.double(), 7: [draw.half(), draw > 0]},
            "rng": torch.Generator().manual_seed(seed).get_state(), "lr": 0.1, "seen": 10**30}


def test_tensors_come_back_bit_for_bit_and_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        C.save(tmp_path, step, state(step), keep=2)
    assert C.steps(tmp_path) == [4, 5]
    got = C.load(C.latest(tmp_path))
    assert got.step == 5
    assert same(got.state, state(5))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_saving_a_step_again_replaces_it(tmp_path):
    C.save(tmp_path, 1, state(1))
    C.save(tmp_path, 1, state(2))
    assert same(C.load(C.latest(tmp_path)).state, state(2))
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_what_cannot_be_saved_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"state\.part\.f.*function"):
        C.save(tmp_path, 1, {"part": {"f": lambda: 0}})
    assert C.steps(tmp_path) == []


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "empty"])
def test_damage_is_named_and_the_way_out_with_it(tmp_path, name, damage):
    C.save(tmp_path, 1, state(1))
    file = C.save(tmp_path, 2, state(2)) / name
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        file.write_bytes(data[:-2] + b"#" + data[-1:])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"")
    with pytest.raises(C.CheckpointError) as caught:
        C.load(C.latest(tmp_path))
    assert "step-00000002" in str(caught.value)
    if not (name == "manifest.json" and damage == "missing"):
        assert "--from-step 1" in str(caught.value)
    assert same(C.load(tmp_path / "step-00000001").state, state(1))


def test_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "step-00000003"
    path.mkdir()
    torch.save({"w": torch.ones(2)}, path / "pytorch_model.bin")
    with pytest.raises(C.CheckpointError, match=r"no manifest\.json"):
        C.load(path)
    (path / "manifest.json").write_text('{"format": "other", "version": 9}')
    with pytest.raises(C.CheckpointError, match="'other' version 9"):
        C.load(path)
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(C.CheckpointError, match="damaged or foreign"):
        C.load(path)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    with pytest.raises(C.CheckpointError, match=r"`weight` is \(2, 3\) there, \(3, 2\) here"):
        C.load_tensors(torch.nn.Linear(2, 3, bias=False).state_dict(), {"weight": torch.ones(2, 3)}, tmp_path)
    with pytest.raises(C.CheckpointError, match="`bias` is only in the model"):
        C.load_tensors(torch.nn.Linear(2, 3).state_dict(), {"weight": torch.ones(3, 2)}, tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(tmp_path):
    """The kernel refuses to write past a size limit, as a full disk would, in the middle of the tensors."""
    C.save(tmp_path, 1, state(1))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            C.save(tmp_path, 2, {"w": torch.ones(100_000)}, keep=1)
        except OSError:
            code = 42
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert same(C.load(C.latest(tmp_path)).state, state(1))


def test_growing_files_are_rewound_to_the_mark(tmp_path):
    run = RunFolder.create(tmp_path / "run", tmp_path, "x")
    run.log("metrics.jsonl", {"step": 1, "loss": float("nan")})
    mark = run.mark()
    run.log("metrics.jsonl", {"step": 2})
    run.log("eval.jsonl", {"step": 2})
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "torn')
    assert [r["step"] for r in run.records("metrics.jsonl")] == [1, 2]
    run.rewind(mark)
    assert run.records("metrics.jsonl") == [{"step": 1, "loss": None}]
    assert read_jsonl(run.path / "eval.jsonl") == []


def test_one_process_at_a_time(tmp_path):
    run = RunFolder.create(tmp_path / "run", tmp_path, "x")
    with pytest.raises(UsageError, match="in use"):
        RunFolder(run.path)
    run.close()
    RunFolder(run.path).close()
