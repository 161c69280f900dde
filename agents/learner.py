"""The model side of training: scores a batch, pushes cotangents through it, steps the optimizers.

A loss is evaluated by `policy_opt` on streams of the whole optimizer batch; what arrives here is its gradient with
respect to each stream. The backward pass of a micro-batch is that of `sum(cotangent * stream)`, so the accumulated
gradient does not depend on padding, split, row order or the number of processes (up to rounding).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agents import optim
from agents.config import OptimConfig
from agents.critic import Critic, trunk_of
from agents.dist import World
from agents.forward import Convention, Positions, hidden_of, micro_batches
from agents.head import ExactKL, FullEntropy, Functional, Head, TargetLogProb, evaluate, top_k
from policy_opt.bank import ModelSpec, Optim
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError, unknown
from policy_opt.need import Entropy, Hidden, KLTo, LogProb, Need, Same, TopKIds, TopKLogProb, Value
from policy_opt.protocols import Pull

_SCALARS = (LogProb, Entropy, KLTo, Value)


@dataclass
class Member:
    """A model of the bank, the policy included."""

    model: nn.Module
    """A causal LM, or a Critic."""
    config: OptimConfig
    """How it is stepped."""
    optimizer: torch.optim.Optimizer | None
    """None: frozen."""
    spec: ModelSpec | None = None
    """What the recipe said of it; None for the policy."""
    steps: int = 0
    """Optimizer steps so far."""

    def rate(self) -> float:
        """Learning rate of the next step, warm-up included."""
        warm = min(1.0, (self.steps + 1) / self.config.warmup) if self.config.warmup else 1.0
        return self.config.lr * warm

    def parameters(self) -> list[nn.Parameter]:
        """What its optimizer steps."""
        return [p for p in self.model.parameters() if p.requires_grad]


class LMLearner:
    """`policy_opt.loop.Learner` for a transformers causal LM and the models beside it.

    Args:
        model: the policy; the engine samples from this very object.
        config: the policy's optimizer; models of the bank with an optimizer of their own take its name and rate
            from their `ModelSpec`, the rest from here.
        convention: temperature and banned ids of the sampler.
        world: the processes; each works on its share of the rows.
        micro_tokens: tokens of a micro-batch, padding included.

    Attributes:
        version: optimizer steps so far.
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
    ):
        self.model = model
        self.config = config = config or OptimConfig()
        self.convention = convention or Convention()
        self.world = world or World()
        self.micro_tokens = micro_tokens
        self.version = 0
        self.streams: dict[str, Tensor] = {}
        self.device = next(model.parameters()).device
        self.members: dict[str, Member] = {"policy": Member(model, config, optim.build(model, config))}

    @property
    def lr(self) -> float:
        """Learning rate of the policy's next step, before the recipe's factor."""
        return self.members["policy"].rate()

    def prepare(self, models: Mapping[str, ModelSpec], needs: Sequence[Need], optimizer: Optim | None) -> None:
        """Build the bank's models that are not there yet; RecipeError where a model or need cannot be served."""
        policy = self.members["policy"]
        wanted = _merged(optimizer, self.config) if optimizer is not None else self.config
        if wanted != policy.config:
            policy.config, policy.optimizer = wanted, optim.build(self.model, wanted)
        for name, spec in models.items():
            if name not in self.members:
                self.members[name] = self._member(name, spec)
            elif self.members[name].spec != spec:
                raise RecipeError(f"model `{name}` of the bank is declared twice: {self.members[name].spec}, {spec}")
        for need in needs:
            self._check(need)

    def _member(self, name: str, spec: ModelSpec) -> Member:
        if spec.role == "critic":
            model: nn.Module = Critic(self.model)
        elif spec.role == "copy" and spec.source == "policy":
            model = copy.deepcopy(self.model)
        elif spec.role in ("copy", "teacher", "reward"):
            from agents.models import load_model

            model = load_model(spec.source, next(self.model.parameters()).dtype)[0].to(self.device)
        else:
            raise RecipeError(f"model `{name}` of the bank: a language-model learner cannot build a {spec.role}")
        if spec.optimizer is None:
            return Member(model.requires_grad_(False), self.config, None, spec)
        own = _merged(spec.optimizer, self.config)
        return Member(model, own, optim.build(model, own), spec)

    # ------------------------------------------------------------------ needs

    @torch.no_grad()
    def score(self, b: Batch, needs: Sequence[Need]) -> dict[str, Tensor]:
        """Every need's quantity for every row, without gradient: `[B, T]` (or `[B, T, K]`), zero where not asked."""
        out = {need.name: self._blank(b, need) for need in needs}
        everyone_B = torch.ones(b.B, dtype=torch.bool, device=b.tokens_BT.device)
        for rows_R in self._share(b, everyone_B):
            for name, value in self._streams(b.rows(rows_R), needs).items():
                out[name][rows_R, : value.shape[1]] = value
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
            if not isinstance(need.what, _SCALARS):
                raise RecipeError(f"`{need.name}`: a {type(need.what).__name__} has no gradient stream")
        out = {need.name: self._blank(b, need) for need in needs}
        busy_B = self._guess_busy(b, needs, pull)
        wrong: list[Tensor] = []
        for rows_R in self._share(b, ~busy_B):
            with torch.no_grad():
                live = self._live(b.rows(rows_R), needs)
            if not _nonzero(pull(rows_R, self._show(live, rows_R, b.T, out))):
                continue
            wrong.append(rows_R)
        for rows_R in (*wrong, *self._share(b, busy_B)):
            live = self._live(b.rows(rows_R), needs)
            cotangents = pull(rows_R, self._show(live, rows_R, b.T, out))
            _push([(live[name], cotangent_RT) for name, cotangent_RT in cotangents.items()])
        self.world.sum_(out.values())
        self.streams = out
        return out

    def _guess_busy(self, b: Batch, needs: Sequence[Need], pull: Pull) -> Tensor:
        """`[B]`: rows that would have a gradient if the policy were still the sampler's."""
        guess = {need.name: self._blank(b, need) for need in needs}
        for need in needs:
            if isinstance(need.what, LogProb) and need.model == "policy":
                guess[need.name] += b.logp_sampler_BT * b.mask_BT
        busy_B = torch.zeros(b.B, dtype=torch.bool, device=b.tokens_BT.device)
        for cotangent_BT in pull(torch.arange(b.B, device=busy_B.device), guess).values():
            busy_B |= (cotangent_BT != 0).any(1)
        return busy_B

    def _show(
        self, live: Mapping[str, tuple[Tensor, Positions]], rows_R: Tensor, width: int, out: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Streams of some rows as `pull` sees them, `[R, width]`; they are noted in `out`."""
        shown = {}
        for name, (value_N, at) in live.items():
            shown[name] = at.spread(value_N.detach(), len(rows_R), width).to(out[name].device)
            out[name][rows_R] = shown[name]
        return shown

    def step(self, lr_scale: float = 1.0) -> dict[str, float]:
        """Sum gradients over processes, clip, step every optimizer, clear. Returns gradient norms before clipping.

        A gradient that is not finite skips that model's step and is counted in `skipped`.
        """
        metrics: dict[str, float] = {"skipped": 0.0}
        for name, member in self.members.items():
            if member.optimizer is None:
                continue
            norm = self._step_one(member, lr_scale)
            metrics["grad_norm" if name == "policy" else f"grad_norm_{name}"] = norm
            metrics["skipped"] += 0.0 if math.isfinite(norm) else 1.0
        self.version += 1
        return metrics

    def _step_one(self, member: Member, lr_scale: float) -> float:
        parameters = member.parameters()
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        self.world.sum_(grads)
        norm = float(torch.nn.utils.get_total_norm(grads))
        if math.isfinite(norm):
            if 0 < member.config.clip < norm:
                torch._foreach_mul_(grads, member.config.clip / norm)
            assert member.optimizer is not None
            for group in member.optimizer.param_groups:
                group["lr"] = member.rate() * lr_scale
            member.optimizer.step()
        member.steps += 1
        for p in parameters:
            p.grad = None
        return norm

    # ------------------------------------------------------------------ the bank

    @torch.no_grad()
    def sync(self, name: str, decay: float = 0.0) -> None:
        """Model `name` of the bank becomes decay * itself + (1 - decay) * policy."""
        source = trunk_of(self.model) if isinstance(self._get(name).model, Critic) else self.model
        target = trunk_of(self._get(name).model) if isinstance(self._get(name).model, Critic) else self._get(name).model
        for old, new in zip(target.parameters(), source.parameters(), strict=True):
            old.copy_(new) if decay == 0 else old.mul_(decay).add_(new, alpha=1 - decay)

    def _get(self, name: str) -> Member:
        if name not in self.members:
            raise RecipeError(unknown("model of the bank", name, self.members))
        return self.members[name]

    # ------------------------------------------------------------------ forwards

    def _blank(self, b: Batch, need: Need) -> Tensor:
        """Zeros of a need's shape and type, on the batch's device."""
        shape = (b.B, b.T, *self._tail(need.what))
        return torch.zeros(shape, dtype=self._dtype(need.what), device=b.tokens_BT.device)

    def _share(self, b: Batch, which_B: Tensor) -> list[Tensor]:
        """This process' micro-batches of the named rows."""
        rows_R = which_B.nonzero(as_tuple=True)[0]
        length_R = b.real_BT.sum(1)[rows_R]
        budget = self.micro_tokens
        if self.world.size > 1:  # enough pieces for everybody
            budget = min(budget, max(1, math.ceil(int(length_R.sum()) / self.world.size)))
        return self.world.share([rows_R[part] for part in micro_batches(length_R, budget)])

    def _streams(self, part: Batch, needs: Sequence[Need]) -> dict[str, Tensor]:
        """Quantities of some rows, spread to `[R, T', ...]` with T' the longest of these rows."""
        tokens_RT, masks = self._cut(part)
        trunks = _Trunks(self, tokens_RT)
        out: dict[str, Tensor] = {}
        for (model, where), group in self._grouped(needs).items():
            at = Positions.where(masks[where])
            for name, value in self._evaluate(model, trunks, at, group).items():
                spread = value.new_zeros((*tokens_RT.shape, *value.shape[1:]))
                spread[at.row_N, at.time_N] = value
                out[name] = spread.to(part.tokens_BT.device)
        return out

    def _live(self, part: Batch, needs: Sequence[Need]) -> dict[str, tuple[Tensor, Positions]]:
        """Quantities with gradient, `[N]`, and where they stand. Values stay on the model's device."""
        tokens_RT, masks = self._cut(part)
        trunks = _Trunks(self, tokens_RT)
        out: dict[str, tuple[Tensor, Positions]] = {}
        for (model, where), group in self._grouped(needs).items():
            at = Positions.where(masks[where])
            values = self._evaluate(model, trunks, at, group)
            out |= {name: (value, at) for name, value in values.items()}
        return out

    def _cut(self, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens of the rows without common padding, and the positions that each `where` names."""
        width = max(1, int(part.real_BT.sum(1).max()))
        tokens_RT = part.tokens_BT[:, :width].to(self.device)
        mask_RT = part.mask_BT[:, :width].to(self.device)
        real_RT = part.real_BT[:, :width].to(self.device)
        opening_RT = real_RT & (mask_RT.cumsum(1) == 0)
        return tokens_RT, {"actions": mask_RT, "prompt": opening_RT, "all": real_RT}

    def _check(self, need: Need) -> None:
        """RecipeError where a need cannot be served."""
        model = self._get(need.model).model
        if not isinstance(need.view, Same):
            raise RecipeError(f"`{need.name}`: this learner has no view {need.view!r}")
        if isinstance(need.what, Value) != isinstance(model, Critic) and not isinstance(need.what, Hidden):
            has = "values, no log-probs" if isinstance(model, Critic) else "no value head"
            raise RecipeError(f"`{need.name}` asks {need.what!r} of model `{need.model}`, which has {has}")
        if isinstance(need.what, KLTo):
            self._get(need.what.model)
        if isinstance(need.what, Hidden) and need.what.layer != -1:
            raise RecipeError(f"`{need.name}`: this learner gives the last layer's hidden states only")

    def _grouped(self, needs: Sequence[Need]) -> dict[tuple[str, str], list[Need]]:
        groups: dict[tuple[str, str], list[Need]] = {}
        for need in needs:
            self._check(need)
            groups.setdefault((need.model, need.where), []).append(need)
        return groups

    def hidden(self, name: str, tokens_RT: Tensor) -> Tensor:
        """Last hidden states `[R, T, H]` of a model of the bank."""
        with self.world.autocast():
            hidden_RTH = hidden_of(self._get(name).model, tokens_RT)
        return hidden_RTH if self.world.precision is None else hidden_RTH.to(self.world.precision)

    def _head(self, name: str) -> Head:
        return Head.of(self._get(name).model, self.convention.temperature, self.convention.banned)

    def _evaluate(self, name: str, trunks: _Trunks, at: Positions, needs: Sequence[Need]) -> dict[str, Tensor]:
        """Quantities `[N, ...]` of one model at some places; distributions in one pass over the head."""
        hidden_NH = at.before(trunks[name])
        out: dict[str, Tensor] = {}
        asked: dict[str, Functional] = {}
        for need in needs:
            what = need.what
            if isinstance(what, Value):
                critic = self._get(name).model
                assert isinstance(critic, Critic)
                out[need.name] = critic.value_N(hidden_NH)
            elif isinstance(what, LogProb):
                asked[need.name] = TargetLogProb(at.take(trunks.tokens_RT))
            elif isinstance(what, Entropy):
                asked[need.name] = FullEntropy()
            elif isinstance(what, KLTo):
                with torch.no_grad():
                    other_NH = at.before(trunks[what.model])
                asked[need.name] = ExactKL(other_NH, self._head(what.model))
            elif isinstance(what, (TopKLogProb, TopKIds)):
                pair = top_k(self._head(name), hidden_NH, what.k)
                out[need.name] = pair[0] if isinstance(what, TopKLogProb) else pair[1]
            else:
                out[need.name] = hidden_NH
        if asked:
            values_FN = evaluate(self._head(name), hidden_NH, list(asked.values()))
            out |= dict(zip(asked, values_FN, strict=True))
        return out

    def _tail(self, what: Any) -> tuple[int, ...]:
        """Sizes of a quantity's free axes."""
        if isinstance(what, (TopKLogProb, TopKIds)):
            return (min(what.k, self.model.get_output_embeddings().weight.shape[0]),)
        return (self.model.get_output_embeddings().weight.shape[1],) if isinstance(what, Hidden) else ()

    def _dtype(self, what: Any) -> torch.dtype:
        if isinstance(what, TopKIds):
            return torch.long
        weight = next(self.model.parameters())
        if isinstance(what, (Hidden, Value)):
            return weight.dtype
        return torch.float64 if weight.dtype == torch.float64 else torch.float32

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer states and counters of every model."""
        return {
            "version": self.version,
            "members": {
                name: {
                    "model": dict(m.model.state_dict()),
                    "optimizer": optim.state_of(m.optimizer, m.model) if m.optimizer is not None else None,
                    "steps": m.steps,
                }
                for name, m in self.members.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; RecipeError where the bank's names differ, CheckpointError where tensors do."""
        from agents.checkpoint import load_model

        if state["members"].keys() != self.members.keys():
            raise RecipeError(f"the state holds models {sorted(state['members'])}, the run {sorted(self.members)}")
        self.version = state["version"]
        for name, entry in state["members"].items():
            member = self.members[name]
            load_model(member.model, entry["model"], f"model `{name}` of the checkpoint")
            if member.optimizer is not None:
                optim.restore(member.optimizer, member.model, entry["optimizer"])
            member.steps = entry["steps"]


def _nonzero(cotangents: Mapping[str, Tensor]) -> bool:
    return any(bool(c.any()) for c in cotangents.values())


def _push(terms: Sequence[tuple[tuple[Tensor, Positions], Tensor]]) -> None:
    """Backward of sum(cotangent * stream) over some streams."""
    loss: Tensor | None = None
    for (value_N, at), cotangent_RT in terms:
        term = (at.take(cotangent_RT.to(value_N.device)).to(value_N.dtype) * value_N).sum()
        loss = term if loss is None else loss + term
    if loss is not None and loss.requires_grad:
        loss.backward()


class _Trunks:
    """Hidden states of one micro-batch, each model's computed at most once."""

    def __init__(self, learner: LMLearner, tokens_RT: Tensor):
        self.learner = learner
        self.tokens_RT = tokens_RT
        self.known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.known:
            self.known[name] = self.learner.hidden(name, self.tokens_RT)
        return self.known[name]


def _merged(own: Optim, run: OptimConfig) -> OptimConfig:
    """A recipe's optimizer with the run's clipping and warm-up, and the run's rate where it names none."""
    rate = own.lr if own.lr is not None else run.lr * own.lr_scale
    return replace(
        run, name=own.name, lr=rate, beta1=own.betas[0], beta2=own.betas[1], weight_decay=own.weight_decay
    )
