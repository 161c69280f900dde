"""`envs.check` passes what is sound and names the rule that a broken environment breaks."""

from __future__ import annotations

import pytest

import envs
from tests.envs import examples
from tests.envs.examples import Sound


def test_a_sound_environment_passes():
    report = envs.check(Sound, tasks=4, pool=60)
    assert set(report.rules) >= {"gymnasium", "oracle", "hacks", "hostile text", "copies", "other process"}
    assert report.rewards["oracle"] == 1.0 and max(v for k, v in report.rewards.items() if k != "oracle") == 0.0


def test_an_environment_object_can_be_checked():
    assert envs.check(Sound(max_turns=5), tasks=2, pool=10).rules["other process"].startswith("not looked at")


@pytest.mark.parametrize("cls, rule", [
    (examples.Forgetful, "gymnasium"), (examples.NoHacks, "card"), (examples.UnstableTasks, "determinism"),
    (examples.Clockwork, "determinism"), (examples.HashSeeded, "other process"), (examples.Leaking, "splits"),
    (examples.WeakOracle, "oracle"), (examples.Gullible, "hacks"), (examples.PaysForFormat, "hacks"),
    (examples.Uncopyable, "copies"), (examples.Fragile, "hostile text"), (examples.Chatty, "hostile text"),
    (examples.GlobalRandom, "global state"), (examples.GlobalNumpy, "global state"), (examples.Long, "tiny profile"),
    (examples.NotANumber, "verdicts"), (examples.BrokenJudge, "oracle"),
])  # fmt: skip
def test_the_broken_rule_is_named(cls, rule):
    with pytest.raises(envs.CheckError, match=rf"^\[{rule}\] .+"):
        envs.check(cls, tasks=6, pool=60)


def test_wrong_specs_and_options_are_not_broken_rules():
    with pytest.raises(envs.UnknownEnv, match="did you mean"):
        envs.check("tol_qa")
    with pytest.raises(TypeError, match="did you mean"):
        envs.check("tool_qa", max_tuns=3)


def test_tokens_are_counted_where_they_can_be():
    with pytest.raises(envs.CheckError, match="999 tokens, more than 512"):
        envs.check(Sound, tasks=2, pool=10, count_tokens=lambda messages, tools: 999)
    report = envs.check(Sound, tasks=2, pool=10, count_tokens=lambda messages, tools: 99)
    assert report.rules["tiny profile"] == "at most 99 tokens"
