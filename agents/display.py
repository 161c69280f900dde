"""What the user sees while a run goes on: plain lines, or a live table on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

from agents.doctor import Finding, troubles


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


COLUMNS = (
    ("reward", "reward", ".3f"), ("success", "correct", ".3f"), ("calls", "tool_calls", ".2f"),
    ("len", "length", ".0f"), ("entropy", "entropy", ".3f"), ("kl", "kl", ".1e"), ("clip", "clip_frac", ".3f"),
    ("grad", "grad_norm", ".2f"), ("gap", "logp_gap", ".0e"), ("tok/s", "tokens_per_second", ".0f"),
)  # fmt: skip
"""Heading, metric, format."""


def cells(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Heading and text of every column that the record has."""
    out = []
    for heading, name, spec in COLUMNS:
        value = record.get(name)
        if isinstance(value, (int, float)):
            out.append((heading, format(value, spec)))
    return out


class Silent:
    """For processes that do not talk to the user."""

    def phase(self, name, text): ...
    def progress(self, name, done, total, text): ...
    def step(self, record, findings): ...
    def evaluation(self, name, record): ...
    def note(self, text): ...


class Plain:
    """Lines for logs and pipes."""

    def __init__(self, steps: int, stream: TextIO | None = None):
        self.steps, self.stream = steps, stream or sys.stderr
        self.began = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.last_progress = 0.0
        self.warned: set[str] = set()

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", file=self.stream, flush=True)

    def phase(self, name, text):
        self._say(f"{name}: {text}")

    def progress(self, name, done, total, text):
        if name != "rollout" and time.monotonic() - self.last_progress > 10:
            self.last_progress = time.monotonic()
            self._say(f"{name} {done}/{total} {text}")

    def step(self, record, findings):
        now = time.monotonic()
        self.first = self.first or (record["step"] - 1, now - record["seconds"])
        per_step = (now - self.first[1]) / (record["step"] - self.first[0])
        left = per_step * (self.steps - record["step"])
        numbers = "  ".join(f"{heading} {text}" for heading, text in cells(record))
        self._say(f"step {record['step']}/{self.steps}  {numbers}  {record['seconds']:.1f} s  ETA {left:.0f} s")
        for finding in troubles(findings):
            if (key := f"{finding.name}:{finding.level}") not in self.warned:
                self.warned.add(key)
                self._say(f"doctor [{finding.level}] {finding}")

    def evaluation(self, name, record):
        mean, low, high = record["success"]
        self._say(f"{name}: success {mean:.3f} [{low:.3f}, {high:.3f}] on {record['episodes']} tasks")

    def note(self, text):
        self._say(text)
