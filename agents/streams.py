"""Quantities of one micro-batch: each model's trunk runs once, then the chunked head at the places asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agents.bank import Bank
from agents.critic import Critic
from agents.dist import World
from agents.forward import Convention, Positions, hidden_of
from agents.head import ExactKL, FullEntropy, Functional, Head, TargetLogProb, evaluate, top_k
from agents.packing import Chunk, Part
from agents.prefix import Openings
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError
from policy_opt.need import Entropy, Hidden, KLTo, LogProb, Mismatched, Need, Same, TopKIds, TopKLogProb, Value

SCALARS = (LogProb, Entropy, KLTo, Value)
"""Quantities that are one number per token: streams, which a gradient can be taken of."""
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

    def hidden(self, name: str, tokens_RS: Tensor, part: Part) -> Tensor:
        """Last hidden states of a micro-batch's own tokens under one model, `[R, S, H]`."""
        model, world = self.models.bank[name].model, self.models.world
        with world.autocast():
            if not int(self.chunk.length_G.max()):
                hidden_RSH = hidden_of(model, tokens_RS)
            else:
                if name not in self.openings:
                    self.openings[name] = self._open(model, tokens_RS.device)
                hidden_RSH = self.openings[name].hidden(tokens_RS, part.opening_R.to(tokens_RS.device))
        return hidden_RSH if world.precision is None else hidden_RSH.to(world.precision)

    def _open(self, model: Any, device: torch.device) -> Openings:
        width = int(self.chunk.length_G.max())
        tokens_GP = self.b.tokens_BT[self.chunk.row_G, :width].to(device)
        return Openings(model, tokens_GP, self.chunk.length_G.to(device))

    def push(self) -> None:
        """When all micro-batches of the chunk have had their backward pass: the openings'."""
        for openings in self.openings.values():
            openings.push()


class Piece:
    """One micro-batch: tokens on the models' device, the places that each `where` names, trunks once per model."""

    def __init__(self, work: Work, part: Part, device: torch.device):
        self.work, self.part = work, part
        some = work.b.rows(part.rows_R)
        width = max(1, int(some.real_BT.sum(1).max()))
        self.tokens_RT = some.tokens_BT[:, :width].to(device)
        self.offset_R = part.offset_R.to(device)
        mask_RT, real_RT = some.mask_BT[:, :width].to(device), some.real_BT[:, :width].to(device)
        opening_RT = real_RT & (mask_RT.cumsum(1) == 0)
        self.places = {"actions": mask_RT, "prompt": opening_RT, "all": real_RT}
        self.trunks: dict[str, Tensor] = {}
        usual = work.models.convention.temperature
        self.temperature_R = some["temperature_B"].tolist() if "temperature_B" in some else [usual] * some.B

    def streams(self, needs: Sequence[Need]) -> Streams:
        """Every need's values and where they stand."""
        groups: dict[tuple[str, str], list[Need]] = {}
        for need in needs:
            groups.setdefault((need.model, need.where), []).append(need)
        out: Streams = {}
        for (model, where), group in groups.items():
            out |= self._at_each_temperature(model, self.places[where], group)
        return out

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
            self.trunks[name] = self.work.hidden(name, self._own_tokens(), self.part)
        return self.trunks[name][at.row_N, at.time_N - 1 - self.offset_R[at.row_N]]

    def _own_tokens(self) -> Tensor:
        """The rows without their openings, `[R, S]`; what is beyond a row's end is any token, nobody reads it."""
        rows, width = self.tokens_RT.shape
        if not self.offset_R.any():
            return self.tokens_RT
        own = width - int(self.offset_R.min())
        time_RS = self.offset_R[:, None] + torch.arange(own, device=self.tokens_RT.device)
        own_RS = self.tokens_RT.gather(1, time_RS.clamp(max=width - 1))
        return own_RS[:, : int((self.places["all"].sum(1) - self.offset_R).max())].reshape(rows, -1)

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
                    other_NH = self._before(what.model, at)
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
