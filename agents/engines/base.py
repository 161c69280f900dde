"""The engine protocol: token ids in, token ids and log-probs out; a row per episode, kept between its turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from agents.pictures import Picture
from policy_opt.protocols import Sampler

Key = tuple[int, ...]
"""Name of a row, for instance (group, member). Order of admission and of results is the order of keys."""

Stop = str
"""Why a turn ended. `stop`: a stop token was sampled; `length`: its token budget was used up; `context`: the row is
full; `error:REASON`: it was lost on its way from a server, which ends the episode, counted as a failure."""


class EngineFailure(RuntimeError):
    """An engine that cannot go on: its process or server is gone, or it does not hold the weights that it should.

    Ends the run with exit code 1; what to do stands in the message. The run goes on from its last checkpoint.
    `everywhere`: all processes of the run raise it, so that one is enough to say so.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


def stream(seed: Key) -> np.random.SeedSequence:
    """The random stream of a name; a negative number in it (groups beside training's have one) counts from 2^64."""
    return np.random.SeedSequence([int(n) if n >= 0 else (1 << 64) + int(n) for n in seed])


@dataclass(frozen=True)
class SampleParams:
    """How tokens are drawn. Recorded with every trajectory: the trainer must use the same convention.

    Log-probs are those of the softmax over all ids that may be sampled, at this temperature, *before* top-k
    and top-p cut it, so that they are comparable with the trainer's whatever the truncation.
    """

    temperature: float = 1.0
    """Softmax temperature; 0 takes the most likely token (log-probs are then those at temperature 1)."""
    top_k: int = 0
    """Draw among the k most likely ids only; 0 = no limit."""
    top_p: float = 1.0
    """Draw among the fewest ids whose probability reaches this share; 1 = no limit."""
    max_new_tokens: int = 128
    """Tokens per turn at most, the stop token included."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no limit) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def truncated(self) -> bool:
        """Whether tokens with positive probability may never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.temperature == 0


@dataclass(frozen=True)
class Sampled:
    """One turn as it left the sampler."""

    ids: tuple[int, ...]
    """Sampled ids, the stop token included where one was sampled."""
    logps: tuple[float, ...]
    """Log-prob of each id, in nats."""
    stop: Stop
    """Why the turn ended. `context` with no ids: the fed tokens left no room to sample a single one; `error:...` has
    none either."""


@runtime_checkable
class Engine(Protocol):
    """Samples turns for many rows at once. Rows are independent: no row's draw depends on its neighbours'."""

    rows: int
    """Rows that are worked on at the same time; more may be open, they wait in the order of their keys."""
    max_context: int
    """Tokens that a row may hold, fed and sampled together."""
    version: int
    """Version of the policy that samples."""

    def turn(
        self,
        key: Key,
        ids: Sequence[int],
        seed: Key,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Feed ids to row `key` (a new key opens a row), then sample one turn from the stream named by `seed`.

        `sampler`: temperature, and a rule that sets every token's own, in place of the engine's. `pictures`: those
        whose placeholders stand in `ids`, in order.
        """

    def run(self) -> list[tuple[Key, Sampled]]:
        """Advance until at least one row finished its turn; [] if none has a turn to finish. Ordered by key."""
        ...

    def close(self, key: Key) -> None:
        """Drop a row and what is kept for it; unknown keys are ignored."""

    def reset(self) -> None:
        """Drop all rows, for instance because the weights changed."""


@dataclass(frozen=True)
class Said:
    """One turn of a speaker without tokens."""

    text: str
    """The turn in the environment's call format; empty where there is none."""
    stop: str = "stop"
    """`stop`, `length`, or `error:...` where the speaker failed, which ends the episode."""
    tokens: int = 0
    """Tokens of the turn where the speaker counts them."""


class Voice(Protocol):
    """A speaker within one episode."""

    def __call__(self, messages: Sequence[Mapping[str, Any]], obs: Mapping[str, Any], max_new_tokens: int) -> Said:
        """The next turn, from the conversation so far and the last observation (new messages, tools)."""
        ...


class Speaker(Protocol):
    """Plays episodes in text: a server behind an endpoint, or a script."""

    def begin(self, env: Any, seed: Key) -> Voice:
        """A voice for one episode of `env`, which has been reset; `seed` = (run seed, group, member)."""
        ...
