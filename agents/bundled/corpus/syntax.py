"""JSON and tool-call syntax: objects written from sentences, calls written from signatures and values."""

from __future__ import annotations

import json

import numpy as np

from agents.bundled.corpus.marks import det
from agents.bundled.corpus.names import Names
from agents.bundled.corpus.toolkit import argument_word


def document(rng: np.random.Generator, held_out: bool = False) -> str:
    n = Names(rng, held_out)
    return n.pick((_objects, _calls, _calls, _calls))(n)


def _objects(n: Names) -> str:
    """`word value, word value` becomes a JSON object."""
    lines = ""
    for _ in range(n.integer(2, 7)):
        words = n.many(lambda: n.attribute()[0], n.integer(1, 4))
        row = {w: n.anything() for w in words}
        lines += ", ".join(f"{w} {v}" for w, v in row.items()) + "\n" + det(json.dumps(row) + "\n")
    return lines


def _calls(n: Names) -> str:
    """A signature, then several requests with values and the calls that follow from them."""
    tool, words = n.verb_name(), n.many(lambda: argument_word(n), n.integer(1, 4))
    shape = n.pick(
        (
            " ".join(["{}"] * len(words)),
            ", ".join(w + " {}" for w in words),
            " and ".join("the " + w + " {}" for w in words),
            " with ".join(["{}"] * len(words)),
        )
    )
    draws = [n.pick((n.name, n.name, n.person, n.place, n.number, n.word, n.anything)) for _ in words]
    lines = f"{tool}({', '.join(words)})\n"
    for _ in range(n.integer(2, 7)):
        values = [draw() for draw in draws]
        call = json.dumps({"name": tool, "arguments": dict(zip(words, values, strict=True))})
        lines += shape.format(*values) + "\n" + det(f"<tool_call>{call}</tool_call>\n")
    return lines
