"""Chained look-up: the value of one fact is the key of the next."""

from __future__ import annotations

import numpy as np

from agents.bundled.corpus.marks import det
from agents.bundled.corpus.names import PERSON_ATTRIBUTES, Names


def document(rng: np.random.Generator, held_out: bool = False) -> str:
    n = Names(rng, held_out)
    return two_relations(n, n.chance(0.7)) if n.chance(0.6) else _one_relation(n)


def two_relations(n: Names, show_step: bool) -> str:
    """People have a relation to people, and these an attribute; asked with and without the step between."""
    relation = n.pick(PERSON_ATTRIBUTES)
    attribute, draw = n.attribute()
    while attribute == relation:
        attribute, draw = n.attribute()
    first = n.many(n.name, n.integer(2, 6))
    second = n.many(n.name, n.integer(2, 6))
    link = {a: n.pick(second) for a in first}
    value = {b: draw() for b in second}
    say = n.pick(("The {r} of {k} is {v}.", "{k}'s {r} is {v}.", "{k} {r}: {v}."))
    facts = [say.format(r=relation, k=k, v=v) for k, v in link.items()]
    facts += [say.format(r=attribute, k=k, v=v) for k, v in value.items()]
    ask = n.pick(("{a} of the {r} of {k}? ", "{k}'s {r}'s {a}: ", "Find the {a} of {k}'s {r}: "))
    tail = ""
    for _ in range(n.integer(3, 9)):
        key = n.pick(first)
        step = f"{link[key]}, " if show_step else ""
        tail += ask.format(a=attribute, r=relation, k=key) + det(f"{step}{value[link[key]]}\n")
    return "\n".join(n.sample(facts, len(facts))) + "\n\n" + tail


def _one_relation(n: Names) -> str:
    """One relation, followed two or three times."""
    items = n.many(n.pick((n.name, n.name, n.code, n.word)), n.integer(4, 9))
    following = dict(zip(items, items[1:] + items[:1], strict=True))
    arrow = n.pick((" -> ", " > ", " to ", ": "))
    tail = ""
    for _ in range(n.integer(2, 6)):
        key = n.pick(items)
        path: list[str] = []
        while len(path) < 3 and (len(path) < 2 or n.chance(0.5)):
            path.append(following[path[-1] if path else key])
        tail += f"{len(path)} steps: {key}" + arrow + det(arrow.join(path)) + "\n"
    return "\n".join(f"{k}{arrow}{following[k]}" for k in n.sample(items, len(items))) + "\n" + tail
