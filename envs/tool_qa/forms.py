"""The forms of questions: each picks facts of a world and knows the shortest way by construction.

A call yields one fact or one calculation, so the plan's length is the smallest number of calls that does not
guess: documents never hold a fact that the question needs, except one (see `Question.shown`), and where a
step too few would by chance give the right answer, the world is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from envs.tool_qa.names import Uniform, pick, sample
from envs.tool_qa.world import World
from tools.calculator import calculator

Step = tuple[str, Mapping[str, str]]
"""(tool, arguments) of one call."""
Fact = tuple[str, str]
"""(name, attribute)."""


@dataclass
class Question:
    """A question under construction."""

    words: dict[str, str]
    """What the wording's placeholders stand for."""
    answer: str
    """The truth."""
    steps: list[Step]
    """The shortest plan."""
    hops: int
    """Calls that depend on one another: the plan's depth."""
    needed: list[Fact] = field(default_factory=list)
    """Facts that the plan reads."""
    shown: Fact | None = None
    """The one needed fact that the documents hold: what must be searched, or the first that is looked up."""
    wording: str = ""
    """Name of the wordings, if other than the form's."""


@dataclass
class Draft:
    """A world and the draws by which a question is made of it."""

    u: Uniform
    world: World
    of_style: bool
    """Whether noun phrases say "the a of X" (else "X's a")."""

    def phrase(self, name: str, *attributes: str) -> str:
        for attribute in attributes:
            name = f"the {attribute} of {name}" if self.of_style else f"{name}'s {attribute}"
        return name

    def fact(self, name: str, attribute: str) -> str:
        return self.world.facts[name][attribute]

    def thing(self, kinds: tuple[str, ...] = ("person", "person", "person", "place", "company")) -> str:
        return pick(self.u, self.world.things[pick(self.u, kinds)])

    def chain(self, start: str, length: int, last_numeric: bool = False) -> list[Fact] | None:
        """Facts that follow one another from `start`; None where a shorter way leads to the same answer."""
        path: list[Fact] = []
        name = start
        seen = {start}
        for i in range(length):
            last = i == length - 1
            table = self.world.facts[name]
            choices = (
                self.world.numeric(name)
                if last and last_numeric
                else ([a for a in table if a != "staff"] if last else self.world.links(name))
            )
            choices = [a for a in choices if a not in {a for _, a in path}]
            if not choices:
                return None
            attribute = pick(self.u, choices)
            path.append((name, attribute))
            name = table[attribute]
            if name in seen:
                return None
            seen.add(name)
        attribute = path[-1][1]
        if any(self.world.facts[n].get(attribute) == name for n, _ in path[:-1]):
            return None
        return path

    def lookups(self, path: list[Fact]) -> list[Step]:
        return [lookup(name, attribute) for name, attribute in path]


def lookup(name: str, attribute: str) -> Step:
    return "lookup", {"entity": name, "attribute": attribute}


def calculation(expression: str) -> Step:
    return "calculator", {"expression": expression}


def one_hop(d: Draft) -> Question | None:
    return _chain(d, 1)


def chain2(d: Draft) -> Question | None:
    return _chain(d, 2)


def chain3(d: Draft) -> Question | None:
    return _chain(d, 3)


def _chain(d: Draft, length: int) -> Question | None:
    start = d.thing()
    path = d.chain(start, length)
    if path is None:
        return None
    words = {"np": d.phrase(start, *(a for _, a in path))}
    return Question(words, d.fact(*path[-1]), d.lookups(path), length, path, path[0])


def stated(d: Draft) -> Question | None:
    """The fact stands in the question, beside another."""
    name = d.thing()
    attribute, other = sample(d.u, [a for a in d.world.facts[name] if a != "staff"], 2)
    say = {k: f"{d.phrase(name, a)} is {d.fact(name, a)}" for k, a in (("fact", attribute), ("other", other))}
    return Question({**say, "np": d.phrase(name, attribute)}, d.fact(name, attribute), [], 0)


def small_sum(d: Draft) -> Question | None:
    m, n = (2 + int(d.u() * 8) for _ in range(2))
    return Question({"x": d.thing(("person",)), "m": str(m), "n": str(n)}, str(m + n), [], 0)


def small_comparison(d: Draft) -> Question | None:
    x, y = sample(d.u, d.world.things["person"], 2)
    m, n = (2 + int(d.u() * 18) for _ in range(2))
    if m == n:
        return None
    return Question({"x": x, "m": str(m), "y": y, "n": str(n)}, x if m > n else y, [], 0)


def _two_numbers(d: Draft) -> tuple[str, str, str] | None:
    """Two things and a number known of both, the first thing having more."""
    kind = pick(d.u, ("person", "person", "place", "company"))
    x, y = sample(d.u, d.world.things[kind], 2)
    attribute = pick(d.u, d.world.numeric(x))
    m, n = int(d.fact(x, attribute)), int(d.fact(y, attribute))
    return None if m == n else (x, y, attribute) if m > n else (y, x, attribute)


def _calculated(d: Draft, paths: list[list[Fact]], sign: str, words: dict[str, str], hops: int) -> Question:
    """Look-ups along several paths, then one calculation over their ends."""
    expression = f" {sign} ".join(d.fact(*path[-1]) for path in paths)
    facts = [fact for path in paths for fact in path]
    steps = [*d.lookups(facts), calculation(expression)]
    return Question(words, calculator(expression), steps, hops, facts, facts[0])


def sum2(d: Draft) -> Question | None:
    found = _two_numbers(d)
    if found is None:
        return None
    x, y, a = found if d.u() < 0.5 else (found[1], found[0], found[2])
    return _calculated(d, [[(x, a)], [(y, a)]], "+", {"np": d.phrase(x, a), "np2": d.phrase(y, a)}, 2)


def minus2(d: Draft) -> Question | None:
    found = _two_numbers(d)
    if found is None:
        return None
    x, y, a = found
    return _calculated(d, [[(x, a)], [(y, a)]], "-", {"np": d.phrase(x, a), "np2": d.phrase(y, a)}, 2)


def compare2(d: Draft) -> Question | None:
    """Answered by a name; the calculator says whether the first named has more."""
    found = _two_numbers(d)
    if found is None:
        return None
    more, less, a = found
    x, y = (more, less) if d.u() < 0.5 else (less, more)
    higher = d.u() < 0.5
    question = _calculated(d, [[(x, a)], [(y, a)]], ">" if higher else "<", {"x": x, "y": y, "a": a}, 2)
    question.answer = more if higher else less
    question.wording = "compare2_more" if higher else "compare2_less"
    return question


def chain_sum(d: Draft) -> Question | None:
    """The end of a chain of two, plus a number of somebody else."""
    x, y = sample(d.u, d.world.things["person"], 2)
    path = d.chain(x, 2, last_numeric=True)
    if path is None or path[-1][0] == y or path[-1][1] not in d.world.facts[y]:
        return None
    a = path[-1][1]
    words = {"np": d.phrase(x, *(b for _, b in path)), "np2": d.phrase(y, a)}
    return _calculated(d, [path, [(y, a)]], "+", words, 3)


def _found(d: Draft) -> tuple[Fact, str, Step] | None:
    """Something that is not named but described by a fact that it alone has: (fact, description, the
    search)."""
    name = d.thing(("person", "person", "company"))
    attribute = pick(d.u, d.world.links(name))
    value = d.fact(name, attribute)
    if d.world.holders(attribute, value) != [name]:
        return None
    step: Step = ("search", {"query": f"{attribute} {value}"})
    return (name, attribute), f"the {d.world.kind[name]} whose {attribute} is {value}", step


def found2(d: Draft) -> Question | None:
    """A search, then two look-ups."""
    found = _found(d)
    if found is None:
        return None
    (name, attribute), description, step = found
    path = d.chain(name, 2)
    if path is None or attribute in {a for _, a in path} or d.fact(name, attribute) in {d.fact(*f) for f in path}:
        return None
    words = {"np": f"the {path[1][1]} of the {path[0][1]} of {description}"}
    return Question(words, d.fact(*path[-1]), [step, *d.lookups(path)], 3, path, (name, attribute))


def found_sum(d: Draft) -> Question | None:
    """A number of somebody who must be found by search, plus the same of somebody named."""
    found = _found(d)
    if found is None or d.world.kind[found[0][0]] != "person":
        return None
    (name, attribute), description, step = found
    other = d.thing(("person",))
    if other == name or other == d.fact(name, attribute):
        return None
    a = pick(d.u, d.world.numeric(name))
    words = {"np": f"the {a} of {description}", "np2": f"the {a} of {other}"}
    question = _calculated(d, [[(name, a)], [(other, a)]], "+", words, 3)
    question.steps = [step, *question.steps]
    question.shown = (name, attribute)
    return question


def _staff(d: Draft) -> tuple[str, list[str]] | None:
    company = pick(d.u, d.world.things["company"])
    staff = d.fact(company, "staff").split(", ")
    return (company, staff) if len(staff) >= 2 else None


def count_staff(d: Draft) -> Question | None:
    """How many of a company's staff were born in a place."""
    found = _staff(d)
    if found is None:
        return None
    company, staff = found
    value = pick(d.u, d.world.things["place"])
    facts = [(company, "staff"), *((p, "birthplace") for p in staff)]
    count = sum(d.fact(p, "birthplace") == value for p in staff)
    return Question({"c": company, "v": value}, str(count), d.lookups(facts), 2, facts, None)


def total_staff(d: Draft) -> Question | None:
    """The sum of a number over a company's staff."""
    found = _staff(d)
    if found is None:
        return None
    company, staff = found
    a = pick(d.u, d.world.numeric(staff[0]))
    question = _calculated(d, [[(p, a)] for p in staff], "+", {"c": company, "a": a}, 3)
    question.needed = [(company, "staff"), *question.needed]
    question.steps = [lookup(company, "staff"), *question.steps]
    question.shown = None
    return question


FORMS: Mapping[str, Callable[[Draft], Question | None]] = {
    f.__name__: f
    for f in (
        one_hop,
        stated,
        small_sum,
        small_comparison,
        chain2,
        chain3,
        sum2,
        minus2,
        compare2,
        chain_sum,
        found2,
        found_sum,
        count_staff,
        total_staff,
    )
}


def compose(u: Uniform, world: World, form: str, config: Mapping[str, Any]) -> tuple[Question, str] | None:
    """(question, its text), or None where this world does not suit."""
    draft = Draft(u, world, u() < config["of_style"])
    question = FORMS[form](draft)
    if question is None:
        return None
    text = pick(u, config["wordings"][question.wording or form]).format(**question.words)
    return question, text[0].upper() + text[1:]
