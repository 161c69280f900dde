"""The page of a comparison: one self-contained HTML file without a script; nothing is fetched."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from agents.compare import picture
from agents.compare.canvas import DARK, LIGHT, SERIES, SVG, series
from agents.compare.summary import CURVES

HERE = Path(__file__).resolve().parent
STYLE = HERE.parent / "report" / "style.css"


def render(summary: Mapping[str, Any], command: str) -> str:
    """The file's text; `command` is what writes it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"signed": signed, "plain": plain, "count": count, "share": share}
    rows = [
        {**row, "colour": series(i), "whisker": Markup(whisker(summary, row, i))}
        for i, row in enumerate(summary["rows"])
    ]
    text = environment.get_template("page.html.j2").render(
        {**summary, "rows": rows},
        title=f"{', '.join(summary['algos'])}",
        about=picture.about(summary),
        style=Markup(STYLE.read_text(encoding="utf-8") + palette()),
        picture=Markup(picture.svg(summary)),
        charts=[Markup(chart) for chart in charts(summary)],
        best=max(rows, key=lambda row: row["success"][0]),
        largest=largest(rows),
        footer=f"Written {time.strftime('%Y-%m-%d %H:%M')} by {command}; nothing is fetched.",
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def largest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row that differs most from the baseline."""
    return max(rows[1:], key=lambda row: abs(row["difference"][0]))


def palette() -> str:
    """CSS variables of the series, for light and dark."""
    light = "".join(f"--{name}:{LIGHT[name]};" for name in SERIES)
    dark = "".join(f"--{name}:{DARK[name]};" for name in SERIES)
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark) {{ :root{{{dark}}} }}\n"


def charts(summary: Mapping[str, Any]) -> list[str]:
    """Small learning curves, one a metric that some recipe has."""
    found = []
    for name, title in CURVES.items():
        if any(name in row["curves"] for row in summary["rows"]):
            canvas = SVG(400, 210, title)
            picture.learning(canvas, summary["rows"], name, title, (0, 0, 400, 210), unit=name == "correct")
            found.append(canvas.done())
    return found


def whisker(summary: Mapping[str, Any], row: Mapping[str, Any], i: int) -> str:
    """A recipe's success with its interval on the axis from 0 to 1, for the table."""
    canvas = SVG(150, 22, f"{row['algo']}: {plain(row['success'][0])}")
    x = picture.Scale(0.0, 1.0, 6, 144)
    canvas.line([(6, 11), (144, 11)], "line")
    for value in (0.0, 0.5, 1.0):
        canvas.line([(x(value), 7), (x(value), 15)], "line")
    mean, low, high = row["success"]
    canvas.line([(x(low), 11), (x(high), 11)], series(i), 2.4)
    for seed in row["by_seed"]:
        canvas.line([(x(seed), 5), (x(seed), 17)], series(i), 1)
    canvas.dot((x(mean), 11), 4.2, series(i))
    return canvas.done()


def plain(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or value != value or abs(value) == float("inf") else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference."""
    return "–" if value is None or value != value else f"{value:+.3f}".replace("-", "−")


def count(value: float) -> str:
    """A large number, in thousands."""
    return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:.2f} M"


def share(value: float) -> str:
    """Per cent."""
    return plain(None) if value != value or abs(value) == float("inf") else f"{100 * value:.1f} %".replace("-", "−")
