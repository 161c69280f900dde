"""From token rows to per-token streams: which positions are needed, one trunk pass, the chunked head.

Entry t of a stream speaks of token t, so a log-prob at t is read from the hidden state at t − 1. Rows are padded on
the right; under causal attention padding cannot reach a real token, so no attention mask is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.vision import Sight, feed


@dataclass(frozen=True)
class Convention:
    """The sampler's convention, which the trainer must share."""

    temperature: float = 1.0
    """Softmax temperature; logits are divided by it."""
    banned: tuple[int, ...] = ()
    """Ids that may never be sampled."""


@dataclass(frozen=True)
class Positions:
    """N places in a micro-batch of b rows: token `time_N[i]` of row `row_N[i]`, never the first token of a row."""

    row_N: Tensor
    time_N: Tensor

    @classmethod
    def where(cls, wanted_bT: Tensor) -> Positions:
        """The places where a mask is set; a row's first token has no prediction and is left out."""
        row_N, time_N = wanted_bT[:, 1:].nonzero(as_tuple=True)
        return cls(row_N, time_N + 1)

    @classmethod
    def join(cls, places: Sequence[Positions]) -> Positions:
        """All of them, one after the other."""
        return cls(torch.cat([p.row_N for p in places]), torch.cat([p.time_N for p in places]))

    def __len__(self) -> int:
        return self.row_N.numel()

    def take(self, x_bT: Tensor) -> Tensor:
        """Entries of a per-token tensor, `[N]`."""
        return x_bT[self.row_N, self.time_N]


def hidden_of(model: nn.Module, tokens_bT: Tensor, sight: Sight | None = None) -> Tensor:
    """Last hidden states `[b, T, H]` of right-padded rows; `sight`: of those that show pictures."""
    return feed(model, tokens_bT, sight, use_cache=False).last_hidden_state
