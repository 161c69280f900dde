"""Reward functions as a user might write them."""

from __future__ import annotations


def length(text: str, row) -> float:
    """Longer is better."""
    return len(text) / 10


def several(text: str, row) -> dict[str, float]:
    """A reward and a score beside it."""
    return {"reward": 0.25, "style": 0.5}


def raises(text: str, row) -> float:
    """Looks for what is not there."""
    return row["no such field"]


def changes_the_row(text: str, row) -> float:
    """Careless with what it is given."""
    row["answer"] = "changed"
    return 0.0
