"""Tools from functions: names, descriptions, JSON Schema from type hints."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from tools import Tool


def book(city: str, nights: int, budget: float = 1.5, cash: bool = False, extras: list[str] | None = None,
         unit: Literal["day", "week"] = "day", notes: dict[str, int] | None = None) -> str:  # fmt: skip
    """Books a room
    in a hotel.

    More that the agent need not read.

    Args:
        city: where to,
            in any country.
        nights (int): how many.

    Returns:
        a receipt: not an argument.
    """
    return city


def test_schema_from_hints_and_docstring():
    tool = Tool.from_function(book)
    assert tool.name == "book" and tool.description == "Books a room in a hotel."
    properties = tool.parameters["properties"]
    assert properties["city"] == {"type": "string", "description": "where to, in any country."}
    assert properties["nights"] == {"type": "integer", "description": "how many."}
    assert properties["budget"] == {"type": "number"} and properties["cash"] == {"type": "boolean"}
    assert properties["extras"] == {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
    assert properties["unit"] == {"enum": ["day", "week"]}
    assert properties["notes"]["anyOf"][0] == {"type": "object", "additionalProperties": {"type": "integer"}}
    assert tool.parameters["required"] == ["city", "nights"]
    assert tool.parameters["additionalProperties"] is False
    assert "a receipt" not in str(tool.parameters)


def test_openai_export():
    exported = Tool.from_function(book).openai()
    assert exported["type"] == "function"
    assert set(exported["function"]) == {"name", "description", "parameters"}


def untyped(x):
    """no hint"""


def exotic(x: bytes):
    """no JSON type"""


def variadic(*x: int):
    """not by name"""


@pytest.mark.parametrize("fn, said", [(untyped, "needs a type hint"), (exotic, "no JSON Schema"),
                                      (variadic, "cannot be given by name")])  # fmt: skip
def test_what_cannot_be_a_tool_says_why(fn, said):
    with pytest.raises(TypeError, match=said):
        Tool.from_function(fn)


@pytest.mark.parametrize("wrong", [{"name": "two words"}, {"name": ""}, {"parameters": {"type": "string"}},
                                   {"timeout_s": 0.0}])  # fmt: skip
def test_definitions_are_checked(wrong):
    right: dict[str, Any] = {"name": "t", "description": "", "parameters": {"type": "object"}, "fn": print}
    Tool(**right)
    with pytest.raises(ValueError, match=r"tool"):
        Tool(**{**right, **wrong})
