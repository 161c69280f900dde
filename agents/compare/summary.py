"""From finished cells to the comparison as plain data: what the table, the picture, the page and the JSON show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from agents import stats
from agents.compare.cells import Cell
from agents.compare.statistics import Draws, band, draws, iqm_interval
from agents.stats import Interval

CURVES = {
    "correct": "success",
    "reward": "reward",
    "tool_calls": "tool calls",
    "length": "generated tokens",
    "entropy": "entropy",
    "kl": "KL per step",
}
"""Metrics of training with a learning curve, and what they are called."""


def summarise(cells: Sequence[Cell], algos: Sequence[str]) -> dict[str, Any]:
    """The comparison. `cells` are done; ValueError where they were evaluated on different tasks."""
    by_algo = [[cell for cell in cells if cell.algo == algo] for algo in algos]
    if len({cell.after["tasks_key"] for cell in cells}) != 1:
        raise ValueError("the runs were evaluated on different tasks; name another folder with --out")
    correct_AST, calls_AST = _values(by_algo, "correct"), _values(by_algo, "calls")
    correct, calls = draws(correct_AST), draws(calls_AST)
    families = [row["level"] for row in cells[0].after["levels"]]
    family_ASK = np.array([[_by_level(c, families) for c in group] for group in by_algo])
    rows = []
    for a, (algo, group) in enumerate(zip(algos, by_algo, strict=True)):
        row: dict[str, Any] = {
            "algo": algo,
            "success": list(_success(correct, correct_AST, a)),
            "iqm": list(iqm_interval(family_ASK[a])),
            "by_seed": [c.after["success"][0] for c in group],
            "by_level": family_ASK[a].mean(0).tolist(),
            "tool_calls": list(_bounded(calls.mean(a), 0.0)),
            "productivity": float(correct_AST[a].sum() / calls_AST[a].sum()) if calls_AST[a].any() else None,
            "spent": _spent(group),
            "marked": any(c.after["marked"] for c in group),
            "curves": _curves(group),
        }
        if a:
            row["difference"] = list(_difference(correct, correct_AST, a, 0))
            ratio = calls.ratio(a, 0)
            row["calls_ratio"] = list(ratio) if ratio is not None else None
        rows.append(row)
    pairs = [[list(_difference(correct, correct_AST, a, b)) for b in range(len(algos))] for a in range(len(algos))]
    first = cells[0]
    return {
        "env": first.config.env, "algos": list(algos), "baseline": algos[0],
        "seeds": len(by_algo[0]), "tasks": correct_AST.shape[2], "steps": first.config.steps,
        "note": first.after.get("note", ""), "levels": families, "warm_start": _warm_start(cells), "rows": rows,
        "pairs": pairs, "options": list(first.options), "runs": [_run(cell) for cell in cells],
    }  # fmt: skip


def _values(by_algo: Sequence[Sequence[Cell]], name: str) -> np.ndarray:
    """Mean of every task's episodes, by recipe and seed."""
    return np.array([[[sum(x) / len(x) for x in cell.after[name]] for cell in group] for group in by_algo])


def _by_level(cell: Cell, families: Sequence[Any]) -> list[float]:
    found = {row["level"]: row["success"][0] for row in cell.after["levels"]}
    return [found[level] for level in families]


def _bounded(interval: Interval, low: float, high: float = np.inf) -> Interval:
    """An interval of a quantity that has bounds."""
    return Interval(*(float(np.clip(x, low, high)) for x in interval))


def _success(found: Draws, correct_AST: np.ndarray, a: int) -> Interval:
    """Success over seeds and tasks. Where all episodes agree, nothing has spread: Wilson over tasks."""
    if np.ptp(correct_AST[a]) == 0:
        return stats.success_interval(correct_AST[a].T.tolist())
    return _bounded(found.mean(a), 0.0, 1.0)


def _difference(found: Draws, correct_AST: np.ndarray, a: int, b: int) -> Interval:
    """Paired difference. Where all pairs agree, nothing has spread: Bonett-Price over tasks; a with itself: 0."""
    if a == b:
        return Interval(0.0, 0.0, 0.0)
    if np.ptp(correct_AST[a] - correct_AST[b]) == 0:
        return stats.paired_difference(correct_AST[a].T.tolist(), correct_AST[b].T.tolist())
    return _bounded(found.difference(a, b), -1.0, 1.0)


def _spent(group: Sequence[Cell]) -> dict[str, float]:
    """Per run: episodes played in training, rejected ones included, tokens sampled, seconds of training."""
    total = {"episodes": 0.0, "tokens": 0.0, "seconds": 0.0}
    for cell in group:
        for record in cell.metrics:
            total["episodes"] += record.get("rows", record["episodes"])
            total["tokens"] += record.get("tokens", 0.0)
            total["seconds"] += record["seconds"]
    return {name: value / len(group) for name, value in total.items()}


def _curves(group: Sequence[Cell]) -> dict[str, Any]:
    """Learning curves over the episodes played, as far as the metrics are there."""
    found = {}
    for name in CURVES:
        curves = []
        for cell in group:
            played, x, y = 0.0, [], []
            for record in cell.metrics:
                played += record.get("rows", record["episodes"])
                if isinstance(record.get(name), int | float):
                    x.append(played)
                    y.append(float(record[name]))
            curves.append((x, y))
        whole = band(curves)
        if whole is not None:
            found[name] = asdict(whole)
    return found


def _warm_start(cells: Sequence[Cell]) -> dict[str, float] | None:
    """Success and calls of the policies that the runs start from, and their calls beyond what is needed."""
    before = [cell.before for cell in cells]
    levels: list[Mapping[str, Any]] = [level for e in before if e is not None for level in e["levels"]]
    if not levels:
        return None
    n = sum(level["episodes"] for level in levels)
    mean = {
        key: sum(level[key] * level["episodes"] for level in levels) / n
        for key in ("tool_calls", "minimal_calls")
        if all(level[key] is not None for level in levels)
    }
    surplus = {"surplus_calls": mean["tool_calls"] - mean["minimal_calls"]} if len(mean) == 2 else {}
    return {"success": float(np.mean([e["success"][0] for e in before if e is not None])), **mean, **surplus}


def _run(cell: Cell) -> dict[str, Any]:
    """Where one run is, and what it reached."""
    report = cell.run / "report.html"
    return {
        "name": cell.name, "algo": cell.algo, "seed": cell.seed, "success": list(cell.after["success"]),
        "report": f"{cell.name}/report.html" if report.is_file() else None,
    }  # fmt: skip
