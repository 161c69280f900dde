"""The folder of a run: what is where, and files that only grow and can be rewound to a checkpoint.

    config.json      the resolved configuration        trajectories/   episodes, compact binary
    metrics.jsonl    one object an iteration           checkpoints/    the last few, atomic
    eval.jsonl       one object an evaluation          model/          save_pretrained export
    report.html      written by agents.view            summary.json    the final numbers
    adapter/         adapters as peft keeps them       base/           what they were trained on, after a warm start
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.cli import UsageError

GROWING = ("metrics.jsonl", "eval.jsonl", "trajectories")
"""Files, or folders of files, that are only appended to while a run goes on."""


class RunFolder:
    """One run's folder, held by one process at a time (an advisory lock, released when the process ends)."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(f"{path} is in use by another process") from error

    @classmethod
    def create(cls, path: Path | None, root: Path, name: str) -> RunFolder:
        """A new folder: `path`, or `root/name-DATE` with a number where that is taken."""
        if path is not None:
            if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
                raise UsageError(f"{path} exists and is not empty; go on with it: --resume {path}, or name another")
            path.mkdir(parents=True, exist_ok=True)
            return cls(path)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            candidate = root / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
            try:
                candidate.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(candidate)
        raise UsageError(f"no free folder name under {root}")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; UsageError where the folder is none."""
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is not the folder of a run: it has no config.json")
        return cls(path)

    def config(self) -> dict[str, Any]:
        """The saved configuration."""
        return read_json(self.path / "config.json")

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def log(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line to `name`; NaN and infinities become null."""
        with (self.path / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def records(self, name: str) -> list[dict[str, Any]]:
        """All whole lines of a JSONL file of this run."""
        return read_jsonl(self.path / name)

    def mark(self) -> dict[str, int]:
        """Sizes of the growing files, flushed to disk: what a checkpoint remembers."""
        sizes = {}
        for file in self._growing():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
            sizes[str(file.relative_to(self.path))] = file.stat().st_size
        return sizes

    def rewind(self, mark: Mapping[str, int]) -> None:
        """Cut the growing files back to a mark; those that did not exist then are deleted."""
        for file in self._growing():
            size = mark.get(str(file.relative_to(self.path)))
            if size is None:
                file.unlink()
            elif file.stat().st_size > size:
                os.truncate(file, size)
        for name, size in mark.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size < size:
                raise UsageError(f"{file} is shorter than when the checkpoint was written; the run cannot be resumed")

    def _growing(self) -> list[Path]:
        files: list[Path] = []
        for name in GROWING:
            path = self.path / name
            files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
            files += [path] if path.is_file() else []
        return files


def write_json(path: Path, value: Any) -> None:
    """Write atomically: beside, flush, rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump(plain(value), stream, indent=2, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UsageError naming the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def plain(value: Any) -> Any:
    """JSON values only; NaN and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
