"""Copying: lists, random strings and sentences that come again."""

from __future__ import annotations

import numpy as np

from agents.bundled.corpus.marks import det
from agents.bundled.corpus.names import Names

SEPARATORS = (", ", "; ", " | ", "\n", " / ", " ", " - ", " and ", '", "')
SAY = ("say", "repeat", "copy", "write", "echo", "again", "same", "text", "print", "note", "spell")
ARROWS = (": ", " -> ", " = ", " => ", ' "', "\n", " | ", ", ", ". ")
SYMBOLS = tuple(".,;:!?-_/()[]{}\"'=+*<>%$#@&")


def document(rng: np.random.Generator, held_out: bool = False) -> str:
    n = Names(rng, held_out)
    kind = n.pick((repeated_list, repeated_list, echo, echo, _random_string, _sentences))
    return kind(n)


def _draws(n: Names):
    """One kind of item for the whole document, or a mixture."""
    return n.pick(
        (
            n.name,
            n.name,
            n.name,
            n.person,
            n.place,
            n.thing,
            n.whole,
            n.number,
            n.date,
            n.code,
            n.anything,
            n.anything,
        )
    )


def repeated_list(n: Names) -> str:
    draw, sep = _draws(n), n.pick(SEPARATORS)
    items = n.many(draw, n.integer(2, 14))
    line = sep.join(items)
    end = n.pick(("\n", "\n\n", "\n---\n", ".\n"))
    return line + end + "".join(det(line + end) for _ in range(n.integer(1, 4)))


def echo(n: Names) -> str:
    """Each item is said once and repeated at once, several per document."""
    say, arrow, end = n.pick(SAY), n.pick(ARROWS), n.pick(("\n", "; ", '"\n', " | "))
    lines: list[str] = []
    for _ in range(n.integer(3, 16)):
        draw = _draws(n)
        item = " ".join(draw() for _ in range(n.integer(1, 4))) if n.chance(0.3) else draw()
        # The first line sets how lines end; from the second on the end is determined as well.
        lines.append(f"{say} {item}{arrow}" + (det(item + end) if lines else det(item) + end))
    return "".join(lines)


def _random_string(n: Names) -> str:
    """A string without meaning, two to four times over."""
    pieces = []
    for _ in range(n.integer(4, 40)):
        roll = n.rng.random()
        pieces.append(
            n.name()
            if roll < 0.3
            else n.word()
            if roll < 0.5
            else n.digits(n.integer(1, 5))
            if roll < 0.75
            else n.pick(SYMBOLS)
        )
        pieces.append(" " if n.chance(0.4) else "")
    text = "".join(pieces).strip()
    return text + "\n" + "".join(det(text + "\n") for _ in range(n.integer(1, 4)))


def _sentences(n: Names) -> str:
    """Sentences, each quoted again later, in another order."""
    sentences = []
    for _ in range(n.integer(2, 6)):
        attribute, draw = n.attribute()
        sentences.append(
            n.pick(
                (
                    f"The {attribute} of {n.person()} is {draw()}.",
                    f"{n.person()} met {n.person()} in {n.place()}.",
                    f"{n.person()} sent {n.whole()} {n.word()} to {n.place()}.",
                    f"On {n.date()}, {n.person()} left {n.place()} for {n.place()}.",
                    f"{n.thing()} was sold for {n.number()} by {n.person()}.",
                )
            )
        )
    head = "".join(f"{i + 1}. {s}\n" for i, s in enumerate(sentences))
    tail = "".join(f'Line {i + 1}: "{det(sentences[i] + chr(34))}\n' for i in n.rng.permutation(len(sentences)))
    return head + tail
