"""The contract of every recipe, parametrised over slugs: a later recipe joins by existing."""

from __future__ import annotations

import copy
import io
import json
from functools import cache

import pytest
import torch

import policy_opt
from policy_opt import Loop, ModelSpec, Optim, RecipeError, RunSize
from policy_opt.registry import shipped
from policy_opt.table import TableActor, TableLearner, World, episodes
from tests.policy_opt import fixed

FORMS = [(slug, None) for slug in shipped()]
FORMS += [(slug, variant) for slug in shipped() for variant in policy_opt.get(slug).variants]
WORLD = World(tasks=4, turns=2, actions=2)
SLOW = {"earl": 100}
"""Iterations of the smoke task for recipes that train on few tokens: earl on one in four."""
MANY = {"riskpo": 16}
"""Groups per iteration of the smoke task, elsewhere 4: riskpo judges bundles of five."""


@cache
def form(slug: str, variant: str | None) -> policy_opt.Recipe:
    recipe = policy_opt.get(slug)
    recipe = recipe.set(f"variant={variant}") if variant else recipe
    return recipe.set(*recipe.smoke)


def every_form(function):
    return pytest.mark.parametrize(("slug", "variant"), FORMS, ids=lambda x: str(x or ""))(function)


# -- what it says of itself -----------------------------------------------------------------------------


@every_form
def test_row_and_check(slug, variant):
    recipe = form(slug, variant)
    recipe.check(TableActor.columns)
    assert recipe.slug == slug
    assert recipe.title and "arXiv" in recipe.cite and recipe.evidence
    assert recipe.learns in ("identity", "pairs", "critic") or recipe.learns.startswith("none: ")
    assert policy_opt.get(slug).__class__.__module__ == "policy_opt.recipe"


# -- learning -------------------------------------------------------------------------------------------


@every_form
def test_learns_its_smoke_task(slug, variant):
    """From chance (1/16) to at least 0.9 on a softmax table, through the loop that trains models."""
    recipe = form(slug, variant)
    if recipe.learns.startswith("none"):
        pytest.skip(recipe.learns)
    learner = TableLearner(WORLD)
    size = RunSize(tasks=WORLD.tasks, groups=MANY.get(slug, 4), group_size=8)
    loop = Loop(recipe, TableActor(WORLD, learner), learner, size)
    before = success(learner)
    for _ in range(SLOW.get(slug, 50)):
        _, metrics = loop.iterate()
        if metrics["correct"] > 0.97:
            break
    assert before < 0.2 and success(learner) >= 0.9


def success(learner: TableLearner) -> float:
    return float(torch.cat([b["correct_B"] for b in episodes(WORLD, learner, 32)]).mean())


@pytest.mark.parametrize("slug", ["otc_grpo", "otc_ppo"])
def test_otc_sheds_tool_calls_without_losing_success(slug):
    """In the table world a call is of no use; the parent recipes keep calling, OTC stops."""
    calls = {}
    for name in (slug, slug.removeprefix("otc_")):
        learner = TableLearner(WORLD)
        loop = Loop(
            policy_opt.get(name), TableActor(WORLD, learner), learner, RunSize(4, groups=4, group_size=8)
        )
        for _ in range(25):
            loop.iterate()
        played = list(episodes(WORLD, learner, 32))
        calls[name] = float(torch.cat([b["tool_calls_B"] for b in played]).double().mean())
        assert float(torch.cat([b["correct_B"] for b in played]).mean()) >= 0.9
    assert calls[slug] <= 0.7 * calls[slug.removeprefix("otc_")]


# -- invariance -----------------------------------------------------------------------------------------


class Rearranged(TableActor):
    """The same episodes, padded wider and in another order of rows."""

    pad, order = 0, False

    def play(self, jobs):
        b = super().play(jobs)
        rows = (
            torch.randperm(b.B, generator=torch.Generator().manual_seed(5))
            if self.order
            else torch.arange(b.B)
        )
        return b.pad(b.T + self.pad).rows(rows)


class Recording(TableLearner):
    """Keeps the accumulated gradient of every step."""

    def step(self, lr_scale=1.0):
        self.seen = [
            *getattr(self, "seen", []),
            {k: t.grad.clone() for k, t in self.tables.items() if t.grad is not None},
        ]
        return super().step(lr_scale)


def gradients(recipe, dtype=torch.float64, pad=0, order=False, micro_rows=None):
    """Gradients of two iterations' steps, and the metrics. Plain SGD: rounding is not blown up to a sign."""
    sgd = Optim("sgd", betas=(0.0, 0.0))
    bank = {k: ModelSpec(m.role, optimizer=sgd if m.optimizer else None) for k, m in recipe.models.items()}
    learner = Recording(WORLD, lr=1.0, optimizer=sgd, micro_rows=micro_rows, dtype=dtype)
    noise = torch.randn(learner.tables["policy"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    learner.tables["policy"].data += noise
    actor = Rearranged(WORLD, learner)
    actor.pad, actor.order = pad, order
    loop = Loop(recipe.replace(bank=bank), actor, learner, RunSize(4, groups=3, group_size=4))
    metrics = [loop.iterate()[1] for _ in range(2)]
    return learner.seen, metrics


@every_form
def test_gradient_does_not_depend_on_padding_split_or_order(slug, variant):
    recipe = form(slug, variant)
    expected, metrics = gradients(recipe)
    assert sum(float(g.abs().sum()) for step in expected for g in step.values()) > 0
    for change in (
        {"pad": 3, "micro_rows": 1},
        {"micro_rows": 7},
        {"pad": 1, "micro_rows": 5, "order": True},
    ):
        found, again = gradients(recipe, **change)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            for name in b:
                torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-13)
        for a, b in zip(again, metrics, strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


@every_form
def test_gradient_in_float32(slug, variant):
    recipe = form(slug, variant)
    expected, _ = gradients(recipe, torch.float32)
    found, _ = gradients(recipe, torch.float32, pad=2, micro_rows=5, order=True)
    for a, b in zip(found, expected, strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


# -- degenerate batches ---------------------------------------------------------------------------------

MASKS = [[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
DEGENERATE = {
    "equal rewards": fixed.batch([1.0] * 6, [0, 0, 0, 1, 1, 1], MASKS),
    "groups of one": fixed.batch([1, 0, 1, 1, 0, 0], [5, 3, 9, 1, 7, 0], MASKS),
    "masked rows": fixed.batch(
        [1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2], [*MASKS[:3], [0, 0, 0, 0], MASKS[4], [0, 0, 0, 0]]
    ),
    "a masked group": fixed.batch(
        [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 2, 2], [*MASKS[:4], [0, 0, 0, 0], [0, 0, 0, 0]]
    ),
    "one token": fixed.batch([1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 2, 2], [[0, 1, 0, 0], *[[0, 0, 0, 0]] * 5]),
    "huge rewards": fixed.batch([1e12, 0, -1e12, 1, 1e12, 1e12 + 1], [0, 0, 0, 0, 1, 1], MASKS),
}


@pytest.mark.filterwarnings("ignore:.*groups of one member")
@pytest.mark.parametrize("case", DEGENERATE)
@every_form
def test_degenerate_batches_give_finite_numbers(slug, variant, case):
    b = DEGENERATE[case]
    recipe = fixed.whole(form(slug, variant))
    for shift in (0.0, 1000.0, -1000.0):
        given = {"logp_old": torch.tensor(-2.0), "logp_new": torch.tensor(-2.0 + shift)}
        _, metrics, learner = fixed.run(recipe, b, given)
        assert all(v == v and abs(v) < float("inf") for v in metrics.values()), metrics
        for step, mask_BT in zip(learner.cotangents, learner.masks, strict=True):
            for cotangent in step.values():
                assert torch.isfinite(cotangent).all()
                assert not (cotangent * ~mask_BT).any()


@every_form
def test_nothing_to_train_on_takes_no_step(slug, variant):
    b = fixed.batch([1, 0, 1, 0], [0, 0, 1, 1], [[0, 0]] * 4)
    _, metrics, learner = fixed.run(form(slug, variant), b, {})
    assert metrics["optimizer_steps"] == 0 and learner.cotangents == []


@every_form
def test_nan_log_probs_are_refused_by_name(slug, variant):
    b = DEGENERATE["masked rows"]
    bad = torch.full((6, 4), -1.0)
    bad[1, 2] = torch.nan
    with pytest.raises(
        policy_opt.BatchError, match=rf"{slug}: `logp_(old_)?BT` of shape \(6, 4\) is nan at \(1, 2\)"
    ):
        fixed.run(form(slug, variant).set(*accept_all(slug)), b, {"logp_old": bad, "logp_new": bad})


@every_form
def test_wrong_shape_is_refused_by_name(slug, variant):
    b = DEGENERATE["masked rows"]

    class Short(fixed.FixedLearner):
        def number(self, need, batch):
            return super().number(need, batch)[:, :3]

    loop = Loop(form(slug, variant).set(*accept_all(slug)), fixed.FixedActor(b), Short({}), RunSize(3, 3, 2))
    with pytest.raises(
        policy_opt.BatchError, match=rf"{slug}: column `\w+_BT\w?` has shape \(6, 3\b.*\), expected \[B=6, T=4\b.*\]"
    ):
        loop.iterate()


def accept_all(slug: str) -> tuple[str, ...]:
    return ("curriculum.accept=none",) if policy_opt.get(slug).curriculum.accept else ()


# -- state ----------------------------------------------------------------------------------------------


@every_form
def test_resume_is_exact(slug, variant):
    """4 iterations are 2 + save + load + 2, bit for bit; the state is tensors and JSON."""
    recipe = form(slug, variant)
    learner = TableLearner(WORLD)
    loop = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=3, group_size=4, seed=7))
    for _ in range(2):
        loop.iterate()
    buffer = io.BytesIO()
    torch.save(loop.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(learner)
    resumed = Loop(recipe, TableActor(WORLD, other), other, RunSize(4, groups=3, group_size=4, seed=7))
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(2):
        expected, found = loop.iterate(), resumed.iterate()
        assert found[1] == expected[1]
        assert torch.equal(found[0].tokens_BT, expected[0].tokens_BT)
    for name, table in learner.tables.items():
        assert torch.equal(table, other.tables[name])
    assert json.dumps(str(loop.state_dict())) == json.dumps(str(resumed.state_dict()))


# -- one equals another ---------------------------------------------------------------------------------


def cotangents(recipe, b, given):
    return fixed.run(fixed.whole(recipe), b, given)[2].cotangents[0]["logp_BT"]


def some_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(8, 5, generator=generator) < 0.8).int()
    mask[:, 0] = 1
    b = fixed.batch([1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1], mask.tolist())
    noise = torch.rand(8, 5, generator=generator, dtype=torch.float64)
    return b, {"logp_new": -1 - noise, "logp_old": -1.2 - noise.flip(0) / 2, "logp_ref": -noise - 1.1}


def test_reductions_to_the_parent():
    b, given = some_batch()
    grpo, get = policy_opt.get("grpo"), policy_opt.get
    token_mean = grpo.set("terms.policy.agg=token_mean")
    dapo = get("dapo").set("curriculum.accept=none", "reward=none", "terms.clip_high=0.2")
    assert torch.equal(cotangents(dapo, b, given), cotangents(token_mean, b, given))
    gspo, token = (cotangents(get(s), b, given) for s in ("gspo", "gspo_token"))
    torch.testing.assert_close(token, gspo, rtol=1e-12, atol=1e-15)
    wide = [get(s).set("terms.clip_low=1e9", "terms.clip_high=1e9") for s in ("cispo",)]
    unclipped = token_mean.set("terms.clip_low=1e9", "terms.clip_high=1e9")
    torch.testing.assert_close(cotangents(wide[0], b, given), cotangents(unclipped, b, given))
    still = {**given, "logp_new": given["logp_old"]}
    torch.testing.assert_close(cotangents(get("gspo"), b, still), cotangents(grpo, b, still))
    rloo, clip = get("rloo"), get("rloo").set("variant=clip")
    torch.testing.assert_close(cotangents(rloo, b, still), cotangents(clip, b, still))


def test_otc_reduces_to_grpo_when_all_correct_rollouts_use_the_fewest_calls():
    b, given = some_batch()
    b = b.over(tool_calls_B=torch.full((8,), 2))
    assert torch.equal(
        cotangents(policy_opt.get("otc_grpo"), b, given), cotangents(policy_opt.get("grpo"), b, given)
    )


def test_an_off_term_needs_nothing_and_an_on_term_its_model():
    grpo = policy_opt.get("grpo")
    assert "ref" not in grpo.models
    on = grpo.set("terms.kl.coef=0.04")
    assert on.models == {"ref": ModelSpec("copy")}
    assert {n.name for n in on.needs} - {n.name for n in grpo.needs} == {"logp_ref_BT"}
    with pytest.raises(RecipeError, match="no term of the loss is on"):
        grpo.set("terms.policy.coef=0").check()
