"""Answers: finding them in a turn, and comparing them with the truth by normalised exact match.

Nothing that looks like the truth but is not counts: no Unicode folding, no units, no lists, no substrings.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 64

_OPEN, _CLOSE = "<answer>", "</answer>"
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{1,30})?", re.ASCII)
_QUOTES = ('""', "''", "``")


def extract(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>`` of a text; None if there is none."""
    end = text.rfind(_CLOSE)
    if end < 0:
        return None
    start = text.rfind(_OPEN, 0, end)
    return None if start < 0 else text[start + len(_OPEN) : end]


def same(answer: str, truth: str) -> bool:
    """Whether an answer says the truth: numbers by value, words by their letters (ASCII case and spacing
    aside)."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    expected = number(truth)
    if expected is not None:
        return number(answer) == expected
    return _words(answer) == _words(truth)


def key(answer: str | None) -> str | None:
    """A normal form: two short answers are the `same` where their keys are equal; None for a blank or too long one."""
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return None
    value = number(answer)
    if value is None:
        return _words(answer) or None
    # As a decimal, which no text but the number itself reads as; at most 30 digits follow the point.
    whole, rest = divmod(int(abs(value) * 10**30), 10**30)
    return ("-" if value < 0 else "") + f"{whole}" + (f".{rest:030d}".rstrip("0") if rest else "")


def number(text: str) -> Fraction | None:
    """The number that a text is (1,240 or 1240.0 or -3), or None."""
    text = _stripped(text)
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _words(text: str) -> str:
    text = _stripped(text)
    # lower() would turn the Kelvin sign into "k": only ASCII letters lose their case.
    return text.lower() if text.isascii() else text


def _stripped(text: str) -> str:
    """Outer and repeated spaces, one pair of quotes and one full stop aside."""
    text = re.sub(r"[ \n\t]+", " ", text).strip(" ").removesuffix(".")
    if len(text) > 1 and text[0] + text[-1] in _QUOTES:
        text = text[1:-1]
    return text
