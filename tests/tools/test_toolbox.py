"""The toolbox turns every failure into text: unknown tools, wrong arguments, time-outs, floods, broken tools."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools import slow_tools
from tools import HERMES, BadCall, Tool, Toolbox, ToolCall, ToolError
from tools.toolbox import CUT

ADD = Tool.from_function(slow_tools.add)


def echo(text: str) -> str:
    """says it again"""
    return text


def broken(kind: str) -> str:
    """fails"""
    return slow_tools.explode(kind)


ECHO, BROKEN = Tool.from_function(echo), Tool.from_function(broken)


def test_a_call_gives_its_result():
    result = Toolbox([ADD]).call(ToolCall("add", {"a": 2, "b": 3}))
    assert (result.text, result.error, result.truncated) == ("5", None, False)


@pytest.mark.parametrize(
    "call, kind, said",
    [
        (ToolCall("ad", {}), "unknown_tool", "did you mean add?"),
        (ToolCall("qqqq", {}), "unknown_tool", "tools: add"),
        (ToolCall("add", {"a": 1}), "schema", "'b' is a required property"),
        (ToolCall("add", {"a": 1, "b": "x"}), "schema", "b: 'x' is not of type 'integer'"),
        (ToolCall("add", {"a": 1, "b": 2, "c": 3}), "schema", "'c' was unexpected"),
        (BadCall("no_name", "a call needs a name"), "invalid_json", "needs a name"),
        (BadCall("too_many_calls", "more than 32"), "too_many_calls", "more than 32"),
    ],
)
def test_failures_are_texts(call, kind, said):
    result = Toolbox([ADD]).call(call)
    assert result.error == kind and result.text.startswith("error: ") and said in result.text


@pytest.mark.parametrize("kind, error", [("value", "exception"), ("tool", "tool_error"), ("exit", "exception"),
                                         ("memory", "exception")])  # fmt: skip
def test_a_tool_that_raises(kind, error):
    result = Toolbox([BROKEN]).call(ToolCall("broken", {"kind": kind}))
    assert result.error == error and "boom" in result.text


def test_calls_are_counted_and_bounded():
    box = Toolbox([ADD], max_calls=2)
    call = ToolCall("add", {"a": 1, "b": 1})
    assert [box.call(call).error for _ in range(4)] == [None, None, "too_many_calls", "too_many_calls"]
    assert box.calls == 2
    box = Toolbox([ADD], max_calls=2)
    box.call(BadCall("no_name", ""))
    assert box.calls == 0   # what could not be read was not run


def test_output_is_cut():
    result = Toolbox([ECHO], max_output_chars=100).call(ToolCall("echo", {"text": "x" * 1000}))
    assert result.truncated and len(result.text) == 100 and result.text.endswith(CUT)


@given(st.text(max_size=300), st.integers(10, 100))
def test_results_are_encodable_and_bounded(text, limit):
    box = Toolbox([ECHO], max_output_chars=limit)
    for call in (ToolCall("echo", {"text": text}), ToolCall(text or "x", {}), ToolCall("echo", {"wrong": text})):
        result = box.call(call)
        assert len(result.text) <= limit
        result.text.encode()


def test_results_that_are_no_text_become_json():
    def listing(n: int) -> list[int]:
        """a list"""
        return list(range(n))

    assert Toolbox([Tool.from_function(listing)]).call(ToolCall("listing", {"n": 3})).text == "[0, 1, 2]"


def test_two_tools_of_one_name():
    with pytest.raises(ValueError, match="two tools are named 'add'"):
        Toolbox([ADD, ADD])


def test_a_toolbox_can_be_copied_and_pickled_mid_episode():
    box = Toolbox([ADD], max_calls=3)
    call = ToolCall("add", {"a": 1, "b": 1})
    box.call(call)
    for twin in (copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
        assert twin.calls == 1
        assert [twin.call(call).error for _ in range(3)] == [None, None, "too_many_calls"]
    assert box.calls == 1


def test_arguments_that_are_nested_as_deep_as_the_parser_allows():
    def take(x: list) -> str:
        """takes"""
        return "ok"

    text = '<tool_call>{"name": "take", "arguments": {"x": ' + "[" * 25 + "]" * 25 + "}}</tool_call>"
    (call,) = HERMES.parse(text).calls
    assert Toolbox([Tool.from_function(take)]).call(call).text == "ok"


def test_tool_error_reads_like_any_error():
    def find(key: str) -> str:
        """finds"""
        raise ToolError("no such key")

    result = Toolbox([Tool.from_function(find)]).call(ToolCall("find", {"key": "a"}))
    assert (result.text, result.error) == ("error: no such key", "tool_error")
