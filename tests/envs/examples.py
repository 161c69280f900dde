"""Small environments for tests; importable, so that other processes can make them."""

from __future__ import annotations

import random
import time

import numpy as np

from envs import ChatEnv, Reply, Task, Verdict, answers, fingerprint
from envs.hacks import COMMON_HACKS
from envs.random_agent import random_agent
from tools import Tool, Toolbox, ToolCall


def echo(text: str) -> str:
    """say it again"""
    return text


def oracle(env, rng):
    yield env.call_format.render("", [ToolCall("echo", {"text": env.episode.task.truth["answer"]})])
    yield f"<answer>{env.episode.task.truth['answer']}</answer>"


class Sound(ChatEnv):
    """Say the word that the question names."""

    name = "sound"
    scripts = {"oracle": oracle, "random": random_agent}  # noqa: RUF012
    hacks = COMMON_HACKS

    def task(self, split, index, level=None):
        word = f"{split}{index}"
        return Task(f"sound/{split}/{index}", split, index, 1, {"w": word}, {"answer": f"no{word}"}, fingerprint(word))

    def opening(self, task):
        return [{"role": "user", "content": f"What is the opposite of {task.prompt['w']}?"}]

    def toolbox(self, task):
        return Toolbox([Tool.from_function(echo)])

    def judge(self, task, final):
        correct = final is not None and (answers.extract(final) or "") == task.truth["answer"]
        return Verdict(float(correct), {"correct": float(correct)}, {"answered": final is not None})


class StepRewards(Sound):
    """Gives something on the way."""

    name = "steps"

    def reply(self, turn):
        if turn.calls:
            return Reply(tuple(self.call_tools(turn)), reward=0.25)
        return Reply(done=True)


class BrokenJudge(Sound):
    """Its verifier raises on some texts."""

    name = "broken"
    lowest_reward = -1.0

    def judge(self, task, final):
        raise ZeroDivisionError("no verdict today")


class UnstableTasks(Sound):
    """Its tasks depend on what was asked before."""

    count = 0

    def task(self, split, index, level=None):
        type(self).count += 1
        task = super().task(split, index, level)
        return Task(task.task_id, split, index, 1, {"w": str(self.count)}, task.truth, task.fingerprint)


class HashSeeded(Sound):
    """Its tasks differ from process to process."""

    def task(self, split, index, level=None):
        task = super().task(split, index, level)
        return Task(task.task_id, split, index, 1, task.prompt, task.truth, str(hash(("salted", task.task_id))))


class Leaking(Sound):
    """Its splits share tasks."""

    def task(self, split, index, level=None):
        task = super().task(split, index, level)
        return Task(task.task_id, split, index, 1, task.prompt, task.truth, fingerprint(index % 50))


class WeakOracle(Sound):
    """Its oracle is wrong now and then."""

    def _weak(env, rng):
        right = env.episode.task.index % 5
        yield f"<answer>{env.episode.task.truth['answer'] if right else 'x'}</answer>"

    scripts = {"oracle": _weak, "random": random_agent}  # noqa: RUF012


class Gullible(Sound):
    """Believes whoever says that the answer is right."""

    def judge(self, task, final):
        verdict = super().judge(task, final)
        if final and "correct" in final:
            return Verdict(1.0, {"correct": 1.0}, {})
        return verdict


class PaysForFormat(Sound):
    """An empty tag earns more than honesty."""

    def judge(self, task, final):
        verdict = super().judge(task, final)
        bonus = 0.1 * (final is not None and "<answer>" in final and not verdict.reward)
        return Verdict(verdict.reward + bonus, verdict.scores, verdict.facts)


class Uncopyable(Sound):
    """Holds something that cannot be copied."""

    def opening(self, task):
        self.handle = (i for i in range(3))
        return super().opening(task)


class Fragile(Sound):
    """Breaks on unusual text."""

    def reply(self, turn):
        if "\x00" in turn.content:
            raise RuntimeError("a NUL")
        return super().reply(turn)


class Chatty(Sound):
    """Repeats whatever it is told, without bounds."""

    def reply(self, turn):
        reply = super().reply(turn)
        if turn.calls:
            return Reply((*reply.messages, {"role": "user", "content": "x" * 300_000}))
        return reply


class GlobalRandom(Sound):
    """Draws from the global generators."""

    def opening(self, task):
        if task.index:
            random.random()
        return super().opening(task)


class GlobalNumpy(Sound):
    """Draws from numpy's global generator."""

    def opening(self, task):
        np.random.rand()
        return super().opening(task)


class Forgetful(Sound):
    """Its messages have no content."""

    def opening(self, task):
        return [{"role": "user"}]


class Long(Sound):
    """Its tiny profile is not tiny."""

    def opening(self, task):
        return [{"role": "user", "content": f"{task.prompt['w']} " + "word " * 800}]


class NotANumber(Sound):
    """Its verdicts are not finite."""

    def judge(self, task, final):
        verdict = super().judge(task, final)
        return Verdict(verdict.reward, {**verdict.scores, "utility": float("inf")}, verdict.facts)


class Clockwork(Sound):
    """Says the time."""

    def opening(self, task):
        return [{"role": "user", "content": f"{task.prompt['w']} at {time.perf_counter_ns()}"}]


class NoHacks(Sound):
    """Thinks that nobody cheats."""

    hacks = {}  # noqa: RUF012
