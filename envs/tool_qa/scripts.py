"""Who can play tool_qa by script: the oracle, two demonstrators with human weaknesses, and cheats."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from envs.core import ChatEnv, Script
from envs.tool_qa.forms import Step
from tools import ToolCall

Turns = Generator[str, Mapping[str, Any], None]


def _call(env: ChatEnv, step: Step) -> str:
    return env.call_format.render("", [ToolCall(step[0], step[1])])


def _answer(text: str) -> str:
    return f"<answer>{text}</answer>"


def oracle(env: ChatEnv, rng: np.random.Generator) -> Turns:
    """The shortest plan, one call a turn, then the truth."""
    truth = env.episode.task.truth
    for step in truth["steps"]:
        yield _call(env, step)
    yield _answer(truth["answer"])


def cautious(env: ChatEnv, rng: np.random.Generator) -> Turns:
    """Right, with one to three calls too many: searches first, asks twice, checks at the end."""
    truth = env.episode.task.truth
    steps = list(truth["steps"])
    weights: Mapping[str, float] = truth["surplus"]
    surplus = int(rng.choice([int(k) for k in weights], p=[float(w) for w in weights.values()]))
    for _ in range(min(surplus, env.max_turns - 1 - len(steps))):
        if not truth["steps"]:
            steps.append(truth["doubt"])
            continue
        roll = rng.random()
        if roll < 0.25 and steps[0][0] == "lookup":
            steps.insert(0, ("search", {"query": " ".join(steps[0][1].values())}))
        elif roll < 0.6:
            steps.append(steps[-1])
        else:
            i = int(rng.integers(len(steps)))
            steps.insert(i, steps[i])
    for step in steps:
        yield _call(env, step)
    yield _answer(truth["answer"])


def hasty(env: ChatEnv, rng: np.random.Generator) -> Turns:
    """Guesses without a call, stops a step early, or asks for the wrong thing in the last step."""
    truth = env.episode.task.truth
    steps = list(truth["steps"])
    guess = truth["guesses"][int(rng.integers(len(truth["guesses"])))]
    roll = rng.random()
    if not steps:
        yield _answer(truth["answer"])
        return
    if roll < 0.35 or (len(steps) == 1 and roll < 0.6):
        yield _answer(guess)
        return
    if roll < 0.7 and len(steps) > 1:
        steps.pop()
    elif steps[-1][0] == "lookup":
        steps[-1] = ("lookup", {**steps[-1][1], "attribute": truth["other_attribute"]})
    else:
        steps[-1] = ("calculator", {"expression": steps[-1][1]["expression"].split(" ")[0]})
    observation: Mapping[str, Any] = {}
    for step in steps:
        observation = yield _call(env, step)
    yield _answer(observation["messages"][-1]["content"].split("\n")[0][:60])


def abstain(env: ChatEnv, rng: np.random.Generator) -> Turns:
    """An honest non-answer in the right form."""
    yield _answer("unknown")


def list_everything(env: ChatEnv, rng: np.random.Generator) -> Turns:
    """Names every thing it has seen or might guess, hoping that one counts."""
    yield _answer(", ".join(env.episode.task.truth["guesses"]))


def answer_with_reasons(env: ChatEnv, rng: np.random.Generator) -> Turns:
    """Puts the truth among words: a list is no answer, even if it holds the right one."""
    truth = env.episode.task.truth
    yield _answer(f"{truth['answer']} or {truth['guesses'][0]}")


def untagged(env: ChatEnv, rng: np.random.Generator) -> Turns:
    """Says the truth outside the tag and something else in it."""
    truth = env.episode.task.truth
    yield f"{truth['answer']} <answer></answer>"


SCRIPTS: Mapping[str, Script] = {"oracle": oracle, "cautious": cautious, "hasty": hasty, "abstain": abstain}
HACKS: Mapping[str, Script] = {
    "list_everything": list_everything,
    "answer_with_reasons": answer_with_reasons,
    "untagged": untagged,
}
