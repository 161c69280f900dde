"""Reading and writing calls: a round trip for honest text, a `BadCall` for everything else, never an exception."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import HERMES, BadCall, ToolCall, get_format, strict_json
from tools.calls import MAX_CALLS_PER_TURN

words = st.text(st.characters(codec="utf-8"), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | words, lambda x: st.lists(x, max_size=3), max_leaves=5
)
calls = st.builds(ToolCall, st.text("abc_", min_size=1, max_size=8), st.dictionaries(words, values, max_size=4))


@given(words, st.lists(calls, max_size=4))
def test_what_is_written_is_read_back(content, written):
    content = content.replace("<tool_call>", "").strip()
    read = HERMES.parse(HERMES.render(content, written))
    assert read.content == content
    assert read.calls == tuple(written)


@given(st.text(st.characters(), max_size=200))
def test_parsing_never_raises_on_characters(text):
    HERMES.parse(text)


pieces = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", '{"name": ', '"a"', "}", "{", "[", "\ud800", "\x00", "1e999",
         '"arguments": ', ",", "\\ud83d", "NaN", ":", "-Infinity", "9" * 50, " "]
    ),
    max_size=40,
)  # fmt: skip


@given(pieces)
def test_parsing_never_raises_on_fragments(parts):
    read = HERMES.parse("".join(parts))
    for call in read.calls:
        assert isinstance(call, (ToolCall, BadCall))
        if isinstance(call, ToolCall):
            json.dumps(dict(call.arguments), allow_nan=False, ensure_ascii=False).encode()


def bad(body: str) -> str:
    (call,) = HERMES.parse(f"<tool_call>{body}</tool_call>").calls
    assert isinstance(call, BadCall)
    return call.error


@pytest.mark.parametrize(
    "body, kind",
    [
        ("", "invalid_json"), ("nonsense", "invalid_json"), ("[]", "not_an_object"), ("null", "not_an_object"),
        ("{}", "no_name"), ('{"name": 3}', "no_name"), ('{"name": ""}', "no_name"),
        ('{"name": "a", "arguments": "{}"}', "bad_arguments"), ('{"name": "a", "arguments": []}', "bad_arguments"),
        ('{"name": "a", "name": "b"}', "invalid_json"),
        ('{"name": "a", "arguments": {"x": 1, "x": 1}}', "invalid_json"),
        ('{"name": "a", "arguments": {"x": NaN}}', "invalid_json"),
        ('{"name": "a", "arguments": {"x": -Infinity}}', "invalid_json"),
        ('{"name": "a", "arguments": {"x": 1e999}}', "invalid_json"),
        ('{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}", "invalid_json"),
        ('{"name": "a", "arguments": {"x": ' + "[" * 10_000, "invalid_json"),
        ('{"name": "a", "arguments": {"x": ' + "[" * 8_000 + "]" * 8_000 + "}}", "invalid_json"),
        ('{"name": "a", "arguments": {"x": "\ud800"}}', "invalid_json"),
        ('{"name": "a", "arguments": {"x": "\\ud800"}}', "invalid_json"),
        ('{"name": "a"} {"name": "b"}', "invalid_json"), ('{"name": "a", }', "invalid_json"),
        ("{'name': 'a'}", "invalid_json"), ('{"name": "' + "a" * 30_000 + '"}', "invalid_json"),
        ('<tool_call>{"name": "a"}', "invalid_json"),
    ],
)  # fmt: skip
def test_unreadable_calls_are_named(body, kind):
    assert bad(body) == kind


def test_a_name_alone_is_a_call_without_arguments():
    assert HERMES.parse('<tool_call>{"name": "now"}</tool_call>').calls == (ToolCall("now", {}),)


def test_a_surrogate_pair_escape_is_text():
    (call,) = HERMES.parse('<tool_call>{"name": "a", "arguments": {"x": "\\ud83d\\ude00"}}</tool_call>').calls
    assert isinstance(call, ToolCall) and call.arguments["x"] == "\U0001f600"


def test_unclosed_call_and_words_around():
    read = HERMES.parse('one <tool_call>{"name": "a"}</tool_call> two <tool_call>{"name": "b"')
    assert read.content == "one  two"
    assert [getattr(c, "error", None) for c in read.calls] == [None, "unclosed"]


def test_number_of_calls_is_bounded():
    read = HERMES.parse('<tool_call>{"name": "a"}</tool_call>' * 1000)
    assert len(read.calls) == MAX_CALLS_PER_TURN + 1
    assert isinstance(read.calls[-1], BadCall) and read.calls[-1].error == "too_many_calls"


def test_kept_raw_text_is_bounded():
    for text in ("<tool_call>" + "x" * 10**6, "<tool_call>" + "x" * 10**6 + "</tool_call>"):
        (call,) = HERMES.parse(text).calls
        assert len(call.raw) <= 2_000


def test_a_tag_inside_a_value_does_not_end_the_call():
    call = ToolCall("say", {"text": "</tool_call><tool_call>"})
    assert HERMES.parse(HERMES.render("", [call])).calls == (call,)


def test_formats_by_name():
    assert get_format("hermes") is HERMES
    assert pickle.loads(pickle.dumps(HERMES)) == HERMES
    with pytest.raises(ValueError, match="did you mean 'hermes'"):
        get_format("hermse")


def test_brackets_inside_strings_do_not_count_as_depth():
    assert strict_json.loads(json.dumps({"a": "[" * 500 + '"' + "{" * 500})) == {"a": "[" * 500 + '"' + "{" * 500}
