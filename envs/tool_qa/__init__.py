"""Multi-hop questions over small generated worlds, answered with look-up, search and a calculator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from envs import answers
from envs.core import ChatEnv, Message, Script, Task, Verdict
from envs.hacks import COMMON_HACKS
from envs.random_agent import random_agent
from envs.tool_qa import world
from envs.tool_qa.scripts import HACKS, SCRIPTS
from envs.tool_qa.tasks import CONFIG, MIXES, generate
from tools import Toolbox
from tools.search import Search


class ToolQA(ChatEnv):
    """Multi-hop questions over small generated worlds, answered with look-up, search and a calculator.

    Args:
        format_weight: share of the reward that a well-formed answer earns, right or wrong.
        max_calls: tool calls that an episode may make.
        options: those of `ChatEnv`.
    """

    name = "tool_qa"
    levels: ClassVar[Mapping[int, str]] = {int(k): v["text"] for k, v in CONFIG["levels"].items()}
    mixes: ClassVar[Mapping[str, Mapping[int, float]]] = MIXES
    scripts: ClassVar[Mapping[str, Script]] = {**SCRIPTS, "random": random_agent}
    hacks: ClassVar[Mapping[str, Script]] = {**COMMON_HACKS, **HACKS}
    demonstrators: ClassVar[Mapping[str, float]] = CONFIG["demonstrators"]

    def __init__(self, *, format_weight: float = 0.0, max_calls: int = 16, **options: Any) -> None:
        if not 0 <= format_weight < 1:
            raise ValueError(f"format_weight must be in [0, 1), got {format_weight}")
        self.format_weight, self.max_calls = format_weight, max_calls
        super().__init__(**options)

    def task(self, split: str, index: int, level: int | str | None = None) -> Task:
        return generate(self.name, self.profile, split, index, self.known_level(self.level if level is None else level))

    def opening(self, task: Task) -> Sequence[Message]:
        return (
            {"role": "system", "content": CONFIG["system"]["text"]},
            {"role": "user", "content": task.prompt["question"]},
        )

    def toolbox(self, task: Task) -> Toolbox:
        library = world.Library(task.truth["facts"], Search(task.truth["documents"], task.truth["top_k"]))
        tools = (
            replace(world.LOOKUP, fn=library.lookup),
            replace(world.SEARCH, fn=library.search),
            world.CALCULATOR,
        )
        return Toolbox(tools, max_calls=self.max_calls, max_output_chars=400)

    def judge(self, task: Task, final: str | None) -> Verdict:
        answer = None if final is None else answers.extract(final)
        correct = answer is not None and answers.same(answer, task.truth["answer"])
        well_formed = answer is not None and 0 < len(answer.strip()) <= answers.MAX_ANSWER_CHARS
        reward = (1 - self.format_weight) * correct + self.format_weight * well_formed
        facts = {
            "answered": answer is not None,
            "answer_key": answers.key(answer),
            "truth": task.truth["answer"],
            "answer": None if answer is None else answer[: answers.MAX_ANSWER_CHARS],
            "minimal_calls": len(task.truth["steps"]),
            "hops": task.truth["hops"],
            "form": task.truth["form"],
        }
        return Verdict(reward, {"correct": float(correct), "format": float(well_formed)}, facts)
