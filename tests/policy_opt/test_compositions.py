"""Random compositions of parts: what passes the check runs, is finite and invariant, and ignores nothing it was told.

300 compositions of any advantage with any surrogate, credit, term, curriculum and optimizer, two iterations each on
the softmax table; 40 of them here, the others in the long suite. What does not fit together is refused before
anything is played.
"""

from __future__ import annotations

import math
import re
import typing
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import policy_opt
from policy_opt import Loop, ModelSpec, Optim, RecipeError, RunSize
from policy_opt.options import addresses
from policy_opt.recipe import STAGES
from policy_opt.schedule import Fresh
from policy_opt.table import TableActor, TableLearner, World
from tests.policy_opt.compose import compose, settings, without

WORLD = World(tasks=4, turns=2, actions=2)
SIZE = RunSize(WORLD.tasks, groups=3, group_size=4)
COUNT, QUICK = 300, 40
SEEDS = [pytest.param(seed, marks=[] if seed < QUICK else [pytest.mark.full]) for seed in range(COUNT)]


class Lively(TableActor):
    """Episodes in which every part has something to do: rewards between 0 and 1, cut rows, a sampler that is off."""

    pad, order = 0, False

    def play(self, jobs):
        b = super().play(jobs)
        rows = torch.randperm(b.B, generator=torch.Generator().manual_seed(5)) if self.order else torch.arange(b.B)
        return b.pad(b.T + self.pad).rows(rows)

    def graded(self, b):
        unit_B = b["group_B"] * 7 + b["member_B"]
        cut_B = unit_B % 5 == 0
        last_T = torch.arange(b.T) == b.T - 1
        keep_BT = ~(cut_B[:, None] & last_T)
        late_B = unit_B % 3 == 1
        keep_BT &= ~(late_B[:, None] & (torch.arange(b.T) == 0))
        b = super().graded(b.over(mask_BT=b.mask_BT & keep_BT, real_BT=b.real_BT & keep_BT))
        noise_BT = torch.sin(1.7 * unit_B[:, None] + 2.3 * torch.arange(b.T)).to(b["reward_B"].dtype)
        near_B = b["scores_BK"][:, 1]
        return b.over(
            reward_B=0.6 * b["correct_B"] + 0.3 * near_B - 0.05 * b["tool_calls_B"] + 0.02 * (unit_B % 3),
            truncated_B=cut_B.to(near_B.dtype),
            logp_sampler_BT=(b.logp_sampler_BT - 0.9 * noise_BT) * b.mask_BT,
        )


class Recording(TableLearner):
    """Keeps the accumulated gradient of every step."""

    def step(self, lr_scale=1.0):
        gradient = {name: table.grad.clone() for name, table in self.tables.items() if table.grad is not None}
        self.seen = [*getattr(self, "seen", []), gradient]
        return super().step(lr_scale)


def written(found, before):
    """Columns that a part has written or replaced, by name."""
    return {n: found[n] for n in sorted(found.columns) if n not in before or found[n] is not before[n]}


def busy(found, before):
    """Did a part do anything: change a column, or write one that is not the same everywhere?"""
    for name, value in written(found, before).items():
        if name in before and before[name].shape == value.shape:
            if not torch.equal(value, before[name]):
                return True
        elif value.numel() and bool((value != value.flatten()[0]).any()):
            return True
    return False


def disturbed(found, before):
    """The batch with every column that a part has written changed."""
    changes = {}
    for name, value in written(found, before).items():
        if name == "pairs_P2":
            changes[name] = value.flip(1)
            continue
        wave = torch.sin(1.0 + 3.1 * torch.arange(value.numel(), dtype=torch.float64)).reshape(value.shape)
        if value.dtype == torch.bool:
            changes[name] = value & (wave > 0)
        else:
            changes[name] = (value * (1 + wave) + wave).to(value.dtype)
    return found.over(**changes)


@contextmanager
def disturbing(part, seen):
    """While it holds, what the part writes is changed; whether it was busy goes into `seen`."""
    real = policy_opt.part.run

    def run(path, ran, b, ctx):
        found = real(path, ran, b, ctx)
        if ran is not part:
            return found
        seen.append(busy(found, b))
        return disturbed(found, b)

    with pytest.MonkeyPatch.context() as patch:
        for module in (policy_opt.loop, policy_opt.step):
            patch.setattr(module, "run", run)
        yield


def play(recipe, *, pad=0, order=False, micro_rows=None, exact=False, seed=3, lr=0.3, sharp=1.5):
    """(gradients of all steps, tables, tasks played, metrics) of two iterations.

    exact: every optimizer plain SGD, which does not blow rounding up to a sign; sharp: how much the policy knows.
    """
    world = replace(WORLD, seed=seed)
    bank = dict(recipe.bank)
    if exact:
        sgd = Optim("sgd", betas=(0.0, 0.0))
        bank = {k: ModelSpec(m.role, optimizer=sgd if m.optimizer else None) for k, m in recipe.models.items()}
        recipe = recipe.replace(bank=bank, optimizer=sgd)
    learner = Recording(world, lr=lr, micro_rows=micro_rows)
    noise = torch.randn(learner.tables["policy"].shape, generator=torch.Generator().manual_seed(seed))
    truth = WORLD.truth_BT(torch.arange(WORLD.tasks + 1))
    learner.tables["policy"].data += 0.5 * noise + sharp * torch.nn.functional.one_hot(truth, WORLD.vocab)
    actor = Lively(world, learner)
    actor.pad, actor.order = pad, order
    loop = Loop(recipe, actor, learner, replace(SIZE, seed=seed))
    played, metrics = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            b, numbers = loop.iterate()
            played.append(sorted(zip(b["task_B"].tolist(), b["group_B"].tolist(), strict=True)))
            metrics.append(numbers)
    return getattr(learner, "seen", []), dict(learner.tables), played, metrics


def same(one, other) -> bool:
    """Did two runs train in the same way, bit for bit?"""
    if one[2] != other[2] or len(one[0]) != len(other[0]):
        return False
    pairs = [(one[1], other[1]), *zip(one[0], other[0], strict=True)]
    return all(torch.equal(a[name], b.get(name, torch.zeros(0))) for a, b in pairs for name in a)


def repeated(recipe):
    """With two passes over the rollout: on the first step the policy is still the old one, and nothing is clipped."""
    (first, *others) = recipe.schedule.steps
    if others or not isinstance(first.source, Fresh) or first.epochs > 1:
        return recipe
    return recipe.replace(schedule=replace(recipe.schedule, steps=(replace(first, epochs=2),)))


SETTINGS = ((0.3, 1.5), (3.0, 4.0), (30.0, 1.5), (1.0, 2.5), (0.1, 1.0), (10.0, 4.0))
TRIES = [{"seed": seed, "lr": lr, "sharp": sharp} for seed, (lr, sharp) in enumerate(SETTINGS)]
"""Runs in one of which a part has to show: thresholds and clips may well be out of reach in some."""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_composition_is_finite_and_invariant(seed):
    composition, _ = compose(seed)
    recipe = composition.recipe
    for run in (play(recipe), play(recipe, exact=True)):
        assert all(math.isfinite(v) for m in run[3] for v in m.values()), (composition.command, run[3])
        assert all(torch.isfinite(table).all() for table in run[1].values()), composition.command
    expected = run
    for change in ({"pad": 3, "micro_rows": 1}, {"pad": 1, "micro_rows": 5, "order": True}):
        found = play(recipe, exact=True, **change)
        assert found[2] == expected[2] and len(found[0]) == len(expected[0]), (composition.command, change)
        for a, b in zip(found[0], expected[0], strict=True):
            for name in b:
                said = f"{composition.command} {change}"
                torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-11, msg=lambda m, s=said: f"{s}: {m}")
        for a, b in zip(found[3], expected[3], strict=True):
            assert a == pytest.approx(b, rel=1e-8, abs=1e-10), (composition.command, change)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_part_of_a_composition_changes_something(seed):
    composition, _ = compose(seed)
    recipe = repeated(composition.recipe)
    for path, less in without(recipe):
        try:
            less.check(Lively.columns)
        except RecipeError:
            continue  # another part cannot be without it
        if still(recipe):
            return
        if not any(not same(play(recipe, **how), play(less, **how)) for how in TRIES):
            assert read(recipe, path), f"{path} is ignored: {composition.command}"


AT_REST = {"RatioVariance", "SampledKL", "ExactKL", "TrustRegion"}
"""Surrogates that are smallest where the policy has not moved: alone, they never move it."""


def still(recipe) -> bool:
    """Is the loss made of such surrogates only, and at its smallest?"""
    if any(type(term.loss).__name__ not in AT_REST for term in recipe.terms if term.on):
        return False
    return not any(g.any() for how in TRIES for step in play(recipe, **how)[0] for g in step.values())


IDLE = {
    "Conflicts": "right and wrong answers have no tokens in common",
    "CapWidths": "a bound on widths that are below it",
    "EqualGroups": "groups are equal already",
    "AdvantageousWeight": "all groups meet the criterion, or none",
}
"""Parts that may do nothing on these episodes, and why; what they write must still be read."""


def read(recipe, path) -> bool:
    """Does a part do something that matters to others, though training goes on as it would without it?

    Rewards that change a little and not in their order are such a case, where all that reads them is an order.
    """
    part = dict(recipe.parts).get(path)
    if part is None or part.stage not in STAGES:
        return False
    seen: list[bool] = []
    matters = False
    for how in TRIES:
        expected = play(recipe, **how)
        with disturbing(part, seen):
            try:
                matters |= not same(expected, play(recipe, **how))
            except Exception:
                matters = True  # whoever reads it cannot do with such numbers
        if matters and (any(seen) or type(part).__name__ in IDLE):
            return True
    return False


UNREACHED = {
    "two iterations are too few": {
        "frontier.sigma", "inverse_annealed.floor", "progress_gate.high", "progress_gate.low", "progress_gate.spread",
        "progress_gate.window", "retrospect.limit", "retrospect.spread", "retrospect.window", "tail_risk.rate",
        "dual.limit", "dynamic_labels.capacity",
    },
    "no group has one member": {"beta_weight.singles", "group_centre.single", "group_norm.single"},
    "no episode is unfinished": {
        "curriculum.resume", "curriculum.window", "gae.after", "token_reward.finished_only", "truncation.tokens",
    },
    "a bound that is out of reach": {"cap_widths.most", "group_pairs.per_group", "token_group_norm.limit"},
    "one proximity per episode, and zones that divide it evenly": {"sweet_spot.rule", "sweet_spot.several"},
    "the signal is saturated": {"median_signal.ddof", "median_signal.eps"},
    "more than the vocabulary": {"curvature.k"},
    "how many are rated at once changes nothing": {"variance_aware.chunk"},
}  # fmt: skip
"""Options that no short run on the table can show, by the reason."""
ATTEMPTS = 20


@pytest.mark.full
def test_every_option_of_the_parts_that_compositions_take_has_an_effect_somewhere():
    """Set to another value in some of the compositions, it changes the training of one of them."""
    tries: dict[str, int] = {}
    shown = set().union(*UNREACHED.values())
    for seed in range(COUNT):
        recipe = repeated(compose(seed)[0].recipe)
        for name, other in options(recipe):
            if name in shown or tries.get(name, 0) >= ATTEMPTS:
                continue
            tries[name] = tries.get(name, 0) + 1
            if any(not same(play(recipe, **how), play(other, **how)) for how in TRIES):
                shown.add(name)
    idle = {name: count for name, count in tries.items() if name not in shown}
    assert not idle, ", ".join(f"{name} ({count})" for name, count in idle.items())


def options(recipe):
    """(part.option, the recipe with that option set to another value) where the two fit together."""
    for address in addresses(recipe):
        if address.names[0] in ("sampler", "bank", "optimizer") or address.names[-1] == "name":
            continue
        value, others = address.value, []
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int):
            others = [value + 1]
        elif isinstance(value, float):
            others = [1.7 * value + 0.31, 0.5 * value]
        elif typing.get_origin(address.hint) is typing.Literal:
            others = [v for v in typing.get_args(address.hint) if v != value][:1]
        for other in others:
            try:
                changed = address.rebuild(other)
                changed.check(Lively.columns)
            except ValueError:
                continue
            yield ".".join([n for n in address.names if not n.isdigit()][-2:]), changed


@pytest.mark.parametrize("seed", SEEDS)
def test_what_does_not_fit_is_refused_with_a_reason_before_anything_is_played(seed):
    _, refused = compose(seed)
    for recipe, reason in refused:
        assert reason.startswith(f"{recipe.slug}: ") and re.search(r"`\w+`|terms|\.\d:", reason), reason
        learner = TableLearner(WORLD)
        actor = Lively(WORLD, learner)
        with pytest.raises(RecipeError, match=re.escape(reason)):
            Loop(recipe, actor, learner, SIZE)
        assert actor.played == {}


def test_compositions_are_many_and_not_alike():
    made = [compose(seed)[0] for seed in range(QUICK)]
    assert len({c.command for c in made}) == QUICK
    assert len({c.slug for c in made}) >= 12
    for stage, least in (("advantage", 8), ("credit", 5), ("terms", 20)):
        assert len({str(getattr(c.recipe, stage)) for c in made}) >= least, stage
    assert len({c.recipe.optimizer.name for c in made}) >= 8


def test_a_composition_means_the_same_when_it_is_written_down():
    for seed in range(QUICK):
        composition = compose(seed)[0]
        assert settings(composition.recipe) == composition.specs


def test_a_value_that_is_replaced_before_anything_reads_it_is_refused():
    recipe = policy_opt.get("grpo").set("reward=(few_calls(), empo.agreement())", "signals=(empo.answer_clusters(),)")
    with pytest.raises(RecipeError, match=r"reward.0:FewCalls writes `reward_B`, but reward.1:Agreement replaces it"):
        recipe.set("advantage=group_norm()").check()


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (["terms.policy.coef=dual(0.1)"], "follows `kl_ref`, but no part needs `logp_ref_BT`"),
        (["terms.policy.coef=dual(0.1, of='loss_kl')"], "follows `loss_kl`, which nothing measures; there is `loss`"),
        (["terms.kl.coef=dual(0.1, of='loss_polcy')"], "nothing measures; there is `loss_kl`, `loss_policy`"),
    ],
)
def test_a_multiplier_of_what_nothing_measures_is_refused(specs, said):
    with pytest.raises(RecipeError) as error:
        policy_opt.get("grpo").set(*specs).check()
    assert said in str(error.value)
