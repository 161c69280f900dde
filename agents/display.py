"""What the user sees while a run goes on: a live table on a terminal, plain lines otherwise."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agents.doctor import Finding, troubles

COLUMNS = (
    ("reward", "reward", ".3f"),
    ("success", "correct", ".3f"),
    ("tool calls", "tool_calls", ".2f"),
    ("length", "length", ".0f"),
    ("entropy", "entropy", ".3f"),
    ("KL", "kl", ".1e"),
    ("clipped", "clip_frac", ".3f"),
    ("grad norm", "grad_norm", ".2f"),
    ("log-prob gap", "logp_gap", ".0e"),
    ("tokens/s", "tokens_per_second", ".0f"),
)
"""Heading, metric, format."""
_BARS = " ▁▂▃▄▅▆▇█"
_COLOURS = {"ok": "green", "warn": "yellow", "bad": "bold red"}


class Display(Protocol):
    """Told what happens, in order."""

    def phase(self, name: str, text: str) -> None:
        """A new part of the run begins."""

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """How far the current part is."""

    def step(self, record: Mapping[str, Any], findings: Sequence[Finding]) -> None:
        """An iteration is over."""

    def evaluation(self, name: str, record: Mapping[str, Any]) -> None:
        """An evaluation is over."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@contextmanager
def choose(steps: int, *, plain: bool, silent: bool) -> Iterator[Display]:
    """The display that fits: none for helper processes, a live one on a terminal, lines otherwise. On stderr."""
    if silent:
        yield Silent()
    elif plain or not sys.stderr.isatty():
        yield Plain(steps)
    else:
        live = LiveTable(steps)
        with live.live:
            yield live


def cells(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Heading, metric and text of every column that the record has."""
    return [
        (heading, name, format(record[name], spec))
        for heading, name, spec in COLUMNS
        if isinstance(record.get(name), (int, float))
    ]


class Clock:
    """Seconds since the start, and an estimate of those left from the pace of the iterations so far."""

    def __init__(self, steps: int):
        self.steps = steps
        self.began = time.monotonic()
        self.first: tuple[int, float] | None = None

    def elapsed(self) -> float:
        """Seconds since the display began."""
        return time.monotonic() - self.began

    def left(self, record: Mapping[str, Any]) -> float:
        """Seconds until the last iteration, at the pace since the first one seen."""
        now = time.monotonic()
        self.first = self.first or (record["step"] - 1, now - record["seconds"])
        pace = (now - self.first[1]) / (record["step"] - self.first[0])
        return pace * (self.steps - record["step"])


class Silent:
    """For processes that do not talk to the user."""

    def phase(self, name: str, text: str) -> None:
        """Nothing."""

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """Nothing."""

    def step(self, record: Mapping[str, Any], findings: Sequence[Finding]) -> None:
        """Nothing."""

    def evaluation(self, name: str, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Plain:
    """Lines for logs and pipes."""

    def __init__(self, steps: int, stream: TextIO | None = None, every: float = 10.0):
        self.clock, self.stream, self.every = Clock(steps), stream or sys.stderr, every
        self.last_progress = 0.0
        self.warned: set[tuple[str, str]] = set()

    def _say(self, text: str) -> None:
        print(f"[{self.clock.elapsed():6.1f} s] {text}", file=self.stream, flush=True)

    def phase(self, name: str, text: str) -> None:
        """One line."""
        self._say(f"{name}: {text}")

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """A line now and then; none for rollouts, whose iteration has its own."""
        if name != "rollout" and time.monotonic() - self.last_progress > self.every:
            self.last_progress = time.monotonic()
            self._say(f"{name} {done}/{total} {text}".rstrip())

    def step(self, record: Mapping[str, Any], findings: Sequence[Finding]) -> None:
        """One line, and one for each new trouble."""
        left = self.clock.left(record)
        numbers = "  ".join(f"{heading} {text}" for heading, _, text in cells(record))
        self._say(f"step {record['step']}/{self.clock.steps}  {numbers}  {record['seconds']:.1f} s  ETA {left:.0f} s")
        for finding in troubles(findings):
            if (finding.name, finding.level) not in self.warned:
                self.warned.add((finding.name, finding.level))
                self._say(f"doctor [{finding.level}] {finding}")

    def evaluation(self, name: str, record: Mapping[str, Any]) -> None:
        """One line."""
        self._say(f"{name}: success {interval(record['success'])} on {record['episodes']} tasks")

    def note(self, text: str) -> None:
        """One line."""
        self._say(text)


class LiveTable:
    """A table that is drawn anew as numbers come in; notes and evaluations scroll by above it."""

    def __init__(self, steps: int, console: Console | None = None):
        self.clock = Clock(steps)
        self.console = console or Console(stderr=True)
        self.heading, self.bar = "", (0, 1, "")
        self.history: dict[str, list[float]] = {}
        self.record: Mapping[str, Any] = {}
        self.findings: Sequence[Finding] = ()
        self.left = 0.0
        self.live = Live(console=self.console, refresh_per_second=8, transient=False, get_renderable=self.render)

    def phase(self, name: str, text: str) -> None:
        """The heading of the panel."""
        self.heading, self.bar = f"{name}: {text}", (0, 1, "")

    def progress(self, name: str, done: int, total: int, text: str) -> None:
        """The bar under the heading."""
        self.bar = (done, max(1, total), f"{name} {text}".rstrip())

    def step(self, record: Mapping[str, Any], findings: Sequence[Finding]) -> None:
        """New numbers."""
        self.record, self.findings, self.left = record, findings, self.clock.left(record)
        self.heading = "training"
        for _, name, _ in COLUMNS:
            if isinstance(record.get(name), (int, float)) and math.isfinite(record[name]):
                self.history.setdefault(name, []).append(float(record[name]))

    def evaluation(self, name: str, record: Mapping[str, Any]) -> None:
        """A line above the table."""
        self.console.print(f"[bold]{name}[/]: success {interval(record['success'])} on {record['episodes']} tasks")

    def note(self, text: str) -> None:
        """A line above the table."""
        self.console.print(Text(text, style="dim"))

    def render(self) -> RenderableType:
        """The panel as it stands."""
        done, total, text = self.bar
        parts: list[RenderableType] = []
        if self.record:
            parts.append(self._numbers())
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total=total, completed=done, width=30), Text(f"{done}/{total} {text}", style="dim"))
        parts.append(line)
        parts += [
            Text(f"{f.level:>4}  {f}", style=_COLOURS[f.level], overflow="fold") for f in troubles(self.findings)
        ]
        step = f" · step {self.record['step']}/{self.clock.steps} · ETA {self.left:.0f} s" if self.record else ""
        return Panel(Group(*parts), title=f"{self.heading}{step} · {self.clock.elapsed():.0f} s", title_align="left")

    def _numbers(self) -> Table:
        table = Table.grid(padding=(0, 2))
        row: list[RenderableType] = []
        for heading, name, text in cells(self.record):
            bars = spark(self.history.get(name, ()))
            row += [Text(heading, style="dim"), Text(text, style="bold"), Text(bars, style="cyan")]
        for start in range(0, len(row), 6):
            table.add_row(*row[start : start + 6])
        return table


def spark(values: Sequence[float], width: int = 16) -> str:
    """The last values as a line of bars between their own least and greatest."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return _BARS[4] * len(shown)
    return "".join(_BARS[1 + round(7 * (v - low) / (high - low))] for v in shown)


def interval(triple: Sequence[float]) -> str:
    """`0.812 [0.775, 0.844]`."""
    mean, low, high = triple
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def results_table(
    summary: Mapping[str, Any], evals: Sequence[Mapping[str, Any]], console: Console | None = None
) -> None:
    """Held-out success with 95 % intervals, per level too, then where things are."""
    console = console or Console()
    table = Table(title="held-out success, 95 % Wilson intervals")
    for heading in ("tasks", "", "before", "after"):
        table.add_column(heading)
    named = {e["label"]: e for e in evals}
    before, after, harder = (named.get(n) for n in ("before", "after", "harder"))
    table.add_row("all", _count(after or before), _success(before), _success(after), style="bold")
    for level in sorted({row["level"] for e in (before, after) if e for row in e["levels"]}):
        rows = [_level(e, level) for e in (before, after)]
        table.add_row(f"level {level}", _count(rows[1] or rows[0]), *map(_success, rows))
    if harder is not None:
        table.add_row(f"harder ({harder['level']})", _count(harder), "", _success(harder))
    console.print(table)
    for name in ("run", "report"):
        if summary.get(name):
            console.print(f"{name:>6}: {summary[name]}", soft_wrap=True, highlight=False)


def _level(record: Mapping[str, Any] | None, level: int) -> Mapping[str, Any] | None:
    return next((row for row in record["levels"] if row["level"] == level), None) if record else None


def _success(record: Mapping[str, Any] | None) -> str:
    return interval(record["success"]) if record else ""


def _count(record: Mapping[str, Any] | None) -> str:
    return f"{record['episodes']} episodes" if record else ""
