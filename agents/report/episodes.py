"""Trajectories as the report's plain data: bounded, rounded, tokens through one table of those that occur."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.report.gallery import Gallery
from agents.trajectory import Trajectory
from tools.calls import BadCall, get_format

BLOCK = 25
"""Trajectories that the page unpacks together."""
MAX_TEXT = 20_000
"""Characters kept of one message."""
MAX_MESSAGES = 400
"""Messages kept of one trajectory: the first half and the last half of them."""
MAX_PARTS = 100
"""Parts kept of a message that has images."""
MAX_TOKENS = 8_000
"""Tokens kept of one segment."""
MAX_CALL = 300
"""Characters kept of one tool call or fact."""
OWN_COLUMNS = ("logp", "mask", "version")
"""What the ledger itself knows of each token; further columns come from the trainer."""


@dataclass(frozen=True)
class Entry:
    """A trajectory as it was stored."""

    step: int | None
    """Training step; None for an evaluation."""
    trajectory: Trajectory
    """The episode."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Per-token numbers by name, one sequence a segment; a name's suffix `_BT` is not shown."""


class TokenTable:
    """The token ids that occur, numbered as they come, with their texts."""

    def __init__(self, tokenizer: Any | None):
        self.ids: list[int] = []
        self._numbers: dict[int, int] = {}
        self._tokenizer = tokenizer

    def numbers(self, ids: Iterable[int]) -> list[int]:
        """Number of each id in this table."""
        out = []
        for token in ids:
            if token not in self._numbers:
                self._numbers[token] = len(self.ids)
                self.ids.append(int(token))
            out.append(self._numbers[token])
        return out

    def texts(self) -> list[str]:
        """Text of each id; a piece of a character shows its raw form, an id no tokenizer knows its number."""
        return [self._text(token) for token in self.ids]

    def special(self) -> list[int]:
        """Numbers of the tokenizer's special tokens."""
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        return [number for number, token in enumerate(self.ids) if token in special]

    @property
    def named(self) -> bool:
        """Whether tokens are shown by their texts rather than by their ids."""
        return self._tokenizer is not None

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"⟨{token}⟩"
        try:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
            raw = self._tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text or not text else text
        except (IndexError, KeyError, ValueError, TypeError, OverflowError):
            return f"⟨{token}⟩"
        return str(raw if raw is not None else f"⟨{token}⟩")


class Scales:
    """Range of every column over the report: the colours of two trajectories can be compared."""

    def __init__(self) -> None:
        self._seen: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, values: Sequence[float | None]) -> None:
        """Remember a column's numbers."""
        finite = np.array([v for v in values if v is not None], dtype=np.float64)
        self._seen.setdefault(name, []).append(finite)

    def specs(self) -> list[dict[str, Any]]:
        """Per column the 1 % and 99 % quantiles, widened to 0, and whether colours diverge from 0."""
        out = []
        for name, parts in self._seen.items():
            values = np.concatenate(parts)
            if not len(values):
                continue
            low, high = (float(q) for q in np.quantile(values, [0.01, 0.99]))
            diverging = low < 0 < high
            if diverging:
                low, high = -max(-low, high), max(-low, high)
            elif name != "version":
                low, high = min(0.0, low), max(0.0, high)
            if low == high:
                high = low + 1.0
            kind = "diverging" if diverging else "sequential"
            out.append({"name": name, "low": rounded(low), "high": rounded(high), "kind": kind})
        return out


def fits(tokenizer: Any, some: Iterable[Trajectory]) -> bool:
    """Whether a tokenizer writes most turns' sampled ids as the texts that were recorded with them."""
    right = total = 0
    for t in some:
        for segment in t.ledger.segments if t.ledger is not None else ():
            ids: dict[int, list[int]] = {}
            for token, turn, sampled in zip(segment.ids, segment.turn, segment.mask, strict=True):
                if sampled and turn < len(t.turns):
                    ids.setdefault(turn, []).append(token)
            total += len(ids)
            right += sum(_reads(tokenizer, own, t.turns[turn].text) for turn, own in ids.items())
    return 2 * right >= total


def _reads(tokenizer: Any, ids: Sequence[int], text: str) -> bool:
    try:
        return tokenizer.decode(ids, skip_special_tokens=False).startswith(text)
    except (IndexError, KeyError, ValueError, TypeError, OverflowError):
        return False


def rounded(value: Any) -> float | int | None:
    """Four significant digits within ±1e100; None where there is no finite number."""
    if isinstance(value, bool | int) and abs(value) < 10**15:
        return int(value)
    try:
        value = float(value)
    except OverflowError:
        return None
    if not math.isfinite(value):
        return None
    value = min(max(value, -1e100), 1e100)
    return int(value) if value == int(value) and abs(value) < 1e9 else float(f"{value:.4g}")


def clip(text: Any, limit: int) -> tuple[str, int]:
    """At most `limit` characters, and how many were left out."""
    text = text if isinstance(text, str) else str(text)
    return text[:limit], max(0, len(text) - limit)


def table_row(entry: Entry, unit: int) -> dict[str, Any]:
    """The cells of one trajectory in the report's table."""
    t = entry.trajectory
    verdict = t.verdict
    correct = verdict.scores.get("correct") if verdict is not None and not verdict.failure else None
    calls = verdict.facts.get("tool_calls") if verdict is not None else None
    return {
        "step": entry.step,
        "level": t.level,
        "task": clip(t.task_id, 200)[0],
        "reward": rounded(t.reward),
        "calls": calls if isinstance(calls, int) else sum(len(turn.calls) for turn in t.turns),
        "length": t.length,
        "stop": clip(t.stop_reason or "?", 60)[0],
        "split": clip(t.split, 60)[0],
        "correct": -1 if correct is None else int(correct >= 0.5),
        "member": t.member,
        "unit": unit,
    }


def detail(
    entry: Entry, tokens: TokenTable, scales: Scales, gallery: Gallery, call_format: str = "hermes"
) -> dict[str, Any]:
    """What the page shows of one trajectory when it is opened."""
    t = entry.trajectory
    verdict = t.verdict
    return {
        "version": t.version,
        "group": t.group,
        "segments": _segments(entry, tokens, scales),
        "messages": _messages(t, gallery, call_format),
        "failure": "no verdict" if verdict is None else clip(verdict.failure or "", MAX_CALL)[0],
        "scores": [] if verdict is None else _pairs(verdict.scores),
        "facts": [] if verdict is None else _pairs(verdict.facts),
    }


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and short values; numbers stay numbers."""
    out = []
    for name, value in list(values.items())[:100]:
        number = isinstance(value, int | float)
        out.append((clip(name, 80)[0], rounded(value) if number else clip(value, MAX_CALL)[0]))
    return out


def _segments(entry: Entry, tokens: TokenTable, scales: Scales) -> list[dict[str, Any]]:
    ledger = entry.trajectory.ledger
    out: list[dict[str, Any]] = []
    for number, segment in enumerate(ledger.segments if ledger is not None else ()):
        n = len(segment)
        keep = min(n, MAX_TOKENS)
        own = {name: getattr(segment, name) for name in OWN_COLUMNS}
        further = {name.removesuffix("_BT"): values[number] for name, values in entry.columns.items()}
        columns = {}
        for name, values in {**own, **further}.items():
            sampled_only = name != "mask"
            columns[name] = [
                None if sampled_only and not m else rounded(v)
                for v, m in zip(values[:keep], segment.mask[:keep], strict=False)
            ]
            scales.add(name, columns[name])
        out.append(
            {
                "tokens": tokens.numbers(segment.ids[:keep]),
                "mask": list(segment.mask[:keep]),
                "turn": list(segment.turn[:keep]),
                "parent": segment.parent,
                "columns": columns,
                "cut": n - keep,
            }
        )
    return out


def _messages(t: Trajectory, gallery: Gallery, call_format: str) -> list[dict[str, Any]]:
    """The conversation; the last assistant messages are the policy's turns, in order."""
    assistant = [i for i, m in enumerate(t.messages) if m.get("role") == "assistant"]
    turn_of = {i: turn for turn, i in enumerate(assistant[len(assistant) - len(t.turns) :])} if t.turns else {}
    out = []
    for i, message in enumerate(t.messages):
        if len(t.messages) > MAX_MESSAGES and MAX_MESSAGES // 2 <= i < len(t.messages) - MAX_MESSAGES // 2:
            continue
        text, cut = clip(text_of(message.get("content")), MAX_TEXT)
        shown: dict[str, Any] = {"role": clip(message.get("role", "?"), 40)[0], "text": text, "cut": cut}
        if parts := _parts(message.get("content"), gallery):
            shown |= parts
        if message.get("name"):
            shown["name"] = clip(message["name"], 80)[0]
        if i in turn_of:
            shown["turn"] = turn_of[i]
            shown["calls"] = _calls(t.turns[turn_of[i]], call_format)
        out.append(shown)
    return out


def _parts(content: Any, gallery: Gallery) -> dict[str, Any] | None:
    """Texts and images in order, with what is left out of them; None where there is no image."""
    if not isinstance(content, list | tuple):
        return None
    whole = [part if isinstance(part, Mapping) else {"type": "text", "text": part} for part in content]
    if not any(part.get("type") == "image" for part in whole):
        return None
    parts: list[Any] = []
    left = MAX_TEXT
    cut = 0
    for part in whole[:MAX_PARTS]:
        if part.get("type") == "image":
            parts.append(gallery.part(part.get("image")))
            continue
        text, more = clip(text_of([part]), left)
        left, cut = left - len(text), cut + more
        parts += [text] if text else []
    return {"parts": parts, "cut": cut, "parts_cut": len(whole) - len(whole[:MAX_PARTS])}


def text_of(content: Any) -> str:
    """The text of a message's content; other parts show their kind."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return "" if content is None else str(content)
    parts = (part if isinstance(part, Mapping) else {"type": "text", "text": str(part)} for part in content)
    return "".join(str(p.get("text", "")) if p.get("type") == "text" else f"[{p.get('type')}]" for p in parts)


def _calls(turn: Any, call_format: str) -> list[dict[str, Any]]:
    """The turn's tool calls as short text; the kinds of errors stand behind them."""
    if not turn.calls:
        return []
    shown: list[dict[str, Any]] = []
    for call in get_format(call_format).parse(turn.text[:MAX_TEXT]).calls[:50]:
        if isinstance(call, BadCall):
            shown.append({"text": clip(call.raw, MAX_CALL)[0], "error": call.error})
        else:
            arguments = ", ".join(f"{k}={v!r}" for k, v in call.arguments.items())
            shown.append({"text": clip(f"{call.name}({arguments})", MAX_CALL)[0]})
    shown = shown or [{"text": clip(name, MAX_CALL)[0]} for name in turn.calls[:50]]
    known = {call.get("error") for call in shown}
    return shown + [{"text": "failed", "error": e} for e in dict.fromkeys(turn.errors) if e not in known]
