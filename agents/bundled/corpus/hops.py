"""Nested noun phrases taken apart: "the city of the mentor of Zanvel" is Zanvel, then mentor, then city."""

from __future__ import annotations

import numpy as np

from agents.bundled.corpus.marks import det
from agents.bundled.corpus.names import Names

OF = (
    "the {a} of {x}",
    "the {a} of {x}",
    "{x}'s {a}",
    "{x}'s {a}",
    "the {a} that belongs to {x}",
    "the {a} listed for {x}",
)
STEPS = ("{x}, {a}", '{{"key": "{x}", "field": "{a}"}}', "{a} of {x}", 'get("{x}", "{a}")', "{x} {a}")


def document(rng: np.random.Generator, held_out: bool = False) -> str:
    n = Names(rng, held_out)
    return n.pick((orders, steps))(n)


def phrase(of: str, start: str, attributes: list[str]) -> str:
    """The noun phrase that follows `attributes` from `start`, outermost last."""
    text = start
    for attribute in attributes:
        text = of.format(a=attribute, x=text)
    return text


def _draw(n: Names) -> tuple[str, list[str]]:
    start = n.pick((n.name, n.name, n.person, n.thing))()
    return start, n.many(n.relation, n.pick((1, 2, 2, 2, 3, 3, 4)))


def orders(n: Names) -> str:
    """Phrases and the order in which they are looked up, several per document."""
    arrow, sep = n.pick((": ", " -> ", "\n", " = ")), n.pick((", ", " > ", '", "', ": "))
    lines = ""
    for _ in range(n.integer(4, 11)):
        start, attributes = _draw(n)
        lines += phrase(n.pick(OF), start, attributes) + arrow + det(sep.join([start, *attributes])) + "\n"
    return lines


def steps(n: Names) -> str:
    """The same with results: each step starts from what the last one gave."""
    shape = n.pick(STEPS)
    lines = ""
    for _ in range(n.integer(2, 6)):
        start, attributes = _draw(n)
        lines += phrase(n.pick(OF), start, attributes) + "\n"
        for attribute in attributes:
            lines += "- " + det(shape.format(x=start, a=attribute)) + " = "
            start = n.anything()
            lines += start + "\n"
        lines += "! " + det(start + "\n")
    return lines
