"""From (profile, split, index, level) to a task: the world, the question, the documents, the truth."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import scenarios
from envs.core import Task, draw_level, fingerprint
from envs.tool_qa import forms, world
from envs.tool_qa.names import DATA, Uniform, pick, weighted
from tools.search import Search

CONFIG: dict[str, Any] = tomllib.loads((scenarios.folder("tool_qa") / "questions.toml").read_text(encoding="utf-8"))
MIXES = {mix: {int(k): w for k, w in weights.items()} for mix, weights in CONFIG["mixes"].items()}
_TRIES = 200


@lru_cache(maxsize=1024)  # the members of a group, and both evaluations of a run, ask for the same tasks
def generate(name: str, profile: str, split: str, index: int, level: int | str | None) -> Task:
    """The task of that number; `level` is a level, the name of a mix, or None for the default mix."""
    task_id = f"{name}/{split}/{level or 'default'}/{index}" + ("" if profile == "default" else f"/{profile}")
    u = random.Random(task_id).random  # a generator of its own, seeded by the text's SHA-512
    chosen = draw_level(level or "default", MIXES, u())
    form = weighted(u, CONFIG["levels"][str(chosen)]["forms"])
    counts = DATA["tiny_counts" if profile == "tiny" else "counts"]
    top_k = DATA["search"]["tiny_top_k" if profile == "tiny" else "top_k"]
    for _ in range(_TRIES):
        place = world.build(u, split, counts)
        composed = forms.compose(u, place, form, CONFIG)
        if composed is None:
            continue
        question, text = composed
        documents = world.documents(u, place, frozenset(question.needed), question.shown)
        if _findable(question, documents):
            truth = {**_truth(u, place, form, question), "documents": tuple(documents), "top_k": top_k}
            return Task(task_id, split, index, chosen, {"question": text}, truth, fingerprint(text))
    raise RuntimeError(f"no world suits form {form!r} after {_TRIES} tries")


def _findable(question: forms.Question, documents: list[str]) -> bool:
    """Whether the search that the plan begins with, if any, brings up the right document first."""
    if question.shown is None or not question.steps or question.steps[0][0] != "search":
        return True
    best = Search(documents, 1)(question.steps[0][1]["query"])
    return best[0].startswith(f"{question.shown[0]}:")


def _truth(u: Uniform, place: world.World, form: str, question: forms.Question) -> dict[str, Any]:
    """What verifier, tools and scripts know."""
    people = place.things["person"]
    guesses = [question.words.get("x", people[0]), pick(u, people), str(10 + int(u() * 900))]
    last = question.steps[-1][1] if question.steps else {}
    known = [a for a in place.facts.get(last.get("entity", ""), {}) if a != last.get("attribute")]
    return {
        "answer": question.answer,
        "steps": tuple(question.steps),
        "hops": question.hops,
        "form": form,
        "facts": place.facts,
        "surplus": CONFIG["surplus"],
        "guesses": tuple(g for g in guesses if g != question.answer) or ("unknown",),
        "other_attribute": pick(u, known) if known else "name",
        "doubt": _doubt(question, people),
    }


def _doubt(question: forms.Question, people: Sequence[str]) -> forms.Step:
    """The call that a needlessly careful agent makes where no call is needed."""
    words = question.words
    if {"m", "n"} <= words.keys():
        return forms.calculation(f"{words['m']} {'>' if 'y' in words else '+'} {words['n']}")
    return "search", {"query": words.get("np", people[0])}
