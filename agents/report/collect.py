"""From a run folder to the page: what is there is shown, what is missing or damaged is left out and said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from agents import stats
from agents.doctor import diagnose
from agents.report.episodes import BLOCK, Entry, Scales, TokenTable, clip, detail, fits, rounded, table_row
from agents.report.gallery import Gallery
from agents.report.render import Page
from tools.calls import FORMATS, HERMES

TABLE = ("step", "level", "task", "reward", "calls", "length", "stop", "split", "correct", "member", "unit")
TRIED = 16
"""Trajectories on which the tokenizer is tried."""
HEADING = ("env", "algo", "model", "seed", "level")
"""Options that stand under the title."""


@dataclass(frozen=True)
class RunData:
    """A run folder as read: plain data, whatever state the run is in."""

    name: str
    """Name of the folder."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Resolved options; empty where there is no config.json."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """One mapping a step."""
    evals: Sequence[Mapping[str, Any]] = ()
    """One mapping an evaluation, as `EvalResult.as_dict` writes it."""
    notes: tuple[str, ...] = ()
    """What could not be read."""


def read(run: Path) -> RunData:
    """Everything but the trajectories."""
    notes: list[str] = []
    config: dict[str, Any] = {}
    if (run / "config.json").is_file():
        try:
            loaded = json.loads((run / "config.json").read_text(encoding="utf-8", errors="replace"))
            config = loaded if isinstance(loaded, dict) else {}
        except (ValueError, RecursionError):
            notes.append("config.json cannot be read")
    metrics = _lines(run / "metrics.jsonl", notes)
    evals = [e for e in _lines(run / "eval.jsonl", notes) if _interval(e.get("success")) is not None]
    return RunData(run.resolve().name, config, metrics, evals, tuple(notes))


def page(
    run: RunData,
    entries: Iterable[Entry],
    total: int,
    tokenizer: Any | None,
    command: str,
    notes: Sequence[str] = (),
) -> Page:
    """The report of a run.

    Args:
        run: everything but the trajectories.
        entries: the trajectories to keep.
        total: how many the run has.
        tokenizer: tells the tokens' texts; None shows ids.
        command: what writes the report, for its foot.
        notes: what should be said of the trajectories; looked at after the last of them was taken.
    """
    rest = iter(entries)
    first, said = list(islice(rest, TRIED)), list(run.notes)
    if tokenizer is not None and not fits(tokenizer, (entry.trajectory for entry in first)):
        tokenizer = None
        said.append("the tokenizer at hand is not the run's, so tokens are shown as ids")
    tokens, scales, gallery = TokenTable(tokenizer), Scales(), Gallery()
    named = str(_find(run.config, "call_format"))
    call_format = named if named in FORMATS else HERMES.name
    units: dict[tuple[Any, ...], int] = {}
    rows: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    for entry in chain(first, rest):
        t = entry.trajectory
        unit = units.setdefault((entry.step, t.split, t.group, t.task_id), len(units))
        rows.append(table_row(entry, unit))
        details.append(detail(entry, tokens, scales, gallery, call_format))
    if gallery.left_out:
        said.append(f"{gallery.left_out} images are left out for their size")
    steps, columns = _curves(run.metrics)
    summary = {
        "metrics": {"steps": steps, "columns": columns},
        "evals": [_evaluation(e, run) for e in run.evals],
        "gain": _gain(run.evals),
        "findings": [asdict(f) for f in diagnose(run.metrics, run.evals)],
        "config": list(flatten(run.config)),
        "table": {name: [row[name] for row in rows] for name in TABLE}
        | {"count": len(rows), "total": total, "note": _note(len(rows), total, [*said, *notes])},
        "columns": sorted(scales.specs(), key=lambda c: _column_rank(c["name"])),
        "tokens": tokens.texts(),
        "ids": tokens.ids,
        "named": tokens.named,
        "special": tokens.special(),
        "block_size": BLOCK,
    }
    blocks = [details[i : i + BLOCK] for i in range(0, len(details), BLOCK)]
    written = time.strftime("%Y-%m-%d %H:%M")
    foot = f"Written {written} by {command}; nothing is fetched."
    return Page(run.name, _heading(run), summary, blocks, foot, gallery.images)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested options as dotted names and short texts."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", clip(json.dumps(value) if not isinstance(value, str) else value, 400)[0]


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; lines that are none are counted in the notes."""
    if not path.is_file():
        return []
    out, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            out.append(value)
        elif line.strip():
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged} damaged lines left out")
    return out


def _number(value: Any) -> float | int | None:
    """A finite number as it is shown; None for anything else."""
    return rounded(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _interval(value: Any) -> list[float | int | None] | None:
    """Mean, low and high; None where it is not three numbers."""
    numbers = [_number(v) for v in value] if isinstance(value, list) else []
    return numbers if len(numbers) == 3 and None not in numbers else None


def _curves(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[Any]]]:
    """Steps and, by name, every metric that is a number somewhere."""
    known = [_number(row.get("step")) for row in metrics]
    steps = [i if step is None else int(step) for i, step in enumerate(known)]
    names = dict.fromkeys(name for row in metrics for name in row if name != "step")
    columns = {}
    for name in names:
        values = [_number(row.get(name)) for row in metrics]
        if any(v is not None for v in values):
            columns[name] = values
    return steps, columns


def _evaluation(record: Mapping[str, Any], run: RunData) -> dict[str, Any]:
    """What the table and the success curve need of one evaluation."""
    level, env = record.get("level"), _find(run.config, "env")
    about = [clip(record[key], 80)[0] for key in ("env", "split") if record.get(key)]
    about += [f"level {clip(level, 40)[0]}"] if level is not None else []
    steps = _curves(run.metrics)[0]
    guess = {"before": min(steps, default=None), "after": max(steps, default=None)}
    label = clip(record.get("label") or "", 80)[0]
    step = _number(record.get("step"))
    shown: dict[str, Any] = {
        "label": label,
        "about": ", ".join(about),
        "step": guess.get(label) if step is None else step,
        "pass_at": _pass_at(record.get("pass_at")),
        "tool_calls": _interval(record.get("tool_calls")) or [None, None, None],
        "marked": bool(record.get("marked")),
        "levels": _levels(record.get("levels")),
        "main": str(level) == str(_find(run.config, "level")) and env in (None, record.get("env")),
    }
    return _numbers(record) | shown


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """The plain numbers that an evaluation and one of its levels have in common."""
    names = ("productivity", "episodes", "failure_share")
    return {"success": _interval(record.get("success"))} | {n: _number(record.get(n)) for n in names}


def _pass_at(value: Any) -> dict[str, Any]:
    pairs = value.items() if isinstance(value, dict) else ()
    return {str(k): interval for k, v in pairs if (interval := _interval(v)) is not None}


def _levels(value: Any) -> list[dict[str, Any]]:
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return [
        _numbers(row) | {"level": clip(row.get("level"), 40)[0], "tool_calls": _number(row.get("tool_calls"))}
        for row in rows
        if _interval(row.get("success")) is not None
    ]


def _gain(evals: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Paired difference of success, after less before, where both were played on the same tasks."""
    by_label = {str(e.get("label")): e for e in evals}
    before, after = by_label.get("before"), by_label.get("after")
    if before is None or after is None or not before.get("tasks_key"):
        return None
    if before.get("tasks_key") != after.get("tasks_key"):
        return None
    try:
        return list(stats.paired_difference(after["correct"], before["correct"]))
    except (KeyError, ValueError, TypeError):
        return None  # a record that somebody else wrote


def _note(shown: int, total: int, notes: Sequence[str]) -> str:
    kept = f"{shown} of {total}, whole groups spread over the steps" if shown < total else ""
    return "; ".join([*([kept] if kept else []), *notes])


def _heading(run: RunData) -> list[tuple[str, str]]:
    facts = [
        (name, clip(_find(run.config, name), 120)[0]) for name in HEADING if _find(run.config, name) not in (None, "")
    ]
    return facts


def _find(config: Mapping[str, Any], name: str) -> Any:
    """An option by name, at the top or one level down."""
    if name in config:
        return config[name]
    inner = (value for value in config.values() if isinstance(value, Mapping))
    return next((value[name] for value in inner if name in value), None)


def _column_rank(name: str) -> tuple[int, str]:
    order = ("logp", "adv", "entropy", "mask", "version")
    return (order.index(name) if name in order else 2, name)
