"""Spaces: membership by type and length, batching, equality."""

from __future__ import annotations

import copy

import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from PIL import Image

from envs.spaces import Messages, Observation, Schemas, Text, ToolSchemas, message_problem

PICTURE = Image.new("RGB", (2, 3))
GOOD = {"role": "user", "content": "hi"}
OBSERVATION = {"messages": (GOOD,), "tools": Schemas()}


def test_samples_are_members():
    for space in (Text(10), Messages(3), ToolSchemas(2), Observation()):
        space.seed(3)
        for _ in range(20):
            assert space.sample() in space
        assert space == copy.deepcopy(space) and repr(space)
    assert isinstance(Observation(), spaces.Dict)


@pytest.mark.parametrize("wrong", [
    None, 3, "text", {}, {"messages": ()}, {"messages": (), "tools": (), "more": 1}, {"messages": [], "tools": ()},
    {"messages": (3,), "tools": ()}, {"messages": ({"role": "judge", "content": ""},), "tools": ()},
    {"messages": ({"role": []},), "tools": ()}, {"messages": ({"role": "user", "content": 3},), "tools": ()},
    {"messages": (GOOD,) * 300, "tools": ()}, {"messages": (), "tools": None}, {"messages": (), "tools": ({},) * 300},
])  # fmt: skip
def test_what_is_no_observation(wrong):
    assert wrong not in Observation()


def test_what_is_an_observation():
    space = Observation()
    assert OBSERVATION in space and {"messages": (), "tools": ()} in space
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": object()}]
    assert {"messages": ({"role": "user", "content": parts},), "tools": ({},)} in space
    for leaf in ("messages", "tools"):   # the whole says what its leaves would say
        assert OBSERVATION[leaf] in space[leaf]


def test_text_counts_characters_only():
    assert "\ud800\x00" in Text(2) and "abc" not in Text(2) and b"a" not in Text(2) and "" in Text(2)


def test_vector_form():
    space = Observation()
    batched = batch_space(space, 3)
    items = [OBSERVATION] * 3
    joined = concatenate(space, items, create_empty_array(space, 3))
    assert joined["messages"] == ((GOOD,),) * 3
    assert len(list(iterate(batched["messages"], joined["messages"]))) == 3
    assert tuple(iterate(batch_space(Text(5), 2), ("a", "b"))) == ("a", "b")


@pytest.mark.parametrize("message, problem", [
    (GOOD, None), ({"role": "user"}, "content"), ({"role": "x", "content": ""}, "role"), ("hi", "role"),
    ({"role": "user", "content": "\ud800"}, "UTF-8"), ({"role": "user", "content": [{"type": "sound"}]}, "type"),
    ({"role": "user", "content": [{"type": "text", "text": 3}]}, "text expected"),
    ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": PICTURE}]}, None),
    ({"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, "there is none"),
    ({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, "got str"),
    ({"role": "user", "content": [{"type": "image", "image": None}]}, "got NoneType"),
    ({"role": "user", "content": [{"type": "image", "image": Image.new("L", (0, 5))}]}, "0 x 5 pixels"),
])  # fmt: skip
def test_messages_are_looked_at_closely(message, problem):
    found = message_problem(message)
    assert found is None if problem is None else problem in found


def test_equality_is_by_kind_and_bounds():
    assert Text(3) != Text(4) and Messages(3) != ToolSchemas(3) and Messages(3) == Messages(3)
