"""A user's own questions as an environment."""

from __future__ import annotations

import copy
import json

import pytest

import envs
from envs.jsonl import SYSTEM
from envs.play import run_script
from tests.envs import rewards

ROWS = [{"question": f"What is {i} plus {i}?", "answer": 2 * i, "note": "n"} for i in range(60)]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path, ROWS)


def write(folder, rows) -> str:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n\n")
    return str(path)


def test_the_contract_is_kept(file):
    report = envs.check(f"jsonl:{file}", tasks=5)
    assert report.rewards["oracle"] == 1.0


def test_splits_partition_the_file_by_content(file, tmp_path):
    env = envs.make(f"jsonl:{file}", eval_share=0.2)
    parts = {s: [env.task(s, i).prompt["question"] for i in range(env.task_count(s))] for s in env.splits}
    assert sorted(parts["train"] + parts["eval"]) == sorted(r["question"] for r in ROWS)
    assert 3 <= len(parts["eval"]) <= 25
    twice = envs.make(f"jsonl:{write(tmp_path, ROWS[::-1] + ROWS)}", eval_share=0.2)
    again = {twice.task("eval", i).prompt["question"] for i in range(twice.task_count("eval"))}
    assert again == set(parts["eval"])   # order and repetition do not matter


@pytest.mark.parametrize("count", [2, 3, 5])
def test_small_files_have_both_splits(tmp_path, count):
    env = envs.make(f"jsonl:{write(tmp_path, ROWS[:count])}")
    assert env.task_count("train") >= 1 and env.task_count("eval") >= 1
    assert env.task_count("train") + env.task_count("eval") == count


def play(env, text: str):
    env.reset(options={"index": 0})
    return env.step(text)


def test_default_reward_is_normalised_exact_match(file):
    env = envs.make(f"jsonl:{file}")
    truth = str(env.task("train", 0).truth["answer"])
    assert play(env, f"<answer>{truth}.0</answer>")[1] == 1.0
    assert play(env, truth)[1] == 0.0
    assert env.episode.messages[0] == {"role": "system", "content": SYSTEM}
    assert play(envs.make(f"jsonl:{file}", system=""), "x")[1] == 0.0


def test_own_reward_functions(file):
    spec = "tests.envs.rewards:"
    env = envs.make(f"jsonl:{file}", reward=spec + "length")
    assert play(env, "abcde")[1] == 0.5 and play(env, "x" * 10)[4]["verdict"].scores["correct"] == 1.0
    *_, info = play(envs.make(f"jsonl:{file}", reward=spec + "several"), "hm")
    assert info["verdict"].reward == 0.25 and info["verdict"].scores == {"correct": 0.0, "style": 0.5}
    *_, reward, terminated, _, info = play(envs.make(f"jsonl:{file}", reward=spec + "raises"), "hm")
    assert (reward, terminated) == (0.0, True) and "KeyError" in info["verdict"].failure
    env = envs.make(f"jsonl:{file}", reward=spec + "changes_the_row")
    play(env, "a")
    assert env.task("train", 0).truth["answer"] != "changed"
    assert rewards.length("x", {}) == 0.1


def test_demonstrations_and_messages(tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {i}."}],
         "demonstration": f"<answer>{i}</answer>", "answer": str(i)} for i in range(4)
    ]  # fmt: skip
    env = envs.make(f"jsonl:{write(tmp_path, rows)}")
    assert [m["role"] for m in env.reset(seed=1)[0]["messages"]] == ["system", "user"]
    assert env.demonstrators == {"oracle": 1.0}
    import numpy as np

    assert run_script(env, "oracle", np.random.default_rng(0)).reward == 1.0
    no_answers = write(tmp_path, [{"question": "a"}, {"question": "b"}])
    env = envs.make(f"jsonl:{no_answers}", reward="tests.envs.rewards:length")
    assert not env.demonstrators and "oracle" not in env.scripts


@pytest.mark.parametrize("rows, options, said", [
    ([*ROWS, "{broken"], {}, "line 61: not JSON"), ([*ROWS, "[1]"], {}, "line 61: an object expected"),
    ([{"q": "a"}, *ROWS], {}, r"line 1: needs a `question`.*\['q'\]"), (ROWS[:1], {}, "at least two different"),
    ([ROWS[0]] * 5, {}, "at least two different"), ([{"question": "a"}, {"question": "b"}], {}, "needs an `answer`"),
    ([{"messages": [{"role": "x", "content": ""}]}, *ROWS], {}, "line 1: messages: needs a role"),
    (ROWS, {"reward": "nonsense"}, "must be module:function"), (ROWS, {"reward": "no.module:f"}, "No module named"),
    (ROWS, {"reward": "json:nothing"}, "no function 'nothing'"), (ROWS, {"eval_share": 0}, "between 0 and 1"),
])  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, rows, options, said):
    with pytest.raises(ValueError, match=said):
        envs.make(f"jsonl:{write(tmp_path, rows)}", **options)


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"cannot read nowhere\.jsonl: No such file"):
        envs.make("jsonl:nowhere.jsonl")


def test_copies_do_not_carry_the_file(file):
    env = envs.make(f"jsonl:{file}")
    env.reset(seed=1)
    twin = copy.deepcopy(env)
    assert twin._rows() is env._rows()
