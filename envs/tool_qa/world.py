"""A small world of people, places and companies: facts, documents, and the tools that read them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from envs.tool_qa.names import DATA, Uniform, names, pick, sample
from tools import Tool, ToolError
from tools.calculator import calculator
from tools.search import Search

ATTRIBUTES: Mapping[str, Mapping[str, Mapping]] = DATA["attributes"]
KINDS = tuple(ATTRIBUTES)
_MONTHS = DATA["days"]["months"]
_LINK = {kind: tuple(a for a, s in table.items() if s["value"] in KINDS) for kind, table in ATTRIBUTES.items()}
_NUMERIC = {kind: tuple(a for a, s in table.items() if s["value"] == "number") for kind, table in ATTRIBUTES.items()}


@dataclass(frozen=True)
class World:
    """Things and what is known of them."""

    things: Mapping[str, tuple[str, ...]]
    """Kind -> names."""
    facts: Mapping[str, Mapping[str, str]]
    """Name -> attribute -> value."""
    kind: Mapping[str, str]
    """Name -> kind."""

    def links(self, name: str) -> tuple[str, ...]:
        """Attributes of a thing whose values are things."""
        return _LINK[self.kind[name]]

    def numeric(self, name: str) -> tuple[str, ...]:
        """Attributes of a thing whose values are numbers."""
        return _NUMERIC[self.kind[name]]

    def holders(self, attribute: str, value: str) -> list[str]:
        """The things of which `attribute` is `value`."""
        return [name for name, table in self.facts.items() if table.get(attribute) == value]


def build(u: Uniform, split: str, counts: Mapping[str, int]) -> World:
    """A random world with names of a split."""
    words = names(u, split, sum(counts.values()))
    things: dict[str, tuple[str, ...]] = {}
    for kind in KINDS:
        things[kind], words = tuple(words[: counts[kind]]), words[counts[kind] :]
    companies = things["company"]
    # Staff as even as can be, so that every company has some; the first has most.
    employer = {p: companies[i % len(companies)] for i, p in enumerate(things["person"])}
    facts: dict[str, dict[str, str]] = {}
    for kind in KINDS:
        for name in things[kind]:
            facts[name] = _facts_of(u, name, kind, things, employer)
    return World(things, facts, {n: kind for kind in KINDS for n in things[kind]})


def _facts_of(
    u: Uniform, name: str, kind: str, things: Mapping[str, tuple[str, ...]], employer: Mapping[str, str]
) -> dict[str, str]:
    table: dict[str, str] = {}
    for attribute, schema in ATTRIBUTES[kind].items():
        value = schema["value"]
        if value == "number":
            low, high = schema["low"], schema["high"]
            table[attribute] = str(low + int(u() * (high - low + 1)))
        elif value == "day":
            table[attribute] = f"{1 + int(u() * 28)} {pick(u, _MONTHS)}"
        elif value == "staff":
            table[attribute] = ", ".join(p for p in things["person"] if employer[p] == name)
        elif attribute == "company":
            table[attribute] = employer[name]
        else:  # no one is their own mentor, and a mentor is no rival
            taken = {name, *table.values()}
            table[attribute] = pick(u, [n for n in things[value] if n not in taken])
    return table


def documents(u: Uniform, world: World, hidden: frozenset[tuple[str, str]], shown: tuple[str, str] | None) -> list[str]:
    """One line per thing with two or three of its facts: never a hidden one, always the shown one."""
    lines = []
    low, high = DATA["search"]["facts"]
    for name, table in world.facts.items():
        free = [a for a in table if (name, a) not in hidden and a != "staff"]
        size = min(low + int(u() * (high - low + 1)), len(free))
        chosen = sample(u, free, size)
        if shown is not None and shown[0] == name and shown[1] not in chosen:
            chosen = [shown[1], *chosen[1:]]
        if chosen:
            lines.append(f"{name}: " + ", ".join(f"{a} {table[a]}" for a in chosen))
    return sample(u, lines, len(lines))


@dataclass
class Library:
    """What the tools of one episode read."""

    facts: Mapping[str, Mapping[str, str]]
    """Name -> attribute -> value."""
    index: Search
    """The documents; indexed at the first query."""

    def lookup(self, entity: str, attribute: str) -> str:
        """read a fact

        Args:
            entity: a person, place or company.
            attribute: such as mentor, birthplace, age, leader, population, owner, city, budget.
        """
        table = self.facts.get(entity)
        if table is None:
            raise ToolError(_nearest("entity", entity, self.facts, say_all=False))
        value = table.get(attribute)
        if value is None:
            raise ToolError(_nearest("attribute", attribute, table, say_all=True))
        return value

    def search(self, query: str) -> str:
        """search the documents

        Args:
            query: words to look for.
        """
        return "\n".join(self.index(query)) or "nothing found"


LOOKUP, SEARCH, CALCULATOR = (Tool.from_function(f) for f in (Library.lookup, Library.search, calculator))


def _nearest(what: str, name: str, known: Mapping[str, object], say_all: bool) -> str:
    near = difflib.get_close_matches(name[:40], known, n=1, cutoff=0.6)
    hint = f"; try {near[0]}" if near else f"; try {', '.join(known)}" if say_all else ""
    return f"no {what} {name[:40]!r}{hint}"
