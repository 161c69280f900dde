"""Errors that name what was wrong and what to do, and the did-you-mean behind them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """A recipe that cannot run: unknown part or option, parts that do not fit, a need that nobody serves."""


class BatchError(ValueError):
    """A tensor of the wrong shape or content; names the tensor, its shape and, where known, the recipe."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known: the nearest known ones, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if near:
        return f"unknown {kind} `{name}`; did you mean {' or '.join(f'`{n}`' for n in near)}?"
    return f"unknown {kind} `{name}`; known: {', '.join(known) or 'none'}"
