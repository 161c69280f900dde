"""Short ChatML dialogues in which an assistant calls tools and answers.

Tools, arguments, attributes, wording, result formats and the number of calls vary from dialogue to dialogue;
within one dialogue they stay the same, so that what follows is determined by what came before. What stays the
same everywhere: a call is Hermes JSON, an argument is copied from the user or from an earlier result, the
last turn holds `<answer>...</answer>`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.bundled.corpus import arithmetic
from agents.bundled.corpus.hops import phrase
from agents.bundled.corpus.names import NUMBER_ATTRIBUTES, WORDS, Names
from agents.bundled.corpus.talk import Style, Talk, opening
from agents.bundled.corpus.toolkit import ARGUMENTS, Tool, make_tool

WRAPS = (
    "Tell us {}.",
    "Fetch {}.",
    "I need {}.",
    "Give me {}, please.",
    "Do you know {}?",
    "Look up {}.",
    "{}?",
    "Could you find out {}?",
    "I wonder about {}.",
    "Please report {}.",
    "Can you check {} for me?",
    "Hello! I am looking for {}.",
    "I forgot {}.",
    "Say {}.",
    "We want to know {}.",
    "Return {}.",
)


def document(rng: np.random.Generator, held_out: bool = False) -> str:
    return make(Names(rng, held_out)).text()


def make(n: Names, whole_turns: bool = True, kinds: tuple[str, ...] = ()) -> Talk:
    """A dialogue of one to three questions of the given kinds (default: any), all under the same habits."""
    talk = Talk(n, whole_turns)
    kinds = kinds or tuple(n.sample(KIND_WEIGHTS, n.pick((1, 1, 1, 2))))
    questions = [QUESTIONS[kind] for kind in kinds]
    needed = {t for q in questions for t in q.tools}
    extra = [k for k in ("field", "search", "formula", "list", "action", "action") if k not in needed]
    more = n.sample(extra, n.pick((0, 0, 0, 1, 1, 2)))
    talk.tools = [make_tool(n, kind) for kind in n.sample([*sorted(needed), *more], len(needed) + len(more))]
    opening(talk)
    style = Style.draw(n)
    for question in questions:
        question.play(talk, style)
    return talk


def _tool(talk: Talk, kind: str) -> Tool:
    return next(t for t in talk.tools if t.kind == kind)


def _ask(talk: Talk, subject: str) -> None:
    text = talk.n.pick(WRAPS).format(subject)
    talk.add("user", text[0].upper() + text[1:])


def _path(n: Names, length: int, last: str = "any") -> list[tuple[str, str]]:
    """[(attribute, value)] of a chain; the last value may have to be a number."""
    used = n.many(n.relation, length)
    steps = [(word, n.pick((n.person, n.person, n.place, n.thing))()) for word in used[:-1]]
    if last == "number":
        word, value = n.pick(NUMBER_ATTRIBUTES), n.number()
    else:
        word, draw = n.attribute()
        value = draw()
    return [*steps, (used[-1] if word in used[:-1] else word, value)]


def _phrase(style: Style, start: str, path: list[tuple[str, str]]) -> str:
    return phrase(style.of, start, [attribute for attribute, _ in path])


def _field_call(talk: Talk, entity: str, attribute: str) -> str:
    tool = _tool(talk, "field")
    order = (entity, attribute) if tool.arguments[0] in ARGUMENTS["key"] else (attribute, entity)
    return tool.call(*(talk.value(v) for v in order))


def _follow(talk: Talk, style: Style, start: str, path: list[tuple[str, str]], kind: str = "field") -> str:
    """Plays the calls of a chain; the last value."""
    entity = start
    for attribute, value in path:
        if kind == "field":
            talk.act(f"I need the {attribute} of {entity}.", _field_call(talk, entity, attribute))
            talk.add("tool", style.reply(entity, attribute, value))
        else:
            query = talk.value(f"{entity} {attribute}")
            talk.act(f"I need the {attribute} of {entity}.", _tool(talk, "search").call(query))
            talk.add("tool", _documents(talk.n, style, entity, attribute, value))
        entity = value
    return entity


def _documents(n: Names, style: Style, entity: str, attribute: str, value: str) -> str:
    """Search results: the fact among facts on the same entity or the same attribute."""
    facts = [(entity, attribute, value)]
    for _ in range(n.integer(0, 4)):
        word, draw = n.attribute()
        if word != attribute:
            facts.append((entity if n.chance(0.4) else n.name(), word, draw()))
    if n.chance(0.5):
        facts.append((n.name(), attribute, _alike(n, value)))
    say = n.pick(
        (
            lambda x, a, v: f"The {a} of {x} is {v}.",
            lambda x, a, v: f"{x}'s {a}: {v}",
            lambda x, a, v: f"{x} - {a}: {v}",
            lambda x, a, v: f"{x} has {v} as {a}.",
        )
    )
    return n.pick(("\n", " ", "\n- ")).join(say(*fact) for fact in n.sample(facts, len(facts)))


def _alike(n: Names, value: str) -> str:
    """Another value of the same look."""
    if value[:1].isdigit():
        return n.number()
    return n.name() if value[:1].isupper() else n.pick(WORDS)


def _chain(talk: Talk, style: Style) -> None:
    path = _path(talk.n, talk.n.pick((1, 1, 2, 2, 2, 3, 3, 4)))
    start = talk.n.pick((talk.n.name, talk.n.person, talk.n.thing))()
    subject = _phrase(style, start, path)
    _ask(talk, subject)
    talk.answer(subject, _follow(talk, style, start, path))


def _search(talk: Talk, style: Style) -> None:
    path = _path(talk.n, talk.n.pick((1, 1, 2, 2)))
    start = talk.n.pick((talk.n.name, talk.n.person, talk.n.thing))()
    subject = _phrase(style, start, path)
    _ask(talk, subject)
    talk.answer(subject, _follow(talk, style, start, path, "search"))


def _gather(talk: Talk, style: Style, starts: list[str], paths: list[list[tuple[str, str]]]) -> list[str]:
    """The ends of several chains: one after the other, or (single steps, if so told) in one turn."""
    if not talk.parallel or any(len(p) > 1 for p in paths):
        return [_follow(talk, style, s, p) for s, p in zip(starts, paths, strict=True)]
    steps = [(s, *p[0]) for s, p in zip(starts, paths, strict=True)]
    talk.act("I need both.", "".join(_field_call(talk, s, a) for s, a, _ in steps))
    for entity, attribute, value in steps:
        talk.add("tool", style.reply(entity, attribute, value))
    return [value for _, _, value in steps]


def _calculation(talk: Talk, style: Style) -> None:
    """Two numbers are looked up, an expression is made of them, its result is the answer."""
    n = talk.n
    starts = n.many(n.name, 2)
    paths = [_path(n, n.pick((1, 1, 2)), "number") for _ in starts]
    if n.chance(0.6):
        paths[1] = [*_path(n, len(paths[1]), "number")[:-1], (paths[0][-1][0], n.number())]
    op = n.pick("++---*/")
    subject = arithmetic.wording(n, op, *(_phrase(style, s, p) for s, p in zip(starts, paths, strict=True)))
    _ask(talk, subject)
    a, b = (v.replace(",", "") for v in _gather(talk, style, starts, paths))
    talk.act(f"I need {a} {op} {b}.", _tool(talk, "formula").call(talk.value(f"{a} {op} {b}")))
    result = _result(float(a), op, float(b))
    talk.add("tool", n.pick((result, result, f"= {result}", json.dumps({"result": result}))))
    talk.answer(subject, result)


def _result(a: float, op: str, b: float) -> str:
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else 0.0}[op]
    return f"{round(value, 2):.12g}"


def _formula(talk: Talk, style: Style) -> None:
    """The numbers stand in the user's sentence."""
    n = talk.n
    a, b, op = n.number().replace(",", ""), n.number().replace(",", ""), n.pick("++---*/")
    subject = arithmetic.wording(n, op, a, b)
    _ask(talk, subject)
    talk.act(f"I need {a} {op} {b}.", _tool(talk, "formula").call(talk.value(f"{a} {op} {b}")))
    result = _result(float(a), op, float(b))
    talk.add("tool", result)
    talk.answer(subject, result)


def _comparison(talk: Talk, style: Style) -> None:
    """Who of two has more or less of something."""
    n = talk.n
    starts, word = n.many(n.name, 2), n.pick(NUMBER_ATTRIBUTES)
    values = [str(v) for v in n.many(lambda: n.integer(*n.pick(((10, 100), (100, 1000)))), 2)]
    more = n.chance(0.5)
    x, y = starts
    subject = n.pick(
        (
            f"the one with the {'higher' if more else 'lower'} {word}, {x} or {y}",
            f"who has {'more' if more else 'less'} {word}: {x} or {y}",
            f"which {word} is {'larger' if more else 'smaller'}, that of {x} or of {y}",
        )
    )
    _ask(talk, subject)
    a, b = _gather(talk, style, starts, [[(word, v)] for v in values])
    talk.answer(subject, x if (int(a) > int(b)) == more else y)


def _context(talk: Talk, style: Style) -> None:
    """The fact stands in the conversation: no call."""
    n = talk.n
    facts = {n.attribute()[0]: n.anything() for _ in range(n.integer(1, 4))}
    start, word = n.name(), n.pick(list(facts))
    known = " ".join(f"{start}'s {a} is {v}." for a, v in facts.items())
    ask = n.pick(("What was", "Now say", "Repeat", "So what is"))
    talk.add("user", f"{known} {ask} {phrase(style.of, start, [word])}?")
    talk.answer(phrase(style.of, start, [word]), facts[word])


def _action(talk: Talk, style: Style) -> None:
    """A call whose arguments are named in the request; the receipt is the answer."""
    n, tool = talk.n, _tool(talk, "action")
    values = [n.anything() for _ in tool.arguments]
    verb = tool.name.replace("_", " ")
    shape = n.pick(
        (
            lambda a, v: f"{a} {v}",
            lambda a, v: f"{a}: {v}",
            lambda a, v: f"the {a} {v}",
            lambda a, v: f"{a} = {v}",
        )
    )
    parts = [shape(a.replace("_", " "), v) for a, v in zip(tool.arguments, values, strict=True)]
    talk.add(
        "user",
        f"{n.pick(('Please', 'Now', 'Could you'))} {verb} with {', '.join(n.sample(parts, len(parts)))}.",
    )
    talk.act(f"I {verb}.", tool.call(*map(talk.value, values)))
    receipt = n.pick((n.code, n.whole, lambda: "done"))()
    talk.add("tool", n.pick((receipt, f"receipt {receipt}", f"ok {receipt}")))
    talk.answer(verb, receipt)


def _members(talk: Talk, style: Style) -> None:
    """A group is listed; how many, or the first or last of them."""
    n = talk.n
    group, names = n.thing(), n.many(n.name, n.integer(1, 8))
    what, value = n.pick(
        (
            ("how many members has", str(len(names))),
            ("the first member of", names[0]),
            ("the last member of", names[-1]),
        )
    )
    talk.add("user", f"{n.pick(('Tell me', 'I ask', 'Say'))} {what} {group}.")
    talk.act(f"I need the members of {group}.", _tool(talk, "list").call(talk.value(group)))
    talk.add("tool", n.pick((", ", "\n")).join(names))
    talk.answer(f"{what} {group}", value)


def _missing(talk: Talk, style: Style) -> None:
    """The record does not exist: say so."""
    n = talk.n
    start, (word, _) = n.name(), n.attribute()
    _ask(talk, phrase(style.of, start, [word]))
    talk.act(f"I need the {word} of {start}.", _field_call(talk, start, word))
    talk.add("tool", n.pick(("error: not found", f"error: no {word}", f"error: unknown {start}")))
    talk.answer(phrase(style.of, start, [word]), "unknown")


@dataclass(frozen=True)
class Question:
    """One kind of question: how it is played and which kinds of tools it takes."""

    play: Callable[[Talk, Style], Any]
    tools: tuple[str, ...]


QUESTIONS = {
    "chain": Question(_chain, ("field",)),
    "search": Question(_search, ("search",)),
    "calculation": Question(_calculation, ("field", "formula")),
    "formula": Question(_formula, ("formula",)),
    "comparison": Question(_comparison, ("field",)),
    "context": Question(_context, ()),
    "action": Question(_action, ("action",)),
    "members": Question(_members, ("list",)),
    "missing": Question(_missing, ("field",)),
}
KIND_WEIGHTS = (
    ("chain",) * 7
    + ("search",) * 4
    + ("calculation",) * 4
    + ("formula",)
    + ("comparison",) * 2
    + ("context",)
    + ("action",) * 2
    + ("members", "missing")
)
