"""Rewards in zones (SSL): facts of the specification, on random batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, RecipeError
from policy_opt.advantages import GroupNorm
from policy_opt.proximity import BlockProximity, ClickProximity, SweetSpot
from policy_opt.table import TableActor
from tests.policy_opt.played import CTX, close, quick

# -- zones (SSL) ------------------------------------------------------------------------------------------

RULES = st.sampled_from(["upper", "lower"])


def near(found: list[float], right: list[int], **options) -> Batch:
    b = Batch.build(
        mask_BT=torch.ones(len(found), 1),
        group_B=torch.zeros(len(found)),
        logp_sampler_BT=torch.zeros(len(found), 1).double(),
        proximity_B=torch.tensor(found, dtype=torch.float64),
        correct_B=torch.tensor(right),
        reward_B=torch.tensor(right),
    )
    return SweetSpot(**options)(b, CTX)


@quick
@given(s=st.lists(st.floats(0, 1), min_size=2, max_size=6), k=st.integers(1, 9), alpha=st.floats(0, 0.99), rule=RULES)
def test_zones(s, k, alpha, rule):
    options = {"zones": k, "alpha": alpha, "rule": rule}
    wrong, right = near(sorted(s), [0] * len(s), **options), near(sorted(s), [1] * len(s), **options)
    assert bool((wrong["reward_B"].diff() >= 0).all()) and bool((right["reward_B"].diff() >= 0).all())
    assert float(right["reward_B"].min()) > float(wrong["reward_B"].max())
    assert 0 <= float(wrong["reward_B"].min()) and float(right["reward_B"].max()) <= 1 + alpha
    steps_of_k = wrong["zone_B"] * k
    close(steps_of_k, steps_of_k.round())
    assert bool(((wrong["zone_B"] - wrong["nearness_B"]).abs() < 1 / k + 1e-8).all())
    binary = near(s, [1] + [0] * (len(s) - 1), zones=k, alpha=0.0, rule=rule)
    assert torch.equal(binary["reward_B"], binary["correct_B"].double())
    paid = near(s, [1] + [0] * (len(s) - 1), **options, failures=False)["reward_B"]
    assert not paid[1:].any()
    amplified = near([0.0, 0.5, 1.0], [0, 0, 0], zones=2, alpha=1.0, values="amplified")["reward_B"]
    assert amplified.tolist() == pytest.approx([0, 1 / 3, 1])


def test_zone_borders_hold_in_both_precisions():
    for k in range(1, 13):
        for exact in range(k + 1):
            for kind in (torch.float32, torch.float64):
                s = torch.tensor([exact / k], dtype=kind)
                assert SweetSpot(zones=k, rule="lower").zone(s).item() == exact / k
                assert SweetSpot(zones=k, rule="upper").zone(s).item() == exact / k


def test_failures_that_differ_teach():
    b = near([0.1, 0.4, 0.6, 0.9], [0, 0, 0, 0])
    assert b["reward_B"].unique().numel() == 4 and GroupNorm()(b, CTX)["adv_B"].any()
    assert GroupNorm()(near([0.1, 0.4, 0.6, 0.9], [1, 1, 1, 1]), CTX)["adv_B"].any()


def clicked(x: float, y: float, box: tuple[float, float, float, float]) -> Batch:
    names = ("click_x_B", "click_y_B", "box_left_B", "box_top_B", "box_right_B", "box_bottom_B")
    values = torch.tensor([[x, y, *box]], dtype=torch.float64).unbind(1)
    columns = dict(zip(names, values, strict=True))
    return ClickProximity()(Batch.build(mask_BT=[[1]], group_B=[0], **columns), CTX)


@quick
@given(x=st.floats(-5, 15), y=st.floats(-5, 15), move=st.floats(-50, 50), scale=st.floats(0.1, 9))
def test_a_click_is_seen_from_its_box(x, y, move, scale):
    here = clicked(x, y, (2.0, 3.0, 8.0, 9.0))["click_proximity_B"]
    there = clicked(scale * (x + move), y, (scale * (2 + move), 3.0, scale * (8 + move), 9.0))["click_proximity_B"]
    close(here, there, rtol=1e-6)
    assert clicked(5.0, 6.0, (2.0, 3.0, 8.0, 9.0))["click_proximity_B"].item() == 1
    assert clicked(2.0, 6.0, (2.0, 3.0, 8.0, 9.0))["click_proximity_B"].item() == pytest.approx(math.exp(-0.5))
    corner = clicked(8.0, 9.0, (2.0, 3.0, 8.0, 9.0))
    assert corner["click_proximity_B"].item() == pytest.approx(math.exp(-1)) and corner["click_inside_B"].item() == 1


def test_blocks_and_steps():
    grid = Batch.build(
        mask_BT=[[1]] * 2, group_B=[0, 0],
        cells_BN=torch.tensor([[1] * 16, [1] * 15 + [0]]), solution_BN=torch.ones(2, 16),
    )  # fmt: skip
    b = SweetSpot(by="blocks_BS", outcome="solved_B", several="zones")(BlockProximity(2)(grid, CTX), CTX)
    assert b["solved_B"].tolist() == [1, 0] and b["zone_B"].tolist() == pytest.approx([1, (3 + 0.75) / 4])
    nan = math.nan
    walked = Batch.build(
        mask_BT=[[1]] * 3, group_B=[0] * 3, correct_B=torch.zeros(3), steps_BS=[[1, 0.5], [0.5, nan], [nan, nan]],
    )  # fmt: skip
    last = SweetSpot(by="steps_BS", several="last")(walked, CTX)
    assert last["nearness_B"].tolist() == [0.5, 0.5, 0]
    assert SweetSpot(by="steps_BS")(walked, CTX)["nearness_B"].tolist() == [0.75, 0.5, 0]
    with pytest.raises(policy_opt.BatchError, match="no square grid"):
        BlockProximity(2)(grid.over(cells_BN=torch.ones(2, 12), solution_BN=torch.ones(2, 12)), CTX)


def test_proximity_of_clicks_composes_from_the_command_line():
    facts = {"click_x_B", "click_y_B", "box_left_B", "box_top_B", "box_right_B", "box_bottom_B"}
    recipe = policy_opt.get("ssl").set("signals=click_proximity", "reward.by=click_proximity_B", "reward.rule=upper")
    recipe.check(facts)
    with pytest.raises(RecipeError, match="click_proximity_B"):
        recipe.set("signals=none").check(facts)
    with pytest.raises(RecipeError, match="box_"):
        recipe.check(facts - {"box_left_B"})


@pytest.mark.parametrize(
    ("slug", "setting"),
    [
        ("ssl", "reward.alpha=2"),
    ],
)
def test_options_without_sense_are_refused(slug, setting):
    with pytest.raises(RecipeError):
        policy_opt.get(slug).set(setting).check(TableActor.columns)
