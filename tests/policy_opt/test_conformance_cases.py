"""The function, not the file: cases that the files of golden numbers do not hold."""

from __future__ import annotations

import copy
import math

import pytest

from policy_opt import conformance
from tests.policy_opt.test_conformance import CONTENT, OURS, WITH_LOSS, nested


def outputs(method: str, inputs: dict, params: dict, *wanted: str) -> dict:
    return conformance.drive(conformance.recipes_of(method), inputs, params, wanted)


def test_edge_cases_of_the_specifications():
    """Cases that the files do not hold, worked by hand."""
    base = {
        "logp_new": [[-1.0, -1.0]],
        "logp_old": [[-1.0, -1.0]],
        "mask": [[1, 1]],
        "rewards": [3.0],
        "group": [9],
    }
    params = {"adv_eps": 1.0, "std_ddof": 1, "clip_eps": 0.2, "kl_beta": 0.0, "loss_agg": "token-mean"}
    single = outputs("grpo", base, params, "advantages", "loss", "kl_loss", "clip_frac")
    assert single == {"advantages": [1.5], "loss": -1.5, "kl_loss": 0.0, "clip_frac": 0.0}
    empty = outputs("grpo", {**base, "mask": [[0, 0]]}, params, "loss", "grad_logp_new", "clip_frac")
    assert empty == {"loss": 0.0, "grad_logp_new": [[0.0, 0.0]], "clip_frac": 0.0}
    assert outputs(
        "gspo", {**base, "mask": [[0, 0]]}, {"eps_low": 0.1, "eps_high": 0.1}, "seq_ratio", "loss"
    ) == {
        "seq_ratio": [1.0],
        "loss": 0.0,
    }
    alone = outputs("dr_grpo", base, {"clip_eps": 0.2, "max_completion_length": 4}, "advantages")
    assert alone == {"advantages": [0.0]}
    dropped = outputs(
        "dapo",
        {**base, "response_lengths": [21]},
        {"max_len": 20, "cache_len": 4, "overlong_factor": 2.0, "dynamic_sampling": True},
        "overlong_penalty", "shaped_rewards", "group_keep", "advantages", "loss",
    )  # fmt: skip
    assert dropped == {
        "overlong_penalty": [-2.0], "shaped_rewards": [1.0], "group_keep": [0.0], "advantages": [0.0],
        "loss": 0.0,
    }  # fmt: skip


def rows_of_tokens(case: dict) -> bool:
    mask = case["inputs"].get("mask")
    return bool(mask) and nested(mask)


@pytest.mark.parametrize("method", [m for m in OURS if rows_of_tokens(CONTENT[m]["cases"][0])])
def test_with_every_mask_empty_all_is_finite_and_nothing_is_pulled(method):
    for case in filter(rows_of_tokens, CONTENT[method]["cases"]):
        mask = [[0] * len(row) for row in case["inputs"]["mask"]]
        found = outputs(method, {**case["inputs"], "mask": mask}, case["params"], *case["outputs"])
        for name, value in found.items():
            assert all(abs(x) < 1e300 for x in numbers(value)), name
            assert "grad" not in name or not any(numbers(value)), name


def numbers(value) -> list[float]:
    """Every number in nested lists and dicts."""
    if isinstance(value, list | dict):
        return [x for item in (value.values() if isinstance(value, dict) else value) for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def case_of(method: str, number: int = 0) -> tuple[dict, dict, dict]:
    """(inputs, params, outputs) of a case of the file, to be changed."""
    case = copy.deepcopy(CONTENT[method]["cases"][number])
    return case["inputs"], case["params"], case["outputs"]


def test_whole_numbers_in_place_of_floats():
    inputs, params, wanted = case_of("dgpo")
    found = outputs("dgpo", inputs, {**params, "reward_weights": [1]}, *wanted)
    assert conformance.difference(found, wanted)[1] == ""
    inputs, params, _ = case_of("adora", 2)
    assert outputs("adora", inputs, {**params, "max_length_threshold": 1e9}, "loss") == outputs(
        "adora", inputs, params, "loss"
    )
    inputs, params, _ = case_of("dhpo", 1)
    inputs["entropy"] = [[(i + t) % 3 for t in range(6)] for i in range(8)]
    as_floats = {**inputs, "entropy": [[float(h) for h in row] for row in inputs["entropy"]]}
    assert outputs("dhpo", inputs, params, "token_weight") == outputs("dhpo", as_floats, params, "token_weight")


def test_params_that_stand_at_their_default_may_be_left_out():
    inputs, params, _ = case_of("adora", 2)
    params["variant"]["criterion"] = "length"
    without = {**params, "variant": {k: v for k, v in params["variant"].items() if k != "tau"}}
    assert outputs("adora", inputs, without, "loss") == outputs("adora", inputs, params, "loss")
    inputs, params, wanted = case_of("bnpo")
    del params["n_components"]
    assert conformance.difference(outputs("bnpo", inputs, params, *wanted), wanted)[1] == ""


@pytest.mark.parametrize("method, number, gone", [
    ("ssl", 0, "zone_rule"), ("ssl", 0, "sigma_fraction_of_size"), ("ssl", 1, "block"), ("poad", 0, "algo"),
    ("poad", 1, "algo"), ("dgpo", 0, "reward_weights"),
])  # fmt: skip
def test_what_a_case_shows_by_itself_need_not_be_said(method: str, number: int, gone: str) -> None:
    inputs, params, wanted = case_of(method, number)
    if gone == "reward_weights":
        params[gone] = [1.0] * len(params[gone])
    want = outputs(method, inputs, params, *wanted)
    del params[gone]
    assert conformance.difference(outputs(method, inputs, params, *wanted), want)[1] == ""


def test_a_rule_that_is_said_stands_whatever_else_is_left_out() -> None:
    inputs, params, _ = case_of("ssl", 0)
    params["zone_rule"] = "lower: floor"
    want = outputs("ssl", inputs, params, "zone_score")
    del params["sigma_fraction_of_size"]
    assert outputs("ssl", inputs, params, "zone_score") == want
    assert want != outputs("ssl", inputs, {**params, "zone_rule": "upper"}, "zone_score")


def test_far_below_the_reference_the_penalty_goes_on_growing() -> None:
    """k3 is linear there, and cannot overflow."""
    inputs, params, _ = case_of("grpo")
    inputs["logp_ref"] = [[x - 25.0 for x in row] for row in inputs["logp_new"]]
    found = outputs("grpo", inputs, params, "kl_loss")["kl_loss"]
    inputs["logp_ref"] = [[x - 1.0 for x in row] for row in inputs["logp_ref"]]
    assert outputs("grpo", inputs, params, "kl_loss")["kl_loss"] - found == pytest.approx(1.0)


def test_products_of_ratios_go_further_than_ratios() -> None:
    inputs, params, _ = case_of("minpro")
    inputs["logp_new"] = [[old - 13.0 for old in row] for row in inputs["logp_old"]]
    found = outputs("minpro", inputs, params, "unclipped_weight")["unclipped_weight"]
    assert min(x for row in found for x in row if x) == pytest.approx(math.exp(-26))


def test_adam_counts_steps_that_rejected_everything() -> None:
    inputs, params, _ = case_of("capo_curvature")
    inputs["adam_state"] = {"t": 1, "m": {}, "v": {}}
    assert outputs("capo_curvature", inputs, params, "adam_state_after")["adam_state_after"]["t"] == 2
    one = case_of("capo_curvature", 1)
    del one[0]["adam_state"]
    assert conformance.difference(outputs("capo_curvature", one[0], one[1], *one[2]), one[2])[1] == ""


def test_no_share_of_the_tokens_keeps_none() -> None:
    inputs, params, _ = case_of("d3s")
    params |= {"K_init": 0.0, "K_final": 0.0}
    assert not any(numbers(outputs("d3s", inputs, params, "grad_logp_new")))


def test_questions_may_have_the_same_name_in_two_bundles() -> None:
    inputs, params, wanted = case_of("riskpo")
    twice = {name: value * 2 if isinstance(value, list) else value for name, value in inputs.items()}
    twice["bundle"] = [*inputs["bundle"], *("second" for _ in inputs["bundle"])]
    apart = {**twice, "group": [*inputs["group"], *(f"other {group}" for group in inputs["group"])]}
    assert outputs("riskpo", twice, params, *wanted) == outputs("riskpo", apart, params, *wanted)


def test_variants_by_name_and_in_a_table() -> None:
    for number, name in enumerate(("llm_release", "vl_release")):
        inputs, params, wanted = case_of("adora", number)
        found = outputs("adora", inputs, {**params, "variant": {"variant": name}}, *wanted)
        assert conformance.difference(found, wanted)[1] == ""


@pytest.mark.parametrize("method, number, change, words", [
    ("bnpo", 2, {"n_components": None}, "lists of rewards"),
    ("riskpo", 1, {"q_alpha": None}, "both tracked, or both null"),
    ("ssl", 0, {"grpo_std": "sample"}, "unknown grpo_std `sample`"),
])  # fmt: skip
def test_what_a_case_leaves_open_is_a_miss_that_says_so(method: str, number: int, change: dict, words: str) -> None:
    case = copy.deepcopy(CONTENT[method]["cases"][number])
    for name, value in change.items():
        place = case["params"] if name in case["params"] else case["inputs"]
        if value is None and place is case["params"]:
            del place[name]
        else:
            place[name] = value
    (miss,) = conformance.compare({"method": method, "cases": [case]}).misses
    assert words in miss.reason


@pytest.mark.parametrize("method", WITH_LOSS)
def test_what_stands_outside_the_mask_counts_nowhere(method):
    """Not even where it is no number."""
    for number, case in enumerate(CONTENT[method]["cases"]):
        inputs, params, wanted = case_of(method, number)
        if "mask" not in inputs or not any(len(set(row)) > 1 for row in inputs["mask"]):
            continue
        names = [n for n in ("logp_new", "logp_old", "logp_ref", "values_old", "values_new") if n in inputs]
        for name in names:
            inputs[name] = [
                [x if m else float("nan") for x, m in zip(row, mask, strict=True)]
                for row, mask in zip(inputs[name], inputs["mask"], strict=True)
            ]
        assert conformance.difference(outputs(method, inputs, params, *wanted), wanted)[1] == "", case["name"]


def test_otc_without_any_correct_rollout():
    inputs = {"tool_calls": [0, 3], "base_rewards": [0.0, 0.2], "group": ["q", "q"], "n_history": {"q": None}}
    params = {"c": 4.0, "alpha": 2.0, "correct_threshold": 0.5, "std_ddof": 0, "eps": 0.0}
    wanted = ("n_used", "n_history_after", "f_map", "r_tool_grpo", "shaped_reward_grpo", "advantages_grpo")
    found = outputs("otc", inputs, params, *wanted)
    assert found["n_used"] == found["n_history_after"] == {"q": None}
    assert found["f_map"] == [None, None] and found["r_tool_grpo"] == [1.0, 1.0]
    assert found["shaped_reward_grpo"] == [0.0, 0.4]
    assert found["advantages_grpo"] == pytest.approx([-1.0, 1.0])
    assert outputs("otc", {**inputs, "tool_calls": [0, 0]}, params, "tool_productivity") == {
        "tool_productivity": None
    }
