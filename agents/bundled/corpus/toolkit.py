"""Random tools: names, arguments and descriptions as they might stand in anybody's environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agents.bundled.corpus.marks import CLOSE, OPEN
from agents.bundled.corpus.names import Names

ARGUMENTS = {
    "key": (
        "key",
        "item",
        "subject",
        "record",
        "id",
        "who",
        "name",
        "entry",
        "target",
        "object",
        "topic",
        "person",
    ),
    "field": (
        "field",
        "property",
        "column",
        "relation",
        "what",
        "detail",
        "label",
        "kind",
        "fact",
        "attr",
        "part",
    ),
    "text": ("text", "terms", "keywords", "question", "phrase", "words", "q", "input", "query"),
    "formula": ("formula", "expr", "input", "sum", "math", "terms", "expression"),
    "other": (
        "limit",
        "unit",
        "city",
        "date",
        "to",
        "message",
        "amount",
        "title",
        "color",
        "user",
        "path",
        "page",
        "language",
        "start",
        "end",
        "note",
        "code",
        "size",
        "reason",
        "email",
        "status",
        "price",
        "number",
    ),
}
NAMES = {
    "search": (
        "search_notes",
        "find",
        "find_text",
        "grep",
        "search_pages",
        "browse",
        "ask_library",
        "scan",
        "search_archive",
        "discover",
        "find_documents",
    ),
    "formula": ("calc", "compute", "evaluate", "math", "solve", "arithmetic", "do_math", "calculate"),
    "list": (
        "list_members",
        "members",
        "list_items",
        "group",
        "contents",
        "list_all",
        "roster",
        "show_group",
    ),
    "action": (
        "send_message",
        "add_note",
        "book",
        "order",
        "set_alarm",
        "create_task",
        "move",
        "pay",
        "rename",
        "schedule",
        "translate",
        "convert",
        "post",
        "reserve",
        "assign",
        "register",
    ),
}
DESCRIPTIONS = {
    "field": (
        "one field of a record",
        "Returns a property of an entry.",
        "read a fact",
        "get one value",
        "Look a value up by key.",
        "the stored value",
        "facts about people and things",
    ),
    "search": (
        "full-text search",
        "Finds matching notes.",
        "search the documents",
        "returns the best passages",
        "text search, best first",
    ),
    "formula": (
        "evaluates arithmetic",
        "Calculates.",
        "works out a formula",
        "a pocket calculator",
        "exact arithmetic",
    ),
    "list": ("lists a group", "all names in a group", "Returns the members."),
    "action": ("does it and confirms", "Returns a receipt.", "", "performs the action"),
}


@dataclass(frozen=True)
class Tool:
    """A made-up tool of one of the kinds in `DESCRIPTIONS`."""

    kind: str
    """What it is good for: field, search, formula, list or action."""
    name: str
    """What a call names."""
    arguments: tuple[str, ...]
    """Argument names in the order of the schema."""
    description: str
    """One line, or nothing."""

    def schema(self) -> dict[str, Any]:
        """The OpenAI-style schema."""
        properties = {a: {"type": "string"} for a in self.arguments}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {"type": "object", "properties": properties, "required": list(self.arguments)},
            },
        }

    def call(self, *values: str) -> str:
        """The call in Hermes form; marks in the values stay marks."""
        return call_text(self.name, dict(zip(self.arguments, values, strict=True)))


def call_text(name: str, arguments: Mapping[str, str]) -> str:
    text = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return f"<tool_call>{text}</tool_call>".replace("\\u0002", OPEN).replace("\\u0003", CLOSE)


def argument_word(n: Names) -> str:
    """An argument name of any kind."""
    word = n.pick(ARGUMENTS[n.pick(tuple(ARGUMENTS))])
    return f"{word}_{n.pick(ARGUMENTS['other'])}" if n.chance(0.1) else word


def make_tool(n: Names, kind: str) -> Tool:
    """A tool of one of the kinds in `DESCRIPTIONS`."""
    arguments: tuple[str, ...]
    if kind == "field":
        words = (n.pick(ARGUMENTS["key"]), n.pick(ARGUMENTS["field"]))
        name = n.verb_name()
        arguments = words if n.chance(0.75) else words[::-1]
    elif kind == "search":
        name, arguments = n.pick(NAMES["search"]), (n.pick(ARGUMENTS["text"]),)
    elif kind == "formula":
        name, arguments = n.pick(NAMES["formula"]), (n.pick(ARGUMENTS["formula"]),)
    elif kind == "list":
        name, arguments = n.pick(NAMES["list"]), (n.pick(ARGUMENTS["key"]),)
    else:
        name, arguments = n.pick(NAMES["action"]), tuple(n.sample(ARGUMENTS["other"], n.integer(1, 4)))
    return Tool(kind, name, arguments, n.pick(DESCRIPTIONS[kind]))
