"""Quantities of one micro-batch: each model's trunk runs once, then the chunked head at the places asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents.bank import Bank
from agents.critic import Critic
from agents.dist import World
from agents.forward import Convention, Positions, hidden_of
from agents.head import ExactKL, FullEntropy, Functional, Head, TargetLogProb, evaluate, top_k
from agents.packed import Layout
from agents.packed import hidden_of as hidden_of_packed
from agents.packing import Chunk, Part
from agents.prefix import Openings
from agents.vision import Sight
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError
from policy_opt.need import Entropy, Hidden, KLTo, LogProb, Mismatched, Need, Same, TopKIds, TopKLogProb, Value

SCALARS = (LogProb, Entropy, KLTo, Value)
"""Quantities that are one number per token: streams, which a gradient can be taken of."""
Lay = Callable[[Tensor], Tensor]
"""Lays one number per token of the rows out as they go through a model."""
Streams = dict[str, tuple[Tensor, Positions]]
"""By name: values `[N, ...]` and where they stand."""


@dataclass
class Models:
    """Models, the sampler's convention and the processes: what turning tokens into numbers depends on."""

    bank: Bank
    convention: Convention
    world: World

    def head(self, name: str, temperature: float) -> Head:
        """The model's head under the sampler's convention, at some rows' temperature."""
        return Head.of(self.bank[name].model, temperature, self.convention.banned)

    def check(self, need: Need) -> None:
        """RecipeError where a need cannot be served."""
        model = self.bank[need.model].model
        if not isinstance(need.view, (Same, Mismatched)):
            raise RecipeError(f"`{need.name}`: this learner has no view {need.view!r}")
        if isinstance(need.view, Mismatched) and (need.when == "loss" or need.where != "actions"):
            raise RecipeError(f"`{need.name}`: mismatched pairs are scored without gradient, on policy tokens only")
        if isinstance(need.what, Value) != isinstance(model, Critic) and not isinstance(need.what, Hidden):
            has = "values, no log-probs" if isinstance(model, Critic) else "no value head"
            raise RecipeError(f"`{need.name}` asks {need.what!r} of model `{need.model}`, which has {has}")
        if isinstance(need.what, KLTo):
            self.bank[need.what.model]
        if isinstance(need.what, Hidden) and need.what.layer != -1:
            raise RecipeError(f"`{need.name}`: this learner gives the last layer's hidden states only")


@dataclass
class Work:
    """One chunk in the works: its openings under each model are computed when first asked for."""

    models: Models
    b: Batch
    chunk: Chunk
    openings: dict[str, Openings] = field(default_factory=dict)

    def hidden(self, name: str, piece: Piece) -> Tensor:
        """Last hidden states of a micro-batch's own tokens under one model, as they were laid out, `[N, H]`."""
        model, world = self.models.bank[name].model, self.models.world
        with world.autocast():
            if piece.layout is not None:
                hidden_NH = hidden_of_packed(model, piece.own_RS, piece.layout, piece.sight)
            elif not int(self.chunk.length_G.max()):
                hidden_NH = hidden_of(model, piece.own_RS, piece.sight).flatten(0, 1)
            else:
                if name not in self.openings:
                    self.openings[name] = self._open(model, piece.own_RS.device)
                opening_R = piece.part.opening_R.to(piece.own_RS.device)
                hidden_NH = self.openings[name].hidden(piece.own_RS, opening_R, piece.sight).flatten(0, 1)
        return hidden_NH if world.precision is None else hidden_NH.to(world.precision)

    def _open(self, model: Any, device: torch.device) -> Openings:
        width = int(self.chunk.length_G.max())
        tokens_GP = self.b.tokens_BT[self.chunk.row_G, :width].to(device)
        sight = self.sight(self.chunk.row_G, width)
        return Openings(model, tokens_GP, self.chunk.length_G.to(device), sight and sight.to(device))

    def sight(self, rows_R: Tensor, width: int) -> Sight | None:
        """What the first tokens of some rows show; None in a batch without pictures."""
        if not self.b.media:
            return None
        some = self.b.rows(rows_R)
        model = self.models.bank.policy.model  # positions are a matter of configuration, equal for all of the bank
        always = self.models.world.sharding is not None
        return Sight.of(model, some.tokens_BT[:, :width], some["picture_BT"][:, :width], self.b.media, always)

    def push(self) -> None:
        """When all micro-batches of the chunk have had their backward pass: the openings'."""
        for openings in self.openings.values():
            openings.push()


class Piece:
    """One micro-batch: tokens on the models' device, the places that each `where` names, trunks once per model.

    Attributes:
        own_RS: tokens that go through a model beside the openings: rows without them, padded on the right; or where
            `layout` says how, everything end to end in one row.
        sight: what they show, where the batch has pictures.
        start_R: the hidden state of token t of row r is the (start_R[r] + t)-th.
    """

    def __init__(self, work: Work, part: Part, device: torch.device):
        self.work, self.part = work, part
        some = work.b.rows(part.rows_R)
        length_R = some.real_BT.sum(1).cpu()
        width = max(1, int(length_R.max()))
        self.tokens_RT = some.tokens_BT[:, :width].to(device)
        mask_RT, real_RT = some.mask_BT[:, :width].to(device), some.real_BT[:, :width].to(device)
        opening_RT = real_RT & (mask_RT.cumsum(1) == 0)
        self.places = {"actions": mask_RT, "prompt": opening_RT, "all": real_RT}
        self.trunks: dict[str, Tensor] = {}
        usual = work.models.convention.temperature
        self.temperature_R = some["temperature_B"].tolist() if "temperature_B" in some else [usual] * some.B
        self.layout: Layout | None = None
        lay, start_R = self._end_to_end(length_R) if work.chunk.packed else self._padded(length_R)
        self.own_RS = lay(self.tokens_RT)
        self.start_R = start_R.to(device)
        sight = work.sight(part.rows_R, width)
        self.sight = sight and sight.to(device).laid(lay)

    def _padded(self, length_R: Tensor) -> tuple[Lay, Tensor]:
        """Layout and start_R of padded rows; what is beyond a row's end is any token, nobody reads it."""
        rows, width = self.tokens_RT.shape
        offset_R = self.part.offset_R.cpu()
        if not offset_R.any():
            return lambda x_RT: x_RT, torch.arange(rows) * width
        own = int((length_R - offset_R).max())
        time_RS = (offset_R[:, None] + torch.arange(own)).clamp(max=width - 1).to(self.tokens_RT.device)
        return lambda x_RT: x_RT.gather(1, time_RS), torch.arange(rows) * own - offset_R

    def _end_to_end(self, length_R: Tensor) -> tuple[Lay, Tensor]:
        """Layout, `[1, N]`, and start_R of packed rows; sets `layout`."""
        lengths: list[int] = []
        openings: list[int] = []
        places: list[Tensor] = []
        start_R = torch.zeros_like(length_R)
        seen: dict[int, int] = {}
        width, at = self.tokens_RT.shape[1], 0
        triples = zip(length_R.tolist(), self.part.opening_R.tolist(), self.part.offset_R.tolist(), strict=True)
        for row, (length, opening, offset) in enumerate(triples):
            if offset and opening not in seen:
                seen[opening] = len(lengths)
                lengths.append(offset)
                openings.append(-1)
                places.append(row * width + torch.arange(offset))
                at += offset
            start_R[row] = at - offset
            lengths.append(length - offset)
            openings.append(seen[opening] if offset else -1)
            places.append(row * width + torch.arange(offset, length))
            at += length - offset
        device = self.tokens_RT.device
        self.layout = Layout(tuple(lengths), tuple(openings), device)
        place_N = torch.cat(places).to(device)
        return lambda x_RT: x_RT.flatten()[place_N][None], start_R

    def streams(self, needs: Sequence[Need]) -> Streams:
        """Every need's values and where they stand. Needs alone decide which models are run, and in which order."""
        out: Streams = {}
        for model in dict.fromkeys(need.model for need in needs):
            of_model = [need for need in needs if need.model == model]
            out |= self.work.models.bank[model].run(partial(self._of_model, model, of_model))
        return out

    def _of_model(self, model: str, needs: Sequence[Need]) -> Streams:
        """Quantities of one model, as tensors of their own."""
        out: Streams = {}
        for where in dict.fromkeys(need.where for need in needs):
            there = [need for need in needs if need.where == where]
            out |= self._at_each_temperature(model, self.places[where], there)
        return {name: (value.clone() if value._is_view() else value, at) for name, (value, at) in out.items()}

    def _at_each_temperature(self, model: str, wanted_RT: Tensor, needs: Sequence[Need]) -> Streams:
        """Quantities of one model where they are wanted; rows of one temperature together."""
        found: list[Streams] = []
        for temperature in sorted(set(self.temperature_R)):
            here_R = torch.tensor([t == temperature for t in self.temperature_R], device=wanted_RT.device)
            at = Positions.where(wanted_RT & here_R[:, None])
            found.append({n: (value, at) for n, value in self._evaluate(model, at, needs, temperature).items()})
        if len(found) == 1:
            return found[0]
        at = Positions.join([next(iter(streams.values()))[1] for streams in found])
        return {need.name: (torch.cat([streams[need.name][0] for streams in found]), at) for need in needs}

    def _before(self, name: str, at: Positions) -> Tensor:
        """Hidden states of a model that predict the tokens at some places, `[N, H]`."""
        if name not in self.trunks:
            self.trunks[name] = self.work.hidden(name, self)
        return self.trunks[name][self.start_R[at.row_N] + at.time_N - 1]

    def _evaluate(self, name: str, at: Positions, needs: Sequence[Need], temperature: float) -> dict[str, Tensor]:
        """Quantities `[N, ...]` of one model at some places; distributions in one pass over the head."""
        models, hidden_NH = self.work.models, self._before(name, at)
        out: dict[str, Tensor] = {}
        asked: dict[str, Functional] = {}
        for need in needs:
            what = need.what
            if isinstance(what, Value):
                out[need.name] = models.bank[name].model.value_N(hidden_NH)
            elif isinstance(what, LogProb):
                asked[need.name] = TargetLogProb(at.take(self.tokens_RT))
            elif isinstance(what, Entropy):
                asked[need.name] = FullEntropy(what.floor)
            elif isinstance(what, KLTo):
                with torch.no_grad():
                    other = models.bank[what.model] if what.model != name else None
                    look = partial(self._before, what.model, at)
                    other_NH = other.run(look) if other else look()
                asked[need.name] = ExactKL(other_NH, models.head(what.model, temperature))
            elif isinstance(what, (TopKLogProb, TopKIds)):
                pair = top_k(models.head(name, temperature), hidden_NH, what.k)
                out[need.name] = pair[0] if isinstance(what, TopKLogProb) else pair[1]
            else:
                out[need.name] = hidden_NH
        if asked:
            values_FN = evaluate(models.head(name, temperature), hidden_NH, list(asked.values()))
            out |= dict(zip(asked, values_FN, strict=True))
        return out


def backward(streams: Streams, cotangents: Mapping[str, Tensor]) -> None:
    """Accumulate the gradient of sum(cotangent * stream)."""
    loss: Tensor | None = None
    for name, cotangent_RT in cotangents.items():
        value_N, at = streams[name]
        term = (at.take(cotangent_RT.to(value_N.device)).to(value_N.dtype) * value_N).sum()
        loss = term if loss is None else loss + term
    if loss is not None and loss.requires_grad:
        loss.backward()
