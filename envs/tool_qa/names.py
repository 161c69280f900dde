"""Names: invented words, parted between training and evaluation by a checksum of the word itself."""

from __future__ import annotations

import tomllib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import scenarios

T = TypeVar("T")

DATA: dict[str, Any] = tomllib.loads((scenarios.folder("tool_qa") / "worlds.toml").read_text(encoding="utf-8"))

_ONSETS, _VOWELS, _CODAS = (DATA["names"][k].split() for k in ("onsets", "vowels", "codas"))
_CODA_SHARE, _THREE = DATA["names"]["coda_share"], DATA["names"]["three_syllables"]
_RESERVED = frozenset(DATA["names"]["reserved"])
_LONGEST, _EVAL_SHARE = DATA["names"]["longest"], DATA["names"]["eval_share"]

Uniform = Callable[[], float]
"""Draws from [0, 1): the one primitive used, so that a task is the same on every version of Python."""


def pick(u: Uniform, items: Sequence[T]) -> T:
    return items[int(u() * len(items))]


def sample(u: Uniform, items: Sequence[T], k: int) -> list[T]:
    """k different positions of `items`, in random order."""
    rest = list(items)
    return [rest.pop(int(u() * len(rest))) for _ in range(k)]


def weighted(u: Uniform, weights: dict[T, float]) -> T:
    """A key, with probability in proportion to its weight."""
    left = u() * sum(weights.values())
    for key, weight in weights.items():
        left -= weight
        if left < 0:
            return key
    return key


def split_of(name: str) -> str:
    """Which split a name belongs to."""
    return "eval" if zlib.crc32(name.lower().encode()) % 1000 < 1000 * _EVAL_SHARE else "train"


def names(u: Uniform, split: str, count: int) -> list[str]:
    """`count` names of a split, no two with the same first syllable."""
    found: list[str] = []
    starts: set[str] = set()
    while len(found) < count:
        start = pick(u, _ONSETS) + pick(u, _VOWELS)
        if start in starts:
            continue
        word = start + (pick(u, _CODAS) if u() < _CODA_SHARE else "")
        for _ in range(2 if u() < _THREE else 1):
            word += pick(u, _ONSETS) + pick(u, _VOWELS) + (pick(u, _CODAS) if u() < _CODA_SHARE else "")
        if len(word) <= _LONGEST and word not in _RESERVED and split_of(word) == split:
            starts.add(start)
            found.append(word.capitalize())
    return found
