"""Pictures in an engine that keeps keys and values: features by number, and names for placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.critic import decoder_of, trunk_of
from agents.engines.plan import Plan
from agents.engines.rows import Row
from agents.pictures import Picture, PictureFormat, placed
from agents.vision import Features, embedded, positions, see


class Gallery:
    """The pictures of an engine's rows under the weights of now.

    A placeholder of feature f is called -1 - f. Tokens of two rows are then equal exactly where their ids and what
    they show are, so that shared prefixes and equal openings are found as those of texts are.
    """

    def __init__(self, model: Any, pictures: PictureFormat):
        self.model, self.format = model, pictures
        self.reset()

    def reset(self) -> None:
        """Forget all pictures: the weights may have changed."""
        self._start: dict[int, int] = {}
        self._waiting: list[Picture] = []
        self._count = 0
        self._seen: Features | None = None

    def named(self, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
        """Ids with their placeholders' names. PictureError where pictures and placeholders do not fit."""
        out = list(ids)
        for start, picture in placed(ids, pictures, self.format.pad_id):
            if picture.key not in self._start:
                self._start[picture.key] = self._count
                self._count += picture.length
                self._waiting.append(picture)
            first = self._start[picture.key]
            out[start : start + picture.length] = range(-1 - first, -1 - first - picture.length, -1)
        return out

    def place(self, row: Row) -> None:
        """Note the rotary positions of everything that has been fed to a row."""
        if not row.pictures:
            return
        named_T = torch.tensor(row.ids)
        shown_T = named_T < 0
        ids_T = torch.where(shown_T, self.format.pad_id, named_T)
        grids = [torch.tensor(picture.grid) for picture in row.pictures]
        row.place_3T = positions(self.model, ids_T, shown_T, grids)
        row.delta = int(row.place_3T.max()) + 1 - len(row.ids)

    def forward(self, plan: Plan, **more: Any) -> Tensor:
        """Last hidden states [N, H] of a plan's tokens; `more` goes on to the decoder."""
        self._look()
        shown_1N = plan.ids_N[None] < 0
        ids_1N = plan.ids_N[None].clamp(min=0)
        some = plan.fed is not None and bool(shown_1N.any())  # what is sampled is no placeholder
        seen = self._seen if some else None
        fed = embedded(trunk_of(self.model), ids_1N, shown_1N, -1 - plan.ids_N[None], seen)
        out = decoder_of(self.model)(**fed, position_ids=plan.pos_N[:, None], **more)
        return out.last_hidden_state[0]

    def _look(self) -> None:
        """Run the tower over pictures that are new."""
        if not self._waiting:
            return
        new = see(trunk_of(self.model), {p.key: (p.patches_PD, torch.tensor(p.grid)) for p in self._waiting})
        self._waiting = []
        if self._seen is not None:
            deep = tuple(torch.cat(both) for both in zip(self._seen.deep, new.deep, strict=True))
            new = replace(new, embed_MH=torch.cat([self._seen.embed_MH, new.embed_MH]), deep=deep)
        self._seen = new
