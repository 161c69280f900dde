"""JSON as the standard means it, from hostile text: bounded, no duplicate keys, NaN or huge numbers."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_CHARS = 20_000
MAX_DEPTH = 32
MAX_DIGITS = 40


class JsonError(ValueError):
    """The text is not acceptable JSON; the message says why, in words short enough for an agent."""


def loads(text: str) -> Any:
    """Parse `text`.

    Raises:
        JsonError: and nothing else, whatever the text.
    """
    if len(text) > MAX_CHARS:
        raise JsonError(f"longer than {MAX_CHARS} characters")
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise JsonError(type(error).__name__) from None
    if "\\u" in text or not text.isascii():
        _check_encodable(value)
    return value


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses; brackets inside strings do not count."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth, quoted, escaped = 0, False, False
    for char in text:
        if escaped:
            escaped = False
        elif quoted:
            escaped, quoted = char == "\\", char != '"'
        elif char == '"':
            quoted = True
        elif char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise JsonError(f"nested deeper than {MAX_DEPTH}")
        elif char in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise JsonError(f"duplicate key {twice[:40]!r}")
    return table


def _no_constant(name: str) -> Any:
    raise JsonError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JsonError(f"a number of more than {MAX_DIGITS} digits")
    return int(digits)


def _number(digits: str) -> float:
    if len(digits) > MAX_DIGITS:
        raise JsonError(f"a number of more than {MAX_DIGITS} digits")
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError("a number out of range")
    return value


def _check_encodable(value: Any) -> None:
    """Lone surrogates are no text: nothing that prints or stores them later may fail."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError("a lone surrogate") from None
