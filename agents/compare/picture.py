"""The picture of a comparison: learning curves with bands, success with intervals, differences from the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.compare.canvas import PNG, SVG, Canvas, series

WIDTH = 1120.0
ROW = 30.0
"""Height of a recipe's row."""
MIDDLE = 520.0
"""Where the learning curve ends and the intervals begin."""


@dataclass(frozen=True)
class Scale:
    """Numbers along an axis."""

    low: float
    high: float
    start: float
    """Where `low` lies, in points."""
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """At most so many round numbers."""
        return ticks(self.low, self.high, count)


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 round numbers in [low, high]."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(values: Sequence[float], bounds: tuple[float, float], least: float = 0.1) -> tuple[float, float]:
    """A range that holds the finite values with a margin, at least so wide, within bounds."""
    finite = [v for v in values if math.isfinite(v)] or [bounds[0]]
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low)
    low, high = low - margin, high + margin
    middle = (low + high) / 2
    low, high = min(low, middle - least / 2), max(high, middle + least / 2)
    low, high = max(low, bounds[0]), min(high, bounds[1])
    if high - low < least:  # pushed against a bound
        low, high = (low, low + least) if low == bounds[0] else (high - least, high)
    return low, high


def number(value: float) -> str:
    """A tick's label."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def svg(summary: Mapping[str, Any]) -> str:
    """The picture for the page."""
    canvas = SVG(WIDTH, height(summary), f"{' / '.join(summary['algos'])} on {summary['env']}")
    draw(canvas, summary)
    return canvas.done()


def png(summary: Mapping[str, Any]) -> bytes:
    """The picture as a file of its own, with its title."""
    top, tall = 64.0, height(summary)
    canvas = PNG(WIDTH + 40, tall + top + 20)
    card = [(12.0, top - 8), (WIDTH + 28, top - 8), (WIDTH + 28, top + tall + 8), (12.0, top + tall + 8)]
    canvas.area(card, "card")
    canvas.text((20, 30), f"{', '.join(summary['algos'])} on {summary['env']}", 19, bold=True)
    canvas.text((20, 49), about(summary), 11.5, "soft")
    draw(Shifted(canvas, 20, top), summary)
    return canvas.done()


def about(summary: Mapping[str, Any]) -> str:
    """Seeds, budget and intervals in a line, in plain characters."""
    seeds = f"{summary['seeds']} seeds" if summary["seeds"] > 1 else "one seed"
    over = "seeds and tasks" if summary["seeds"] > 1 else "tasks; one seed says nothing about other seeds"
    return f"{seeds}, {summary['steps']} iterations, {summary['tasks']:,} held-out tasks; 95 % intervals over {over}"


@dataclass(frozen=True)
class Shifted:
    """A canvas moved to the right and down."""

    canvas: Canvas
    x: float
    y: float

    def _move(self, points: Any) -> list[tuple[float, float]]:
        return [(px + self.x, py + self.y) for px, py in points]

    def line(self, points: Any, *more: Any, **options: Any) -> None:
        self.canvas.line(self._move(points), *more, **options)

    def area(self, points: Any, *more: Any, **options: Any) -> None:
        self.canvas.area(self._move(points), *more, **options)

    def dot(self, at: Any, *more: Any, **options: Any) -> None:
        self.canvas.dot(self._move([at])[0], *more, **options)

    def text(self, at: Any, *more: Any, **options: Any) -> None:
        self.canvas.text(self._move([at])[0], *more, **options)

    def hint(self, box: tuple[float, float, float, float], text: str) -> None:
        self.canvas.hint((box[0] + self.x, box[1] + self.y, box[2], box[3]), text)


def height(summary: Mapping[str, Any]) -> float:
    """Of the picture."""
    rows = 2 * len(summary["rows"]) - 1
    return max(330.0, ROW * rows + 2 * 70)


def draw(canvas: Canvas, summary: Mapping[str, Any]) -> None:
    """All panels."""
    rows, tall = summary["rows"], height(summary)
    learning(canvas, rows, "correct", "success while training", (0, 0, MIDDLE - 24, tall), unit=True)
    below = successes(canvas, summary, 0)
    differences(canvas, summary, below)


def learning(
    canvas: Canvas, rows: Sequence[Mapping[str, Any]], metric: str, title: str,
    box: tuple[float, float, float, float], unit: bool = False,
) -> None:  # fmt: skip
    """Learning curves of one metric in a box (x, y, width, height): mean over the seeds, band of their range."""
    x0, y0, wide, tall = box
    curves = [(i, row["algo"], row["curves"][metric]) for i, row in enumerate(rows) if metric in row["curves"]]
    canvas.text((x0 + 8, y0 + 20), title, 13, bold=True)
    if not curves:
        return
    bounds = (0.0, 1.0) if unit else (-math.inf, math.inf)
    every = [v for _, _, c in curves for v in (*c["low"], *c["high"])]
    least = 0.1 if unit else max(1e-9, 0.02 * max(map(abs, every)))
    y = Scale(*spread(every, bounds, least), y0 + tall - 30, y0 + 34)
    ends = [v for _, _, c in curves for v in (c["x"][0], c["x"][-1])]
    x = Scale(0.0, max(*ends, 1.0), x0 + 46, x0 + wide - 10)
    frame(canvas, x, y)
    canvas.text((x.end, y.start + 27), "episodes played", 10, "faint", "end")
    for i, _, c in curves:
        if len(c["x"]) > 1 and any(low != high for low, high in zip(c["low"], c["high"], strict=True)):
            edge = [(x(a), y(b)) for a, b in zip(c["x"], c["high"], strict=True)]
            edge += [(x(a), y(b)) for a, b in zip(reversed(c["x"]), reversed(c["low"]), strict=True)]
            canvas.area(edge, series(i), 0.14)
    for i, _, c in curves:
        points = [(x(a), y(b)) for a, b in zip(c["x"], c["mean"], strict=True)]
        if len(points) > 1:
            canvas.line(points, series(i), 2.0)
        canvas.dot(points[-1], 3.2, series(i))
    read_off(canvas, curves, x, y, unit)


def read_off(canvas: Canvas, curves: Sequence[tuple[int, str, Any]], x: Scale, y: Scale, unit: bool) -> None:
    """Strips over the curves that tell their values."""
    longest = max((c for _, _, c in curves), key=lambda c: len(c["x"]))
    count = min(40, len(longest["x"]))
    for k in range(count):
        j = round(k * (len(longest["x"]) - 1) / max(1, count - 1))
        at, lines = longest["x"][j], [f"{longest['x'][j]:.0f} episodes"]
        for _, name, c in curves:
            near = min(range(len(c["x"])), key=lambda n: abs(c["x"][n] - at))
            lines.append(f"{name}: {c['mean'][near]:.3f} [{c['low'][near]:.3f}, {c['high'][near]:.3f}]")
        wide = (x.end - x.start) / count
        canvas.hint((x(at) - wide / 2, y.end, wide, y.start - y.end), "\n".join(lines))


def frame(canvas: Canvas, x: Scale, y: Scale) -> None:
    """Grid and labels of a chart."""
    for value in y.ticks(5):
        canvas.line([(x.start, y(value)), (x.end, y(value))], "line")
        canvas.text((x.start - 7, y(value) + 3.5), number(value), 10, "faint", "end")
    for value in x.ticks(5):
        canvas.text((x(value), y.start + 15), number(value), 10, "faint", "middle")


def successes(canvas: Canvas, summary: Mapping[str, Any], top: float) -> float:
    """Success of every recipe: interval, seeds, number. Returns where the panel ends."""
    rows, warm = summary["rows"], summary["warm_start"]
    canvas.text((MIDDLE, top + 20), "success on held-out tasks", 13, bold=True)
    start = warm["success"] if warm else None
    every = [v for row in rows for v in (*row["success"], *row["by_seed"])] + ([start] if start is not None else [])
    x = axis(canvas, spread(every, (0.0, 1.0)), top + 40, len(rows))
    if start is not None:
        canvas.line([(x(start), top + 42), (x(start), top + 40 + ROW * len(rows))], "faint", 1.2, dash=True)
        side: Any = "start" if start < (x.low + x.high) / 2 else "end"
        canvas.text((x(start), top + 36), "before training", 9.5, "faint", side)
    for i, row in enumerate(rows):
        y = top + 40 + ROW * (i + 0.5)
        label(canvas, row["algo"], y, series(i))
        for seed in row["by_seed"] if len(row["by_seed"]) > 1 else ():
            canvas.dot((x(seed), y), 3.4, series(i), "card")
        whisker(canvas, x, y, row["success"], series(i), "{:.3f}")
        seeds = ", ".join(f"{s:.3f}" for s in row["by_seed"])
        canvas.hint((MIDDLE, y - ROW / 2, WIDTH - MIDDLE, ROW), f"{row['algo']}: seeds {seeds}")
    return top + 70 + ROW * len(rows)


def differences(canvas: Canvas, summary: Mapping[str, Any], top: float) -> None:
    """Paired difference of every other recipe from the first one."""
    rows = list(enumerate(summary["rows"]))[1:]
    canvas.text((MIDDLE, top + 20), f"difference from {summary['baseline']}, paired", 13, bold=True)
    every = [0.0, *(v for _, row in rows for v in row["difference"])]
    x = axis(canvas, spread(every, (-1.0, 1.0)), top + 40, len(rows))
    canvas.line([(x(0.0), top + 40), (x(0.0), top + 40 + ROW * len(rows))], "faint", 1.2, dash=True)
    for k, (i, row) in enumerate(rows):
        y = top + 40 + ROW * (k + 0.5)
        label(canvas, row["algo"], y, series(i))
        whisker(canvas, x, y, row["difference"], series(i), "{:+.3f}")


def axis(canvas: Canvas, limits: tuple[float, float], top: float, rows: int) -> Scale:
    """The axis of a panel of rows."""
    x = Scale(*limits, MIDDLE + 118, WIDTH - 172)
    bottom = top + ROW * rows
    for value in x.ticks(5):
        canvas.line([(x(value), top), (x(value), bottom)], "line")
        canvas.text((x(value), bottom + 14), number(value), 10, "faint", "middle")
    return x


def label(canvas: Canvas, name: str, y: float, colour: str) -> None:
    """A recipe's name beside its row."""
    canvas.dot((MIDDLE + 5, y), 4.5, colour)
    canvas.text((MIDDLE + 16, y + 4.2), name if len(name) <= 15 else f"{name[:14]}..", 12.5)


def whisker(
    canvas: Canvas, x: Scale, y: float, interval: Sequence[float], colour: str, form: str
) -> None:
    """An interval and its mean, and both as numbers."""
    mean, low, high = interval
    canvas.line([(x(low), y), (x(high), y)], colour, 2.4)
    for end in (low, high):
        canvas.line([(x(end), y - 4), (x(end), y + 4)], colour, 1.6)
    canvas.dot((x(mean), y), 5, colour)
    text = f"{form.format(mean)} [{form.format(low)}, {form.format(high)}]"
    canvas.text((WIDTH - 4, y + 4), text, 11.5, "ink", "end")
