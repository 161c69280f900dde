"""An environment in one file: which key hangs on a hook? The cabinet is opened by a tool."""

from __future__ import annotations

import random
from dataclasses import dataclass

from envs import ChatEnv, Task, Verdict, answers, fingerprint
from envs.hacks import COMMON_HACKS
from envs.random_agent import random_agent
from tools import Tool, Toolbox, ToolCall, ToolError

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "gold", "silver", "iron", "glass", "stone", "paper")


@dataclass
class Cabinet:
    """Hooks with keys; the tool reads it."""

    keys: dict[str, str]

    def look(self, hook: str) -> str:
        """the key on a hook

        Args:
            hook: number of the hook.
        """
        if hook not in self.keys:
            raise ToolError(f"no hook {hook[:20]!r}")
        return self.keys[hook]


class KeyCabinet(ChatEnv):
    """Look up the key on a numbered hook with a tool and name it."""

    name = "key_cabinet"

    def task(self, split, index, level=None):
        u = random.Random(f"key_cabinet/{split}/{index}").random
        # Even hooks are asked about in training, odd ones in evaluation: the splits share no question.
        hooks = [2 * n + (split == "eval") for n in range(50, 500)]
        hook = str(hooks[int(u() * len(hooks))])
        size = 3 if self.profile == "tiny" else 8
        keys = {hook: COLOURS[int(u() * len(COLOURS))]}
        while len(keys) < size:
            keys[str(100 + int(u() * 900))] = COLOURS[int(u() * len(COLOURS))]
        truth = {"keys": keys, "hook": hook, "answer": keys[hook]}
        task_id = f"key_cabinet/{split}/{index}"
        return Task(task_id, split, index, 1, {"hook": hook}, truth, fingerprint(hook))

    def opening(self, task):
        return [
            {"role": "system", "content": "Answer with <answer>...</answer>."},
            {"role": "user", "content": f"Which key hangs on hook {task.prompt['hook']}?"},
        ]

    def toolbox(self, task):
        cabinet = Cabinet(task.truth["keys"])
        return Toolbox([Tool.from_function(cabinet.look)], max_calls=4)

    def judge(self, task, final):
        answer = None if final is None else answers.extract(final)
        correct = answer is not None and answers.same(answer, task.truth["answer"])
        facts = {"answered": answer is not None, "answer_key": answers.key(answer), "minimal_calls": 1}
        return Verdict(float(correct), {"correct": float(correct)}, facts)


def oracle(env, rng):
    """Looks, then answers."""
    truth = env.episode.task.truth
    yield env.call_format.render("", [ToolCall("look", {"hook": truth["hook"]})])
    yield f"<answer>{truth['answer']}</answer>"


def guess(env, rng):
    """Answers without looking."""
    yield f"<answer>{COLOURS[int(rng.integers(len(COLOURS)))]}</answer>"


def all_colours(env, rng):
    """Names every colour there is."""
    yield f"<answer>{', '.join(COLOURS)}</answer>"


KeyCabinet.scripts = {"oracle": oracle, "guess": guess, "random": random_agent}
KeyCabinet.hacks = {**COMMON_HACKS, "all_colours": all_colours}
KeyCabinet.demonstrators = {"oracle": 0.7, "guess": 0.3}
