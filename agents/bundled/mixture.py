"""Which document comes when: the mixture of skills as a function of progress."""

from __future__ import annotations

import numpy as np

from agents.bundled.corpus import arithmetic, chains, copying, dialogues, hops, syntax, tables

SKILLS = {
    "copying": copying,
    "tables": tables,
    "hops": hops,
    "chains": chains,
    "arithmetic": arithmetic,
    "syntax": syntax,
    "dialogues": dialogues,
}
EARLY = dict(zip(SKILLS, (0.25, 0.20, 0.15, 0.05, 0.08, 0.07, 0.20), strict=True))
LATE = dict(zip(SKILLS, (0.06, 0.12, 0.10, 0.06, 0.10, 0.06, 0.50), strict=True))


def document(rng: np.random.Generator, progress: float) -> str:
    """One marked document; `progress` in [0, 1] moves the mixture from copying to dialogues."""
    late = min(1.0, progress / 0.4)
    weights = np.array([EARLY[s] * (1 - late) + LATE[s] * late for s in SKILLS])
    skill = list(SKILLS)[int(np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random()))]
    return SKILLS[skill].document(rng)
