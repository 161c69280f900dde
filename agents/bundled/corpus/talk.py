"""A dialogue under construction: what was said, which tools are on offer, and the habits it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from agents.bundled.chat import STOP, render
from agents.bundled.corpus.hops import OF
from agents.bundled.corpus.marks import CLOSE, det
from agents.bundled.corpus.names import Names
from agents.bundled.corpus.toolkit import Tool

SYSTEMS = (
    "You are a helpful assistant.",
    "Use the tools.",
    "Answer with the tools you have.",
    "Be brief.",
    "You may call tools. Put the result in <answer> tags.",
    "Help the user.",
    "Do not guess; call a tool.",
    "You work for {}.",
    "Today is {}. Call tools when you need them.",
    "Finish with <answer>...</answer>.",
    "Call a tool as <tool_call>JSON</tool_call>, then reply as <answer>result</answer>.",
)
PARALLEL = "Call several tools at once where you can."
THINK = "Think before every step."


@dataclass
class Talk:
    """A dialogue under construction, with the habits that it keeps to its end."""

    n: Names
    """Source of every choice."""
    whole_turns: bool = True
    """Mark whole assistant turns; otherwise only copied argument values and answers."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """The conversation so far; contents may carry marks."""
    tools: list[Tool] = field(default_factory=list)
    """What the system message offers."""
    parallel: bool = False
    """Independent calls stand in one turn."""
    think: bool = False
    """Every assistant turn begins with a thought."""
    chatty: bool = False
    """The last turn repeats the question before the answer."""

    def value(self, text: str) -> str:
        """A copied value inside an assistant turn."""
        return text if self.whole_turns else det(text)

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def act(self, thought: str, text: str) -> None:
        """An assistant turn."""
        text = f"<think>{thought}</think>{text}" if self.think else text
        self.add("assistant", det(text) if self.whole_turns else text)

    def answer(self, subject: str, value: str) -> None:
        lead = f"{subject}: " if self.chatty else ""
        self.act("I have it.", f"{lead}<answer>{self.value(value)}</answer>")

    def text(self) -> str:
        """The rendered document; a marked turn includes its stop token."""
        text = render(self.messages, [tool.schema() for tool in self.tools])
        return text.replace(CLOSE + STOP, STOP + CLOSE) if self.whole_turns else text


def opening(talk: Talk) -> None:
    """Draws the habits and writes the system message that tells of them."""
    n = talk.n
    talk.parallel, talk.think, talk.chatty = n.chance(0.15), n.chance(0.06), n.chance(0.08)
    lines = [n.pick(SYSTEMS).format(n.pick((n.date, n.name))())] if n.chance(0.75) else []
    lines += [PARALLEL] if talk.parallel else []
    lines += [THINK] if talk.think else []
    if lines:
        talk.add("system", " ".join(lines))


@dataclass(frozen=True)
class Style:
    """How a dialogue phrases things and how its tools reply."""

    of: str
    """Noun phrase of an attribute {a} of an owner {x}."""
    reply: Callable[[str, str, str], str]
    """(entity, attribute, value) → tool message."""

    @classmethod
    def draw(cls, n: Names) -> Style:
        of = n.pick(OF)
        reply = n.pick(
            (
                lambda x, a, v: v,
                lambda x, a, v: v,
                lambda x, a, v: v,
                lambda x, a, v: f"{a}: {v}",
                lambda x, a, v: f"{x}: {a} = {v}",
                lambda x, a, v: f"The {a} of {x} is {v}.",
                lambda x, a, v: json.dumps({"value": v}),
                lambda x, a, v: json.dumps({"name": x, a: v}),
                lambda x, a, v: f"{x}'s {a} is {v}.",
                lambda x, a, v: f"ok: {v}",
            )
        )
        return cls(of, reply)
