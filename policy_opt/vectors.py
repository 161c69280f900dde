"""How a file of golden numbers maps to a recipe: params to options, inputs to columns, outputs to results.

The mapping stands in the recipe's own file; everything usual is here. Nothing is computed here: a Trace runs
the recipe's own parts and its loss, and reads off what they gave.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.errors import RecipeError, unknown
from policy_opt.metrics import of_rollout, of_step
from policy_opt.need import Same, TopKIds
from policy_opt.part import Ctx, Part, run
from policy_opt.terms import Loss, masked, reports, spread

if TYPE_CHECKING:
    from policy_opt.recipe import Recipe

COLUMNS: dict[str, tuple[str, ...]] = {
    "mask": ("mask_BT",),
    "group": ("group_B",),
    "rewards": ("reward_B", "correct_B"),
    "base_rewards": ("reward_B", "correct_B"),
    "response_lengths": ("length_B",),
    "tool_calls": ("tool_calls_B",),
    "logp_old": ("logp_old_BT",),
    "logp_ref": ("logp_ref_BT",),
    "values_old": ("values_old_BT",),
    "token_advantages": ("adv_BT",),
}
"""Inputs and the columns that they fill."""
STREAMS = {"logp_new": "logp_BT", "values_new": "values_BT", "entropy": "entropy_BT"}
"""Inputs that are differentiated."""


@dataclass(frozen=True)
class Vectors:
    """The mapping of one method's vector file."""

    method: str = ""
    """The file's `method`; empty: the recipe's slug. Several recipes may share a file."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Params beside, or instead of, the usual ones -> path of an option, tuple of paths (empty: it means nothing
    to this recipe), or function (recipe, value) -> recipe. Applied in this order, before the usual ones."""
    outputs: Mapping[str, Callable[[Trace], Any]] = field(default_factory=dict)
    """Outputs beside, or instead of, the usual ones."""
    stages: tuple[str, ...] = ("reward", "advantage", "credit")
    """Stages that are run."""
    columns: Mapping[str, tuple[str, ...] | Callable[[Any], Mapping[str, Tensor]]] = field(default_factory=dict)
    """Inputs of this file that fill columns beside the usual ones: their names (whole numbers stay whole, unless
    a model computes the column), or a function of the input."""
    adapt: Callable[[Recipe, Mapping[str, Any]], Recipe] | None = None
    """Options that a case's inputs decide, not its params."""
    arrange: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """The inputs with rows that are trajectories, where the file has another layout: values are only moved."""
    prime: Callable[[Trace], None] | None = None
    """Puts a case's stored state where the recipe keeps it."""
    sentences: frozenset[str] = frozenset()
    """Outputs that the specification declares to be a sentence about the case. A text there is shown, not compared;
    every other output, text or not, must be computed."""


def aggregation(recipe: Recipe, name: str) -> Recipe:
    """The param loss_agg: every term's aggregation, by its usual name."""
    from policy_opt.aggregate import SequenceMean, SequenceSum, TokenMean

    known: dict[str, Any] = {"seq-mean-token-mean": SequenceMean(), "token-mean": TokenMean()}
    known["seq-mean-token-sum"] = SequenceSum()
    if name not in known:
        raise RecipeError(f"{recipe.slug}: loss_agg {name!r} is none of {', '.join(known)}")
    return recipe.replace(terms=tuple(dataclasses.replace(term, agg=known[name]) for term in recipe.terms))


BOTH_WIDTHS = ("terms.clip_low", "terms.clip_high")
PARAMS: dict[str, Any] = {
    "adv_eps": "advantage.eps",
    "std_ddof": "advantage.ddof",
    "clip": BOTH_WIDTHS,
    "clip_eps": BOTH_WIDTHS,
    "clip_low": "terms.clip_low",
    "clip_high": "terms.clip_high",
    "eps_low": "terms.clip_low",
    "eps_high": "terms.clip_high",
    "dual_clip_c": "terms.dual_clip",
    "value_clip": "terms.value_clip",
    "kl_beta": "terms.kl.coef",
    "loss_agg": aggregation,
}
"""Params that mean the same in every file."""


def configure(recipe: Recipe, params: Mapping[str, Any]) -> Recipe:
    """The recipe with a case's params; RecipeError on one that it does not know."""
    from policy_opt.options import assign

    own = (recipe.vectors or Vectors()).params
    mapping = {**own, **{name: target for name, target in PARAMS.items() if name not in own}}
    strange = params.keys() - mapping.keys()
    if strange:
        raise RecipeError(f"{recipe.slug}: {unknown('param', min(strange), mapping)}")
    for name, target in mapping.items():
        if name not in params:
            continue
        value = params[name]
        if callable(target):
            recipe = target(recipe, value)
        else:
            for path in (target,) if isinstance(target, str) else target:
                recipe = assign(recipe, path, value)
    return recipe


class Trace:
    """One case driven through a recipe: the batch after every part, the loss, its gradients."""

    def __init__(
        self, recipe: Recipe, inputs: Mapping[str, Any], params: Mapping[str, Any] | None = None
    ) -> None:
        """recipe: with the case's params applied; params: those too, for outputs that take a size from them."""
        vectors = recipe.vectors or Vectors()
        if vectors.adapt:
            recipe = vectors.adapt(recipe, inputs)
        self.given, self.params = inputs, params or {}
        inputs = vectors.arrange(inputs) if vectors.arrange else inputs
        self.recipe, self.inputs = recipe, inputs
        self.ids = list(dict.fromkeys(inputs.get("group") or [0]))
        self.ctx = Ctx(recipe=recipe.slug, paths={id(part): path for path, part in recipe.parts})
        self.streams = {
            stream: torch.tensor(inputs[name], dtype=torch.float64)
            for name, stream in STREAMS.items()
            if inputs.get(name) is not None
        }
        if vectors.prime:
            vectors.prime(self)
        self.after_part: list[tuple[Part, Batch]] = []
        self.batch = self.start()
        if "reward_B" in self.batch:
            self.ctx.metrics |= of_rollout(self.batch)
        for _, part in recipe.parts:
            part.played(self.batch, self.ctx)
        for stage in vectors.stages:
            for i, part in enumerate(getattr(recipe, stage)):
                self.batch = run(f"{stage}.{i}", part, self.batch, self.ctx)
                self.after_part.append((part, self.batch))
        self.keep_B = recipe.curriculum.screen(self.batch, self.ctx)
        self.batch = self.batch.silence(self.keep_B)
        for _, part in recipe.parts:
            part.observe(self.batch, self.ctx)

    def start(self) -> Batch:
        """The case's inputs as a batch, in float64; group ids of any kind become numbers."""
        columns: dict[str, Tensor] = {}
        needs = (*self.recipe.needs, *(need for term in self.recipe.terms for need in term.needs))
        floats = {need.name for need in needs if not isinstance(need.what, TopKIds)}
        for name, value in self.inputs.items():
            for column in COLUMNS.get(name, ()) if value is not None else ():
                if column == "group_B":
                    columns[column] = torch.tensor([self.ids.index(g) for g in value])
                else:
                    columns[column] = torch.tensor(value, dtype=torch.float64)
        for name, own in (self.recipe.vectors or Vectors()).columns.items():
            if self.inputs.get(name) is None:
                continue
            if callable(own):
                columns |= own(self.inputs[name])
            else:
                given = torch.tensor(self.inputs[name])
                if given.is_floating_point() or given.dtype == torch.bool or floats & set(own):
                    given = torch.tensor(self.inputs[name], dtype=torch.float64)
                columns |= dict.fromkeys(own, given)
        rows = len(next(iter(columns.values())))
        columns.setdefault("mask_BT", torch.ones(rows, 1))
        columns.setdefault("group_B", torch.zeros(rows, dtype=torch.long))
        columns.setdefault("member_B", torch.arange(rows))
        if "correct_B" in columns:
            columns["correct_B"] = (columns["correct_B"] > 0.5).double()
        mask_BT = columns["mask_BT"] != 0
        for need in needs:
            if need.where == "actions" and need.view == Same() and need.name in columns:
                columns[need.name] = torch.where(spread(mask_BT, columns[need.name]), columns[need.name], 0)
        none_BT = torch.zeros_like(mask_BT, dtype=torch.float64)
        return Batch.build(**columns, logp_sampler_BT=none_BT)

    # -- what was computed --------------------------------------------------------------------------------

    def __getitem__(self, column: str) -> Tensor:
        return self.batch[column]

    def after(self, kind: type[Part]) -> Batch:
        """The batch as a part of this kind left it."""
        return next(b for part, b in self.after_part if isinstance(part, kind))

    @cached_property
    def total(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its gradients by stream)."""
        return Loss.of(self.recipe.terms, self.batch, self.ctx, torch.float64).cotangents(
            self.streams, self.batch
        )

    def term(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """(value, gradients) of one term without its coefficient, on or off; 0 where its columns are not
        there.
        """
        (term,) = [t for t in self.recipe.terms if t.name == name]
        if any(need.name not in self.batch for need in term.needs if need.when != "loss"):
            return torch.zeros(()), {}
        alone = (dataclasses.replace(term, coef=1.0),)
        return Loss.of(alone, self.batch, self.ctx, torch.float64).cotangents(self.streams, self.batch)

    def weighted(self, *names: str) -> Tensor:
        """The share of some terms in the loss."""
        terms = [term for term in self.recipe.terms if term.name in names]
        return torch.stack([term.factor(self.ctx) * self.term(term.name)[0] for term in terms]).sum()

    def stepped(self) -> Ctx:
        """The context after one optimizer step on this case, as `after_step` of the parts leaves it."""
        ctx = dataclasses.replace(self.ctx, states=copy.deepcopy(self.ctx.states), metrics={})
        loss = Loss.of(self.recipe.terms, self.batch, ctx, torch.float64)
        none_BT = torch.zeros_like(self.batch.logp_sampler_BT)
        streams = {"entropy_BT": none_BT, **self.streams}
        ctx.step_reports = reports(loss.terms, streams, self.batch)
        ctx.step_metrics = of_step(loss, streams, self.batch, ctx.step_reports)
        for _, part in self.recipe.parts:
            part.after_step(self.batch, ctx)
        return ctx

    @property
    def clean(self) -> dict[str, Tensor]:
        """The streams as surrogates see them: 0 outside the mask."""
        return {name: masked(value, self.batch) for name, value in self.streams.items()}

    def report(self, name: str, term: str = "") -> Tensor:
        """What a surrogate reports of itself: [B, T] with 0 outside the mask, or [B]. term: one that may be
        off.
        """
        terms = (
            [dataclasses.replace(t, coef=1.0) for t in self.recipe.terms if t.name == term] if term else None
        )
        value = reports(terms or self.recipe.terms, self.streams, self.batch)[name]
        return value * self.batch.mask_BT if value.ndim == 2 else value

    def share(self, name: str) -> float:
        """A reported [B, T] quantity over the number of policy tokens; 0 where the surrogate does not report
        it.
        """
        found = reports(self.recipe.terms, self.streams, self.batch)
        count = self.batch.mask_BT.sum().clamp(min=1)
        return float((found[name] * self.batch.mask_BT).sum() / count) if name in found else 0.0

    def per_token(self, stem: str) -> Tensor:
        """adv_BT, or adv_B spread over tokens, 0 outside the mask."""
        return self.batch.per_token(stem) * self.batch.mask_BT

    def gradient(self, found: tuple[Tensor, dict[str, Tensor]], stream: str = "logp_BT") -> Tensor:
        """d loss / d stream; 0 where the loss does not depend on it."""
        return found[1].get(stream, torch.zeros_like(self.streams[stream]))


@dataclass(frozen=True)
class Form:
    """An output that is a block: what another form of the method, or the same one, gives for the case."""

    settings: tuple[str, ...]
    """Of the other form."""
    outputs: Mapping[str, Callable[[Trace], Any]]

    def __call__(self, t: Trace) -> dict[str, Any]:
        other = Trace(t.recipe.set(*self.settings), t.given, t.params) if self.settings else t
        return {name: output(other) for name, output in self.outputs.items()}


OUTPUTS: dict[str, Callable[[Trace], Any]] = {
    "loss": lambda t: t.total[0],
    "grad_logp_new": lambda t: t.gradient(t.total),
    "advantages": lambda t: t["adv_B"],
    "clip_frac": lambda t: t.share("clip_frac"),
}
"""Outputs that mean the same in every file."""
