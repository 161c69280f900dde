"""Key-value look-up: a table is shown once and asked many times, in other words and another order."""

from __future__ import annotations

import json

import numpy as np

from agents.bundled.corpus.marks import det
from agents.bundled.corpus.names import Names


def document(rng: np.random.Generator, held_out: bool = False) -> str:
    n = Names(rng, held_out)
    return n.pick((pairs, pairs, sentences, records, _rows, _json))(n)


def _keys(n: Names, k: int) -> list[str]:
    return n.many(n.pick((n.name, n.name, n.name, n.person, n.place, n.thing, n.code, n.word, n.whole)), k)


def _values(n: Names, k: int) -> list[str]:
    draw = n.pick((n.name, n.name, n.person, n.place, n.number, n.whole, n.date, n.word, n.code, n.anything))
    return [draw() for _ in range(k)]


def _questions(n: Names, keys: list[str], low: float = 0.8, high: float = 2.2) -> list[str]:
    return [n.pick(keys) for _ in range(n.integer(int(len(keys) * low) + 1, int(len(keys) * high) + 2))]


def pairs(n: Names) -> str:
    """key: value lines; the queries use the same or another shape (before key, between, after value)."""
    keys = _keys(n, n.integer(2, 14))
    table = dict(zip(keys, _values(n, len(keys)), strict=True))
    shapes = (
        ("", ": ", "\n"),
        ("", " = ", "\n"),
        ("", " -> ", "\n"),
        ("", ", ", "\n"),
        ('"', '": "', '"\n'),
        ("", " ", "\n"),
        ("(", ", ", ") "),
        ("", " is ", ". "),
        ("", "|", "\n"),
        ("- ", " => ", "\n"),
    )
    shown = n.pick(shapes)
    asked = shown if n.chance(0.5) else n.pick(shapes)
    head = "".join(shown[0] + k + shown[1] + v + shown[2] for k, v in table.items())
    tail = ""
    for key in _questions(n, keys):  # the first line sets how lines end
        value = det(table[key] + asked[2]) if tail else det(table[key]) + asked[2]
        tail += asked[0] + key + asked[1] + value
    return head + n.pick(("\n", "---\n", "?\n")) + tail


def sentences(n: Names) -> str:
    """One attribute, a sentence per entity; then short questions."""
    attribute, draw = n.attribute()
    facts = {key: draw() for key in n.many(n.pick((n.name, n.name, n.person, n.thing)), n.integer(2, 10))}
    say = n.pick(
        (
            "The {a} of {k} is {v}.",
            "{k}'s {a} is {v}.",
            "{k} has {v} as {a}.",
            "{v} is the {a} of {k}.",
            "For {k} the {a} is {v}.",
            "{k}: {a} {v}.",
        )
    )
    ask, reply = n.pick(
        (
            ("Q: {a} of {k}?\nA: ", "\n"),
            ("{k}'s {a}? ", "\n"),
            ("Find the {a} of {k}: ", ".\n"),
            ('{{"{a}": "{k}"}} "', '"\n'),
            ("So the {a} of {k} is ", ".\n"),
            ("Which {a} has {k}? <answer>", "</answer>\n"),
        )
    )
    sep = n.pick((" ", "\n"))
    head = sep.join(say.format(a=attribute, k=k, v=v) for k, v in facts.items())
    tail = ""
    for k in _questions(n, list(facts)):
        tail += ask.format(a=attribute, k=k) + (det(facts[k] + reply) if tail else det(facts[k]) + reply)
    return f"{head}\n{tail}"


def _world(n: Names, entities: int, attributes: int) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(attribute words, {entity: {attribute: value}})."""
    draws = dict(n.attribute() for _ in range(attributes * 2))
    words = list(draws)[:attributes]
    keys = n.many(n.pick((n.name, n.name, n.person, n.thing)), entities)
    return words, {k: {a: draws[a]() for a in words} for k in keys}


def records(n: Names) -> str:
    """Several attributes per entity; both the entity and the attribute must be matched."""
    words, world = _world(n, n.integer(2, 6), n.integer(2, 5))
    head = "".join(f"{k}: " + ", ".join(f"{a} {v}" for a, v in row.items()) + "\n" for k, row in world.items())
    shape = n.pick(("{k} {a}: ", "{a} of {k}: ", "{k}, {a}? ", 'get("{k}", "{a}") = ', "What {a} has {k}? "))
    tail = ""
    for _ in range(n.integer(4, 14)):
        key, word = n.pick(list(world)), n.pick(words)
        tail += shape.format(k=key, a=word) + det(world[key][word] + "\n")
    return head + "\n" + tail


def _rows(n: Names) -> str:
    """A comma-separated table with a header."""
    words, world = _world(n, n.integer(2, 6), n.integer(2, 4))
    sep = n.pick((",", ", ", " | ", "\t"))
    head = (
        sep.join(["name", *words])
        + "\n"
        + "".join(sep.join([k, *(v.replace(",", "") for v in row.values())]) + "\n" for k, row in world.items())
    )
    tail = ""
    for _ in range(n.integer(3, 10)):
        key, word = n.pick(list(world)), n.pick(words)
        tail += f"{word} {key}: " + det(world[key][word].replace(",", "") + "\n")
    return head + "\n" + tail


def _json(n: Names) -> str:
    """An object or a list of objects as JSON; then paths into it."""
    words, world = _world(n, n.integer(1, 5), n.integer(2, 4))
    if n.chance(0.5):
        text = json.dumps(world)
    else:
        text = json.dumps([{"name": k, **row} for k, row in world.items()])
    tail = ""
    for _ in range(n.integer(3, 10)):
        key, word = n.pick(list(world)), n.pick(words)
        tail += f'"{key}", "{word}": "' + det(world[key][word] + '"\n')
    return text + "\n" + tail
