"""The model side of training: scores a batch, pushes cotangents through it, steps the optimizers.

A loss is evaluated by `policy_opt` on streams of the whole optimizer batch; what arrives here is its gradient with
respect to each stream. The backward pass of a micro-batch is that of `sum(cotangent * stream)`, so the accumulated
gradient does not depend on padding, split, row order or the number of processes (up to rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from agents.activations import can_recompute, recomputed
from agents.bank import Bank, Member
from agents.cli import UsageError
from agents.config import OptimConfig
from agents.dist import World
from agents.forward import Convention
from agents.memory import Gradients, in_halves
from agents.packed import can_pack, kernel
from agents.packing import Chunk, Part, idle, plan
from agents.pairing import mismatched
from agents.prefix import can_share
from agents.streams import SCALARS, Models, Piece, Streams, Work, backward
from policy_opt.bank import ModelSpec, Optim
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError
from policy_opt.need import Hidden, LogProb, Mismatched, Need, TopKIds, TopKLogProb, Value
from policy_opt.protocols import Pull


class LMLearner:
    """`policy_opt.loop.Learner` for a transformers causal LM and the models beside it.

    Args:
        model: the policy; the engine samples from this very object.
        config: the policy's optimizer; models of the bank with an optimizer of their own take its name and rate
            from their `ModelSpec`, the rest from here.
        convention: temperature and banned ids of the sampler.
        world: the processes; each works on its share of the rows.
        micro_tokens: tokens of a micro-batch, padding included.
        share: compute an opening once for the rows that begin with it, where the models can.
        packing: rows end to end without padding; auto: where the models can and fewer tokens go through them.
        recompute: keep no activations inside layers. Padded rows then share no openings, which would need a cache.

    Attributes:
        version: optimizer steps so far.
        oom_splits: micro-batches of this process that were halved for want of memory, not yet counted.
        streams: what the last backward pass saw, `[B, T]` by name.
    """

    def __init__(
        self,
        model: Any,
        config: OptimConfig | None = None,
        *,
        convention: Convention | None = None,
        world: World | None = None,
        micro_tokens: int = 4096,
        share: bool = True,
        packing: Literal["auto", "always", "never"] = "auto",
        recompute: bool = False,
    ):
        self.model = model
        self.world = world or World()
        self.bank = Bank(model, config or OptimConfig(), self.world)
        self.models = Models(self.bank, convention or Convention(), self.world)
        self.micro_tokens, self.share, self.packing, self.recompute = micro_tokens, share, packing, recompute
        self.oom_splits = 0
        self.version = 0
        self.streams: dict[str, Tensor] = {}
        self.device = next(model.parameters()).device

    @property
    def lr(self) -> float:
        """Learning rate of the policy's next step, before the recipe's factor."""
        return self.bank.policy.rate()

    def prepare(self, models: Mapping[str, ModelSpec], needs: Sequence[Need], optimizer: Optim | None) -> None:
        """Build the bank's models that are not there yet; RecipeError where a model or need cannot be served."""
        self.bank.prepare(models, optimizer)
        for need in needs:
            self.models.check(need)

    def settle(self) -> tuple[str, ...]:
        """Try what the policy can do of the options: notes on what was chosen. UsageError on what it cannot."""
        name, notes = type(self.model).__name__, []
        packs = self.packing != "never" and self.packs(self.bank.policy)
        if self.packing == "always" and not packs:
            raise UsageError(f"--packing always: {name} attends otherwise than packed rows can: leave the option out")
        if self.packing == "auto" and not packs:
            notes.append(f"rows are padded, not packed end to end: {name} attends otherwise")
        if packs and self.device.type != "cpu":
            used = kernel(self.device, self.world.precision or self.model.dtype)
            notes.append(f"rows are packed end to end where that saves work; attention by {used}")
        if self.recompute:
            with self.bank.policy.whole() as model:
                if not can_recompute(model):
                    raise UsageError(
                        f"--recompute: the layers of {name} cannot be computed again: leave the option out"
                    )
        if self.recompute and not packs and self.share:
            notes.append("--recompute: the openings of padded rows are computed with every row")
        return tuple(notes)

    def count_splits(self) -> int:
        """Micro-batches that were halved since the last call, in all processes; all of them call this."""
        count, self.oom_splits = sum(self.world.gather(self.oom_splits)), 0
        return count

    # ------------------------------------------------------------------ needs

    @torch.no_grad()
    def score(self, b: Batch, needs: Sequence[Need]) -> dict[str, Tensor]:
        """Every need's quantity for every row, without gradient: `[B, T]` (or `[B, T, K]`), zero where not asked."""
        out: dict[str, Tensor] = {}
        for view in dict.fromkeys(need.view for need in needs):
            some = [need for need in needs if need.view == view]
            if isinstance(view, Mismatched):
                mixed = mismatched(b, view.shift)
                out |= mixed.place(self._score(mixed.batch, some))
            else:
                out |= self._score(b, some)
        return out

    def _score(self, b: Batch, needs: Sequence[Need]) -> dict[str, Tensor]:
        """Quantities of the batch's rows as they stand."""
        out = self._blank(b, needs)
        everyone_B = torch.ones(b.B, dtype=torch.bool, device=b.tokens_BT.device)

        def look(chunk: Chunk) -> None:
            work = Work(self.models, b, chunk)
            for part in chunk.parts:
                _show(Piece(work, part, self.device).streams(needs), part, out)

        self._through(b, self._plan(b, needs, everyone_B), look)
        self.world.sum_(out.values())
        return out

    def backward(self, b: Batch, needs: Sequence[Need], pull: Pull) -> dict[str, Tensor]:
        """Accumulate the gradient of a loss whose cotangents `pull(rows, live values)` names; return the streams.

        `pull` is a pure function of row indices and the streams of these rows, detached, `[R, T]`; it returns
        d loss / d stream of the same shapes. Streams that it leaves out are constants. The streams that are
        returned, `[B, T]`, are the same on every process.

        Rows without gradient (groups whose advantages are all zero) are guessed from the sampler's log-probs and
        only looked at: a forward without gradient, by which the guess is confirmed.
        """
        for need in needs:
            if not isinstance(need.what, SCALARS):
                raise RecipeError(f"`{need.name}`: a {type(need.what).__name__} has no gradient stream")
        out = self._blank(b, needs)
        busy_B = self._guess_busy(b, needs, pull)
        chunks = [*self._look(b, needs, pull, ~busy_B, out), *self._plan(b, needs, busy_B)]
        trained = [member for member in self.bank.members.values() if member.optimizer is not None]
        grads = Gradients(p for member in trained for p in member.parameters())

        def push(chunk: Chunk) -> None:
            work = Work(self.models, b, chunk)
            for part in chunk.parts:
                live = Piece(work, part, self.device).streams(needs)
                cotangents = self._cotangents(live, part, pull, out)
                grads.begin()
                backward(live, cotangents)
            work.push()
            grads.done()

        with recomputed(member.model for member in trained) if self.recompute else nullcontext():
            self._through(b, chunks, push, grads)
        grads.add_up()
        self.world.sum_(out.values())
        self.streams = out
        return out

    def _through(
        self, b: Batch, chunks: Sequence[Chunk], work: Callable[[Chunk], None], grads: Gradients | None = None
    ) -> None:
        """Work on all chunks, in halves where memory does not suffice; NoRoom where a row alone is too much.

        Where models are split over processes, all make the same number of passes.
        """
        if self.world.sharding is not None:
            chunks = [*chunks, *[idle(b)] * (max(self.world.gather(len(chunks))) - len(chunks))]
        length_B = b.real_BT.sum(1).tolist()
        undone = grads.undone if grads else lambda: False
        try:
            self.oom_splits += in_halves(chunks, length_B, work, undone, alone=self.world.sharding is None)
        finally:
            self.bank.rest()

    def _cotangents(self, live: Streams, part: Part, pull: Pull, out: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `pull` says of some rows. In split models every stream has its backward pass, on every process."""
        shown = _show(live, part, out)
        found = {} if part.idle else pull(part.rows_R, shown)
        if self.world.sharding is None:
            return found
        return {name: found[name] if name in found else torch.zeros_like(shown[name]) for name in shown}

    def _guess_busy(self, b: Batch, needs: Sequence[Need], pull: Pull) -> Tensor:
        """`[B]`: rows that would have a gradient if the policy were still the sampler's."""
        guess = self._blank(b, needs)
        for need in needs:
            if isinstance(need.what, LogProb) and need.model == "policy":
                guess[need.name] += b.logp_sampler_BT * b.mask_BT
        busy_B = torch.zeros(b.B, dtype=torch.bool, device=b.tokens_BT.device)
        for cotangent_BT in pull(torch.arange(b.B, device=busy_B.device), guess).values():
            busy_B |= (cotangent_BT != 0).any(1)
        return busy_B

    @torch.no_grad()
    def _look(
        self, b: Batch, needs: Sequence[Need], pull: Pull, which_B: Tensor, out: Mapping[str, Tensor]
    ) -> list[Chunk]:
        """Streams of rows that should have no gradient, noted in `out`; those that do have one, as chunks."""
        surprised: list[Chunk] = []

        def look(chunk: Chunk) -> None:
            work = Work(self.models, b, chunk)
            pulls = [
                self._cotangents(Piece(work, part, self.device).streams(needs), part, pull, out)
                for part in chunk.parts
            ]
            if any(bool(cotangent.any()) for found in pulls for cotangent in found.values()):
                surprised.append(chunk)

        self._through(b, self._plan(b, needs, which_B), look)
        return surprised

    def step(self, lr_scale: float = 1.0) -> dict[str, float]:
        """Sum gradients over processes, clip, step every optimizer, clear. Returns gradient norms before clipping.

        A gradient that is not finite skips that model's step and is counted in `skipped`.
        """
        metrics: dict[str, float] = {"skipped": 0.0}
        for name, member in self.bank.members.items():
            if member.optimizer is not None:
                norm = member.step(self.world, lr_scale)
                metrics["grad_norm" if name == "policy" else f"grad_norm_{name}"] = norm
                metrics["skipped"] += 0.0 if math.isfinite(norm) else 1.0
        self.version += 1
        return metrics

    def sync(self, name: str, decay: float = 0.0) -> None:
        """Model `name` of the bank becomes decay * itself + (1 - decay) * policy."""
        self.bank.sync(name, decay)

    # ------------------------------------------------------------------ shapes and shares

    def _plan(self, b: Batch, needs: Sequence[Need], which_B: Tensor) -> list[Chunk]:
        """This process' work on some rows. Rows without an action are left out where only actions are asked for."""
        for need in needs:
            self.models.check(need)
        actions = all(need.where == "actions" for need in needs)
        if actions:
            which_B = which_B & b.mask_BT.any(1)
        members = [self.bank[name] for name in sorted(self._names(needs))]
        shares = self.share and actions
        if self.packing == "never" or not all(map(self.packs, members)):
            shares = shares and not self.recompute and all(map(self.shares, members))
            return plan(b, which_B, self.micro_tokens, self.world, shares)
        pack = self.packing
        if pack == "auto" and shares and (self.recompute or not all(map(self.shares, members))):
            pack = "always"  # padded, openings could not be shared
        return plan(b, which_B, self.micro_tokens, self.world, shares, pack)

    def _names(self, needs: Sequence[Need]) -> set[str]:
        """Models that the needs speak of."""
        return {need.model for need in needs} | {getattr(need.what, "model", need.model) for need in needs}

    def packs(self, member: Member) -> bool:
        """Whether a model can take rows end to end, tried once on the very model."""
        if member.packs is None:
            with self.world.autocast(), member.whole() as model:
                member.packs = can_pack(model)
        return member.packs

    def shares(self, member: Member) -> bool:
        """Whether a model can compute an opening once for several padded rows, tried once."""
        if member.shares is None:
            member.shares = member.sharded is None and can_share(member.model)
        return member.shares

    def _blank(self, b: Batch, needs: Sequence[Need]) -> dict[str, Tensor]:
        """Zeros of the needs' shapes and types, on the batch's device."""
        weight_VH = self.model.get_output_embeddings().weight
        out = {}
        for need in needs:
            tail: tuple[int, ...] = ()
            dtype = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
            if isinstance(need.what, (TopKLogProb, TopKIds)):
                tail = (min(need.what.k, weight_VH.shape[0]),)
                dtype = torch.long if isinstance(need.what, TopKIds) else dtype
            elif isinstance(need.what, (Hidden, Value)):
                tail = (weight_VH.shape[1],) if isinstance(need.what, Hidden) else ()
                dtype = weight_VH.dtype
            out[need.name] = torch.zeros((b.B, b.T, *tail), dtype=dtype, device=b.tokens_BT.device)
        return out

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer states and counters of every model."""
        return {"version": self.version, "members": self.bank.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; RecipeError where the bank's names differ, CheckpointError where tensors do."""
        self.version = state["version"]
        self.bank.load_state_dict(state["members"])


def _show(live: Streams, part: Part, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Streams of some rows as `pull` sees them, `[R, T, ...]`; they are noted in `out`."""
    shown = {}
    for name, (value, at) in live.items():
        whole = out[name]
        spread = whole.new_zeros((len(part.rows_R), *whole.shape[1:]))
        spread[at.row_N.to(whole.device), at.time_N.to(whole.device)] = value.detach().to(whole)
        if not part.idle:
            whole[part.rows_R] = spread
        shown[name] = spread
    return shown
