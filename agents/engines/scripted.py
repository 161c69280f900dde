"""An environment's own scripts (oracle, random, demonstrators, hacks) as speakers."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from agents.engines.base import Key, Said, Voice, stream


class UnknownScript(ValueError):
    """The environment has no script of this name."""


class Scripted:
    """Plays one of the environment's scripts, or a mixture of them.

    Args:
        script: a name in `env.scripts`, `env.hacks`; or weights by name, from which each episode draws one.
    """

    def __init__(self, script: str | Mapping[str, float]) -> None:
        self.weights = {script: 1.0} if isinstance(script, str) else dict(script)
        if not self.weights:
            raise UnknownScript("no script was named")

    def begin(self, env: Any, seed: Key) -> Voice:
        """A voice that runs the script from its first action; its random choices derive from `seed`.

        Raises:
            UnknownScript: the environment does not have it.
        """
        rng = np.random.default_rng(stream(seed))
        names = sorted(self.weights)
        weights = np.array([self.weights[name] for name in names], dtype=float)
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))] if len(names) > 1 else names[0]
        core = getattr(env, "unwrapped", env)
        known = {**core.scripts, **core.hacks}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(sorted(known))}"
            raise UnknownScript(f"{type(core).__name__} has no script `{name}`{hint}")
        return _Playing(known[name](core, rng))


class _Playing:
    """One run of a script: a coroutine that yields action texts and is sent observations."""

    def __init__(self, script: Generator[str, Mapping[str, Any], None]) -> None:
        self._script = script
        self._started = False

    def __call__(self, messages: Sequence[Mapping[str, Any]], obs: Mapping[str, Any], max_new_tokens: int) -> Said:
        try:
            text = self._script.send(obs) if self._started else next(self._script)
        except StopIteration:
            return Said("", "error:script_ended")
        self._started = True
        return Said(text)
