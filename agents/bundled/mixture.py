"""Which document comes when: the mixture of skills as a function of progress."""

from __future__ import annotations

import numpy as np

from agents.bundled.corpus import arithmetic, chains, copying, dialogues, syntax, tables

SKILLS = {
    "copying": copying,
    "tables": tables,
    "chains": chains,
    "arithmetic": arithmetic,
    "syntax": syntax,
    "dialogues": dialogues,
}
EARLY = {
    "copying": 0.45,
    "tables": 0.30,
    "chains": 0.03,
    "arithmetic": 0.05,
    "syntax": 0.07,
    "dialogues": 0.10,
}
LATE = {
    "copying": 0.08,
    "tables": 0.15,
    "chains": 0.08,
    "arithmetic": 0.11,
    "syntax": 0.08,
    "dialogues": 0.50,
}


def document(rng: np.random.Generator, progress: float) -> str:
    """One marked document; `progress` in [0, 1] moves the mixture from copying to dialogues."""
    late = min(1.0, progress / 0.4)
    weights = np.array([EARLY[s] * (1 - late) + LATE[s] * late for s in SKILLS])
    skill = list(SKILLS)[int(np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random()))]
    return SKILLS[skill].document(rng)
