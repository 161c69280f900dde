"""The function, not the file: cases that the files of golden numbers do not hold."""

from __future__ import annotations

import copy

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
