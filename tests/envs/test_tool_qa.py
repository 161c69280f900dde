"""tool_qa: what the plan, the documents, the names and the splits promise."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import envs
from agents.bundled import path
from envs.play import run_script
from envs.tool_qa import names, tasks, world
from tools import HERMES, ToolCall

ENV = envs.make("tool_qa")
LEVELS = tuple(ENV.levels)


def sample(split: str, level, count: int):
    return [ENV.task(split, i, level) for i in range(count)]


@pytest.fixture(scope="module")
def count_tokens():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path())

    def count(messages, tools) -> int:
        return len(tokenizer.apply_chat_template(list(messages), tools=list(tools), tokenize=True)["input_ids"])

    return count


TINY = {"profile": "tiny", "split": "eval"}


@pytest.mark.parametrize("options", [{}, {"level": "hard"}, TINY, {"format_weight": 0.1}])
def test_the_contract_is_kept(options, count_tokens):
    report = envs.check("tool_qa", tasks=6, pool=60, count_tokens=count_tokens, **options)
    assert report.rewards["oracle"] == pytest.approx(1.0)


def test_default_episodes_are_short(count_tokens):
    played = [run_script(ENV, "oracle", np.random.default_rng(i), {"index": i, "split": "eval"}) for i in range(120)]
    sizes = [count_tokens(p.messages, p.tools) for p in played]
    assert np.mean(sizes) <= 200 and max(sizes) <= 300


def test_most_default_tasks_need_two_hops():
    found = sample("train", None, 1500)
    chains = sum(t.truth["form"] == "chain2" for t in found) / len(found)
    calls = sum(len(t.truth["steps"]) >= 2 for t in found) / len(found)
    assert chains >= 0.40 - 0.03 and calls >= 0.60
    assert {t.level for t in found} == {1, 2, 3}
    assert 0.05 < sum(not t.truth["steps"] for t in found) / len(found) < 0.2
    assert tasks.MIXES["default"][2] >= 0.40


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_oracle_makes_exactly_the_minimal_calls(level, split):
    env = envs.make("tool_qa", level=level, split=split)
    for i in range(30):
        played = run_script(env, "oracle", np.random.default_rng(i), {"index": i})
        facts = played.verdict.facts
        assert played.reward == 1.0 and facts["tool_errors"] == 0 and facts["level"] == level
        assert facts["tool_calls"] == facts["minimal_calls"] == len(played.texts) - 1
        assert facts["hops"] <= facts["minimal_calls"]


@pytest.mark.parametrize("level", LEVELS)
def test_documents_show_no_fact_that_would_save_a_call(level):
    for task in sample("train", level, 150):
        truth = task.truth
        needed = [(s[1]["entity"], s[1]["attribute"]) for s in truth["steps"] if s[0] == "lookup"]
        shown = [
            (name, attribute) for name, attribute in needed
            for line in truth["documents"] if line.startswith(f"{name}: ")
            if f"{attribute} {truth['facts'][name][attribute]}" in line.removeprefix(f"{name}: ").split(", ")
        ]
        searches = [s for s in truth["steps"] if s[0] == "search"]
        assert len(shown) + len(searches) <= 1, task.prompt
        if shown:   # searching for it costs the call that looking it up would have cost
            assert shown == needed[:1]


@pytest.mark.parametrize("level", [2, 4])
def test_no_step_of_a_chain_can_be_skipped(level):
    """Asking an earlier thing of the chain for the last attribute never gives the answer."""
    for task in sample("eval", level, 150):
        if task.truth["form"] in ("chain2", "chain3", "found2"):
            path = [(s[1]["entity"], s[1]["attribute"]) for s in task.truth["steps"] if s[0] == "lookup"]
            last = path[-1][1]
            assert task.truth["facts"][path[-1][0]][last] == task.truth["answer"]
            for name, _ in path[:-1]:
                assert task.truth["facts"][name].get(last) != task.truth["answer"]
                assert name != task.truth["answer"]


def test_splits_share_no_name_and_no_question():
    train, held_out = sample("train", None, 1500), sample("eval", "all", 600)
    words = [{name for t in part for name in t.truth["facts"]} for part in (train, held_out)]
    assert len(words[0]) > 10_000 and not words[0] & words[1]
    prints = [{t.fingerprint for t in part} for part in (train, held_out)]
    assert len(prints[0]) > 1450 and not prints[0] & prints[1]
    for task in held_out[:300]:   # every question names at least one thing of its own split
        assert any(name in task.prompt["question"] for name in task.truth["facts"])


def test_names_are_easy_to_tell_apart():
    for task in sample("train", None, 200):
        things = list(task.truth["facts"])
        assert len({name[:2].lower() if name[1:2] in "aeiou" else name[:3].lower() for name in things}) == len(things)
        assert all(name.isalpha() and name.istitle() and len(name) <= 8 for name in things)


def test_numbers_are_short_in_the_default_levels():
    for task in sample("train", None, 600):
        said = [task.truth["answer"], *(v for t in task.truth["facts"].values() for v in t.values())]
        assert all(len(text) <= 5 for text in said if text.lstrip("-").isdigit())
        assert len(task.truth["answer"].lstrip("-")) <= 4 or not task.truth["answer"].lstrip("-").isdigit()


def test_a_world_agrees_with_itself():
    u = iter(np.random.default_rng(0).random(100_000)).__next__
    place = world.build(u, "eval", names.DATA["counts"])
    for company in place.things["company"]:
        staff = place.facts[company]["staff"].split(", ")
        assert staff == [p for p in place.things["person"] if place.facts[p]["company"] == company]
    for person in place.things["person"]:
        table = place.facts[person]
        assert len({person, table["mentor"], table["rival"]}) == 3
        assert table["birthplace"] in place.things["place"]


def test_demonstrators_show_surplus_and_haste():
    surplus, right = [], []
    for i in range(120):
        cautious = run_script(ENV, "cautious", np.random.default_rng(i), {"index": i})
        hasty = run_script(ENV, "hasty", np.random.default_rng(i), {"index": i})
        assert cautious.reward == 1.0 and cautious.verdict.facts["tool_errors"] == 0
        surplus.append(cautious.verdict.facts["tool_calls"] - cautious.verdict.facts["minimal_calls"])
        right.append(hasty.reward)
    assert set(surplus) == {1, 2, 3} and np.mean(surplus) > 1.5
    assert np.mean(right) < 0.25
    assert sum(ENV.demonstrators.values()) == pytest.approx(1.0)


def said(text: str, **options):
    env = envs.make("tool_qa", **options)
    env.reset(options={"index": 0})
    return env, env.step(text)


@pytest.mark.parametrize("text, correct, formed", [
    ("<answer>{}</answer>", 1, 1), ("It is <answer> {}. </answer>", 1, 1),
    ("<answer>x</answer><answer>{}</answer>", 1, 1),
    ("<answer>{}</answer><answer>x</answer>", 0, 1), ("{}", 0, 0), ("<answer>{0} or {0}</answer>", 0, 1),
    ("<answer></answer>", 0, 0), ("<answer>{}", 0, 0), ("<think><answer>{}</answer></think> <answer>no</answer>", 0, 1),
])  # fmt: skip
def test_grading(text, correct, formed):
    answer = ENV.task("train", 0).truth["answer"]
    _, (_, reward, terminated, _, info) = said(text.format(answer))
    assert terminated and info["verdict"].scores == {"correct": correct, "format": formed}
    assert reward == correct
    _, (_, reward, *_) = said(text.format(answer), format_weight=0.25)
    assert reward == 0.75 * correct + 0.25 * formed


def test_tools_answer_with_help():
    env = envs.make("tool_qa")
    env.reset(options={"index": 0})
    facts = env.episode.task.truth["facts"]
    name = next(iter(facts))

    def tell(tool: str, **arguments: str) -> str:
        return env.step(HERMES.render("", [ToolCall(tool, arguments)]))[0]["messages"][0]["content"]

    assert tell("lookup", entity=name, attribute="mentr") == "error: no attribute 'mentr'; try mentor"
    assert tell("lookup", entity=name, attribute="xyz").startswith("error: no attribute 'xyz'; try mentor, rival")
    assert tell("lookup", entity=name[:-1], attribute="age").endswith(f"; try {name}")
    assert tell("search", query="zzz") == "nothing found"
    assert tell("calculator", expression="9**9**9") == "error: number too large"
    assert tell("lookup", entity=name, attribute="age").isdigit()


def test_levels_by_number_name_and_reset_option():
    assert {t.level for t in sample("eval", "hard", 60)} == {4, 5}
    env = envs.make("tool_qa", level=4)
    assert env.reset(seed=1)[1]["level"] == 4 and env.reset(seed=1, options={"level": 2})[1]["level"] == 2
    assert env.task("eval", 3).task_id != env.task("eval", 3, "hard").task_id
    with pytest.raises(ValueError, match="did you mean 'hard'"):
        envs.make("tool_qa", level="hardd")
    with pytest.raises(ValueError, match="format_weight"):
        envs.make("tool_qa", format_weight=1.0)


def test_every_form_occurs_and_has_its_share():
    shares = {form for level in tasks.CONFIG["levels"].values() for form in level["forms"]}
    seen = {t.truth["form"] for level in LEVELS for t in sample("train", level, 60)}
    assert seen == shares
