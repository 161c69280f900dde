"""Multi-hop questions over small generated worlds, answered with look-up, search and a calculator."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import scenarios
from envs import answers
from envs.core import ChatEnv, Message, Script, Task, Verdict, fingerprint
from envs.hacks import COMMON_HACKS
from envs.random_agent import random_agent
from envs.tool_qa import forms, world
from envs.tool_qa.names import DATA, Uniform, pick, weighted
from envs.tool_qa.scripts import HACKS, SCRIPTS
from tools import Toolbox
from tools.search import Search

CONFIG: dict[str, Any] = tomllib.loads(
    (scenarios.folder("tool_qa") / "questions.toml").read_text(encoding="utf-8")
)
_TRIES = 200


class ToolQA(ChatEnv):
    """Multi-hop questions over small generated worlds, answered with look-up, search and a calculator.

    Args:
        format_weight: share of the reward that a well-formed answer earns, right or wrong.
        max_calls: tool calls that an episode may make.
        options: those of `ChatEnv`.
    """

    name = "tool_qa"
    levels: ClassVar[Mapping[int, str]] = {int(k): v["text"] for k, v in CONFIG["levels"].items()}
    mixes: ClassVar[Mapping[str, Mapping[int, float]]] = {
        mix: {int(k): w for k, w in weights.items()} for mix, weights in CONFIG["mixes"].items()
    }
    scripts: ClassVar[Mapping[str, Script]] = {**SCRIPTS, "random": random_agent}
    hacks: ClassVar[Mapping[str, Script]] = {**COMMON_HACKS, **HACKS}
    demonstrators: ClassVar[Mapping[str, float]] = CONFIG["demonstrators"]

    def __init__(self, *, format_weight: float = 0.0, max_calls: int = 16, **options: Any) -> None:
        if not 0 <= format_weight < 1:
            raise ValueError(f"format_weight must be in [0, 1), got {format_weight}")
        self.format_weight, self.max_calls = format_weight, max_calls
        super().__init__(**options)

    def task(self, split: str, index: int, level: int | str | None = None) -> Task:
        wanted = self.level if level is None else self._known_level(level)
        task_id = f"tool_qa/{split}/{'mix' if wanted is None else wanted}/{index}"
        if self.profile != "default":
            task_id += f"/{self.profile}"
        u = random.Random(task_id).random   # a generator of its own; seeded by the text's SHA-512
        chosen = self.pick_level(level, u())
        form = weighted(u, CONFIG["levels"][str(chosen)]["forms"])
        counts = DATA["tiny_counts" if self.profile == "tiny" else "counts"]
        for _ in range(_TRIES):
            place = world.build(u, split, counts)
            composed = forms.compose(u, place, form, CONFIG)
            if composed is None:
                continue
            question, text = composed
            documents = world.documents(u, place, frozenset(question.needed), question.shown)
            if self._findable(question, documents):
                truth = _truth(u, place, form, question, documents)
                return Task(task_id, split, index, chosen, {"question": text}, truth, fingerprint(text))
        raise RuntimeError(f"no world suits form {form!r} after {_TRIES} tries")

    def opening(self, task: Task) -> Sequence[Message]:
        return (
            {"role": "system", "content": CONFIG["system"]["text"]},
            {"role": "user", "content": task.prompt["question"]},
        )

    def toolbox(self, task: Task) -> Toolbox:
        library = world.Library(task.truth["facts"], self._search(task.truth["documents"]))
        tools = (
            replace(world.LOOKUP, fn=library.lookup), replace(world.SEARCH, fn=library.search), world.CALCULATOR,
        )
        return Toolbox(tools, max_calls=self.max_calls, max_output_chars=400)

    def judge(self, task: Task, final: str | None) -> Verdict:
        answer = None if final is None else answers.extract(final)
        correct = answer is not None and answers.same(answer, task.truth["answer"])
        well_formed = answer is not None and 0 < len(answer.strip()) <= answers.MAX_ANSWER_CHARS
        reward = (1 - self.format_weight) * correct + self.format_weight * well_formed
        facts = {
            "answered": answer is not None, "answer_key": task.truth["answer"],
            "answer": None if answer is None else answer[: answers.MAX_ANSWER_CHARS],
            "minimal_calls": len(task.truth["steps"]), "hops": task.truth["hops"], "form": task.truth["form"],
        }
        return Verdict(reward, {"correct": float(correct), "format": float(well_formed)}, facts)

    def _search(self, documents: Sequence[str]) -> Search:
        return Search(documents, DATA["search"]["tiny_top_k" if self.profile == "tiny" else "top_k"])

    def _findable(self, question: forms.Question, documents: list[str]) -> bool:
        """Whether the search that the plan needs brings up the right document first."""
        for tool, arguments in question.steps:
            if tool == "search":
                name = question.shown[0] if question.shown else ""
                return self._search(documents)(arguments["query"])[:1] == [
                    d for d in documents if d.startswith(f"{name}:")
                ]
        return True


def _truth(
    u: Uniform, place: world.World, form: str, question: forms.Question, documents: list[str]
) -> dict[str, Any]:
    """What verifier, tools and scripts know."""
    people = place.things["person"]
    guesses = [question.words.get("x", people[0]), pick(u, people), str(10 + int(u() * 900))]
    last = question.steps[-1][1] if question.steps else {}
    known = [a for a in place.facts.get(last.get("entity", ""), {}) if a != last.get("attribute")]
    return {
        "answer": question.answer, "steps": tuple(question.steps), "hops": question.hops, "form": form,
        "facts": place.facts, "documents": tuple(documents), "surplus": CONFIG["surplus"],
        "guesses": tuple(g for g in guesses if g != question.answer) or ("unknown",),
        "other_attribute": pick(u, known) if known else "name", "doubt": _doubt(question, people),
    }


def _doubt(question: forms.Question, people: Sequence[str]) -> forms.Step:
    """The call that a needlessly careful agent makes where no call is needed."""
    words = question.words
    if {"m", "n"} <= words.keys():
        return forms.calculation(f"{words['m']} {'>' if 'y' in words else '+'} {words['n']}")
    return "search", {"query": words.get("np", people[0])}
