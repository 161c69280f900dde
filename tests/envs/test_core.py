"""`ChatEnv`: Gymnasium's contract, endings, verdicts, copies, what is handed out."""

from __future__ import annotations

import copy
import pickle

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded

import envs
from envs.core import draw_level, one_of
from envs.play import run_script
from tests.envs.examples import BrokenJudge, Sound, StepRewards
from tools import HERMES, ToolCall

CALL = HERMES.render("", [ToolCall("echo", {"text": "hi"})])


def started(cls=Sound, **options):
    env = cls(**options)
    env.reset(options={"index": 3})
    return env


def test_only_new_messages_come_back():
    env = Sound()
    observation, info = env.reset(options={"index": 3})
    assert [m["role"] for m in observation["messages"]] == ["user"]
    assert info == {"task_id": "sound/train/3", "split": "train", "index": 3, "level": 1}
    observation, reward, terminated, truncated, info = env.step(CALL)
    assert observation["messages"] == ({"role": "tool", "name": "echo", "content": "hi"},)
    assert (reward, terminated, truncated, info["task_id"]) == (0.0, False, False, "sound/train/3")
    assert [(r.call.name, r.text, r.error) for r in info["tool_results"]] == [("echo", "hi", None)]
    observation, reward, terminated, truncated, info = env.step("<answer>notrain3</answer>")
    assert (observation["messages"], reward, terminated, truncated) == ((), 1.0, True, False)
    assert info["tool_results"] == ()
    assert info["stop_reason"] == "answered"
    facts = info["verdict"].facts
    assert (facts["tool_calls"], facts["tool_errors"], facts["turns"], facts["level"]) == (1, 0, 2, 1)
    assert [m["role"] for m in env.episode.messages] == ["user", "assistant", "tool", "assistant"]


def test_what_is_handed_out_belongs_to_the_caller():
    env = Sound()
    observation, _ = env.reset(options={"index": 3})
    observation["messages"][0]["content"] = "changed"
    next(iter(observation["tools"]))["function"]["name"] = "changed"
    observation["tools"][0]["function"]["name"] = "changed"
    assert env.episode.messages[0]["content"] != "changed"
    again, _ = env.reset(options={"index": 3})
    assert again["tools"][0]["function"]["name"] == "echo"
    assert again["tools"] is observation["tools"]   # so that those who format tools may remember by identity
    assert copy.deepcopy(again["tools"]) == again["tools"] == pickle.loads(pickle.dumps(again["tools"]))


def test_endings():
    env = started(max_turns=2)
    env.step(CALL)
    *_, terminated, truncated, info = env.step(CALL)
    assert (terminated, truncated, info["stop_reason"]) == (False, True, "max_turns")
    env = started(max_chars=10)
    *_, truncated, info = env.step("x" * 11)
    assert truncated and info["stop_reason"] == "too_long"
    assert info["verdict"].facts["answered"] is False
    env = started()
    reward, info = env.finish("context")
    assert (reward, info["stop_reason"], info["verdict"].scores) == (0.0, "context", {"correct": 0.0})
    for late in (lambda: env.step("x"), lambda: env.finish("context"), lambda: Sound().step("x")):
        with pytest.raises(ResetNeeded, match="reset"):
            late()


def test_an_action_is_text():
    with pytest.raises(InvalidAction, match="text of a turn, got int"):
        started().step(7)   # type: ignore[arg-type]
    assert started().step(np.str_("<answer>notrain3</answer>"))[1] == 1.0


def test_step_rewards_add_up_to_the_verdict():
    env = started(StepRewards)
    rewards = [env.step(CALL)[1], env.step(CALL)[1], env.step("<answer>notrain3</answer>")[1]]
    assert rewards == [0.25, 0.25, 0.5]
    env = started(StepRewards)
    assert env.step(CALL)[1] + env.finish("length")[0] == 0.0


def test_a_raising_verifier_is_an_outcome():
    *_, reward, terminated, _, info = started(BrokenJudge).step("hm")
    assert (reward, terminated) == (-1.0, True)
    assert info["verdict"].failure == "ZeroDivisionError: no verdict today"
    assert info["verdict"].facts["turns"] == 1


@pytest.mark.parametrize("options, said", [
    ({"split": "tran"}, "did you mean 'train'"), ({"profile": "tny"}, "did you mean 'tiny'"),
    ({"level": 9}, "unknown level '9'"), ({"render_mode": "human"}, "unknown render_mode"),
    ({"max_turns": 0}, "must be positive"), ({"call_format": "hermse"}, "did you mean 'hermes'"),
])  # fmt: skip
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Sound(**options)


def test_wrong_reset_options_are_named():
    env = Sound()
    with pytest.raises(ValueError, match="did you mean 'index'"):
        env.reset(options={"indx": 3})
    with pytest.raises(ValueError, match="no task -1"):
        env.reset(options={"index": -1})
    with pytest.raises(ValueError, match="did you mean 'eval'"):
        env.reset(options={"split": "evl"})


def test_seed_and_options_choose_the_task():
    env = Sound()
    a, b = env.reset(seed=7)[1], env.reset(seed=7)[1]
    assert a == b != env.reset(seed=8)[1]
    assert env.reset()[1] != env.reset()[1]
    assert env.reset(options={"index": 4, "split": "eval", "level": None})[1]["task_id"] == "sound/eval/4"


def test_lone_surrogates_never_come_out_again():
    env = started()
    env.step("\ud800" + HERMES.open + '{"name": "\\ud800"}' + HERMES.close)
    env.step("\udfff")
    for message in env.episode.messages:
        message["content"].encode()


def test_render_is_readable_and_cannot_drive_a_terminal():
    env = Sound(render_mode="ansi")
    assert env.render() == "(no episode)\n"
    env.reset(options={"index": 3})
    env.step(CALL)
    env.step("\x1b[2J<answer>notrain3</answer>")
    text = env.render()
    assert "tool:echo | hi" in text and "answered: reward 1 (correct 1)" in text and "\x1b" not in text
    assert Sound().render() is None


def test_copies_go_on_alone():
    env = started()
    env.step(CALL)
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert twin.step("<answer>notrain3</answer>")[1] == 1.0
        assert twin.episode.verdict is not None and env.episode.verdict is None
    assert env.step("<answer>notrain3</answer>")[1] == 1.0


def test_script_that_ends_early_finishes_the_episode():
    def brief(env, rng):
        yield CALL

    played = run_script(Sound(), brief, np.random.default_rng(0), {"index": 1})
    assert played.stop_reason == "script_ended" and len(played.texts) == 1
    with pytest.raises(ValueError, match="did you mean 'oracle'"):
        run_script(Sound(), "oracel", np.random.default_rng(0))


def test_levels_from_mixes():
    mixes = {"default": {1: 1.0, 2: 3.0}}
    draws = [draw_level("default", mixes, u / 1000) for u in range(1000)]
    assert draws.count(1) == 250 and draws.count(2) == 750
    assert draw_level(5, mixes, 0.9) == 5 and draw_level("default", mixes, 1.0) == 2


def test_one_of_lists_what_is_known():
    with pytest.raises(ValueError, match=r"unknown thing 'x' \(known: a, b\)"):
        one_of("x", ("a", "b"), "thing")


# ------------------------------------------------------------ through Gymnasium


def test_gymnasium_make():
    for spec in ("palaestra/ToolQA-v0", "envs:palaestra/ToolQA-v0"):
        env = gymnasium.make(spec, level=2)
        observation, _ = env.reset(seed=7)
        assert observation in env.observation_space
        assert env.unwrapped.level == 2
        *_, terminated, truncated, info = env.step("<answer>x</answer>")
        assert terminated and not truncated and info["verdict"].reward == 0.0


@pytest.mark.parametrize("mode, how", [("sync", {}), ("async", {"shared_memory": False})])
def test_gymnasium_make_vec(mode, how):
    alone = [envs.make("tool_qa") for _ in range(4)]
    firsts = [env.reset(seed=5 + i)[0]["messages"] for i, env in enumerate(alone)]
    several = gymnasium.make_vec("palaestra/ToolQA-v0", num_envs=4, vectorization_mode=mode, vector_kwargs=how)
    try:
        observations, _ = several.reset(seed=5)
        assert list(observations["messages"]) == firsts
        lookup = HERMES.render("", [ToolCall("lookup", {"entity": "x", "attribute": "y"})])
        texts = ("<answer>x</answer>", lookup, "", "<tool_call>")
        observations, rewards, terminated, truncated, infos = several.step(texts)
        assert list(terminated) == [True, False, True, False] and not any(truncated)
        assert [len(m) for m in observations["messages"]] == [0, 1, 0, 1]
        assert list(rewards) == [0.0] * 4 and infos["verdict"][0].scores["format"] == 1.0
        observations, *_ = several.step(texts)   # those that ended are reset
        assert len(observations["messages"][0]) == 2
    finally:
        several.close()
