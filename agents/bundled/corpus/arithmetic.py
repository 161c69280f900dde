"""Numbers: expressions copied out of sentences, comparisons, counts, small sums."""

from __future__ import annotations

from functools import partial

import numpy as np

from agents.bundled.corpus.marks import det
from agents.bundled.corpus.names import Names

WORDING = {
    "+": (
        "add {a} and {b}",
        "the sum of {a} and {b}",
        "{a} plus {b}",
        "{a} and {b} together",
        "total of {a} and {b}",
    ),
    "-": (
        "subtract {b} from {a}",
        "the difference of {a} and {b}",
        "{a} minus {b}",
        "{a} less {b}",
        "how much more is {a} than {b}",
        "take {b} away from {a}",
    ),
    "*": ("{a} times {b}", "multiply {a} by {b}", "the product of {a} and {b}"),
    "/": ("divide {a} by {b}", "{a} over {b}", "the ratio of {a} to {b}"),
}


def document(rng: np.random.Generator, held_out: bool = False) -> str:
    n = Names(rng, held_out)
    kinds = (expressions,) * 4 + (comparisons,) * 2 + (_largest, counts, sums)
    return n.pick(kinds)(n)


def wording(n: Names, op: str, a: str, b: str) -> str:
    return n.pick(WORDING[op]).format(a=a, b=b)


def expressions(n: Names) -> str:
    """Numbers are copied into an expression, in the order that the operation asks for."""
    arrow = n.pick((" = ", ": ", ' -> "', "\n", ' {"expression": "'))
    return "".join(
        f"{wording(n, op, a, b)}{arrow}{det(f'{a} {op} {b}')}\n"
        for a, b, op in ((n.number(), n.number(), n.pick("++---*/")) for _ in range(n.integer(4, 14)))
    )


def _near(n: Names) -> tuple[int, int]:
    """Two different numbers, often with as many digits."""
    size = n.pick((10, 100, 100, 1000, 1000, 10000, 100000))
    a, b = n.integer(size // 10, size), n.integer(size // 10, size)
    if n.chance(0.2):
        b = n.integer(1, 10000)
    return a, b if a != b else b + 1


def comparisons(n: Names) -> str:
    """Which of two is larger or smaller: said as a number, as a sign, or as the name that has it."""
    shape = n.pick(("number", "sign", "name"))
    lines = ""
    for _ in range(n.integer(4, 14)):
        a, b = _near(n)
        more = n.chance(0.5)
        first = (a > b) == more
        if shape == "sign":
            lines += f"{a} {det('>' if a > b else '<')} {b}\n"
        elif shape == "number":
            word = n.pick(("larger", "more")) if more else "smaller"
            lines += f"{word} of {a} and {b}: {det(str(a if first else b))}\n"
        else:
            x, y = n.many(n.name, 2)
            lines += f"{x} {a}, {y} {b}; {'most' if more else 'least'}: {det(x if first else y)}\n"
    return lines


def _largest(n: Names) -> str:
    """The largest or smallest of three to five."""
    lines = ""
    for _ in range(n.integer(2, 7)):
        size = n.pick((100, 1000))
        values = n.many(partial(n.integer, size // 10, size), n.integer(3, 6))
        word, choose = n.pick((("largest", max), ("smallest", min)))
        lines += f"{word} of {', '.join(map(str, values))}: {det(str(choose(values)))}\n"
    return lines


def counts(n: Names) -> str:
    """How many items a list has, and how many of one kind."""
    lines = ""
    for _ in range(n.integer(2, 8)):
        items = [n.name() for _ in range(n.integer(1, 9))]
        lines += f"{', '.join(items)}. {n.pick(('count', 'how many', 'number'))}: {det(str(len(items)))}\n"
    return lines


def sums(n: Names) -> str:
    """Sums and differences of one or two digits."""
    size = n.pick((10, 10, 20, 50, 100))
    lines = ""
    for _ in range(n.integer(4, 16)):
        a, b = n.integer(0, size), n.integer(0, size)
        lines += (
            f"{a} + {b} = {det(str(a + b))}\n"
            if n.chance(0.5)
            else f"{max(a, b)} - {min(a, b)} = {det(str(max(a, b) - min(a, b)))}\n"
        )
    return lines
