"""Atomic checkpoints: tensors in safetensors, everything else in JSON, nothing pickled.

A checkpoint is a folder `step-00000010/` with three files. It is written beside its final place, flushed to disk and
renamed, so that a folder of that name is always whole; the manifest repeats size and digest of the other two, so a
copy that was cut short or changed is named instead of loaded.

    manifest.json       format, version, step, {file: [bytes, sha256]}
    state.json          the tree of plain values, with {"$tensor": "0"} where a tensor stands
    tensors.safetensors tensors by number
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.sharding import put

FORMAT, VERSION = "palaestra-checkpoint", 1
_NAME = re.compile(r"step-(\d{8,})$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or used; the message names it and says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    step: int
    """Iterations finished."""
    state: dict[str, Any]
    """The tree that was saved."""
    path: Path
    """Where it came from."""


def pack(tree: Any, tensors: dict[str, Tensor], where: str = "state") -> Any:
    """`tree` as JSON values; tensors go to `tensors`. Exact for ints, floats (also inf, nan) and key types.

    Raises TypeError naming the place of a value that is none of dict, list, tuple, tensor, str, number, bool, None.
    """
    if tree is None or isinstance(tree, (bool, str)) or type(tree) is int:
        return tree
    if type(tree) is float:
        return tree if math.isfinite(tree) else {"$float": repr(tree)}
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(tree, tuple):
        return {"$tuple": [pack(v, tensors, f"{where}[{i}]") for i, v in enumerate(tree)]}
    if isinstance(tree, list):
        return [pack(v, tensors, f"{where}[{i}]") for i, v in enumerate(tree)]
    if isinstance(tree, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in tree):
            return {k: pack(v, tensors, f"{where}.{k}") for k, v in tree.items()}
        pairs = [[pack(k, tensors, where), pack(v, tensors, f"{where}[{k!r}]")] for k, v in tree.items()]
        return {"$dict": pairs}
    raise TypeError(f"{where}: a checkpoint cannot hold a {type(tree).__name__}")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `pack`."""
    if isinstance(tree, list):
        return [unpack(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (key, value), = tree.items()
        if key == "$tensor":
            return tensors[value]
        if key == "$float":
            return float(value)
        if key == "$tuple":
            return tuple(unpack(v, tensors) for v in value)
        if key == "$dict":
            return {unpack(k, tensors): unpack(v, tensors) for k, v in value}
    return {k: unpack(v, tensors) for k, v in tree.items()}


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `folder/step-N` atomically, then delete all but the newest `keep`. Returns its path.

    Raises OSError (a full disk, say) with older checkpoints untouched and no half-written folder left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    work = folder / f".writing-{step:08d}-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    tensors: dict[str, Tensor] = {}
    tree = pack(dict(state), tensors)
    try:
        work.mkdir()
        _write_files(work, step, tree, tensors)
        if final.exists():  # the same step once more: the old folder goes only when the new one is whole
            aside = folder / f".old-{step:08d}-{os.getpid()}"
            os.rename(final, aside)
            os.rename(work, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(work, final)
        _sync(folder)
    except SafetensorError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(f"writing {work / 'tensors.safetensors'}: {error}") from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    for old in steps(folder)[:-keep] if keep > 0 else []:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return final


def _write_files(work: Path, step: int, tree: Any, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, work / "tensors.safetensors")
    (work / "state.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
    files = {}
    for name in ("tensors.safetensors", "state.json"):
        _sync(work / name)
        files[name] = [(work / name).stat().st_size, _digest(work / name)]
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(work / "manifest.json")
    _sync(work)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for p in folder.iterdir() if (m := _NAME.match(p.name)))


def latest(folder: Path) -> Path:
    """The newest checkpoint of a folder; CheckpointError where there is none."""
    found = steps(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint; start the run anew without --resume")
    return folder / f"step-{found[-1]:08d}"


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint folder; CheckpointError says which file is wrong and how."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        whole = manifest["format"] == FORMAT
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint of this program: it has no manifest.json") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged or foreign" + _way_out(path)) from error
    if not whole or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this program reads {FORMAT!r} version {VERSION}"
        )
    try:
        for name in ("tensors.safetensors", "state.json"):
            _verify(path / name, *manifest["files"][name])
        tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "tensors.safetensors")
        return Checkpoint(int(manifest["step"]), unpack(tree, tensors), path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_way_out(path)}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}){_way_out(path)}") from error


def _verify(file: Path, size: int, digest: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file} is truncated: {file.stat().st_size:,} bytes, the manifest says {size:,}")
    if _digest(file) != digest:
        raise CheckpointError(f"{file} was changed after it was written (its SHA-256 differs)")


def _way_out(path: Path) -> str:
    """What to do about a bad checkpoint: name the one before it, if any. Nothing falls back by itself."""
    match = _NAME.match(path.name)
    older = [s for s in steps(path.parent) if match and s < int(match.group(1))]
    if not older:
        return "; there is no older checkpoint beside it"
    return f"; to go on from the one before it, give --from-step {older[-1]}"


@torch.no_grad()
def load_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy saved tensors into a model's own, in place; CheckpointError names the first one that does not fit."""
    for name in own.keys() | state.keys():
        if name not in state or name not in own:
            side = "model" if name in own else "checkpoint"
            raise CheckpointError(f"{path} is of another model: `{name}` is only in the {side}")
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f"{path} is of another model: `{name}` is {tuple(state[name].shape)} there, "
                f"{tuple(own[name].shape)} here"
            )
    for name, tensor in own.items():
        put(tensor, state[name])
