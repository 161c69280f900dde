"""Environments with images: the contract, copies, fingerprints, what is handed out."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

import envs
from agents.bundled import path
from envs import CheckError, fingerprint
from envs.contract import TINY_TOKENS, image_tokens
from envs.play import run_script
from envs.spaces import message_problem
from tests.envs.spot import Spot
from tools import HERMES, ToolCall

ROOT = Path(__file__).resolve().parent.parent.parent
ZOOM = HERMES.render("", [ToolCall("zoom", {"side": "left"})])


class Big(Spot):
    """Its tiny profile shows a picture of more tokens than fit."""

    def opening(self, task):
        (message,) = super().opening(task)
        message["content"][0] = {"type": "image", "image": task.prompt["picture"].resize((644, 644))}
        return [message]


class Empty(Spot):
    """Shows a picture without pixels."""

    def opening(self, task):
        (message,) = super().opening(task)
        message["content"][0] = {"type": "image", "image": Image.new("RGB", (0, 7))}
        return [message]


def started(**options):
    env = Spot(**options)
    observation, _ = env.reset(options={"index": 3})
    return env, observation


def test_the_contract_is_kept_and_images_count_in_the_tiny_profile():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path())
    asked = []

    def count(messages, tools) -> int:
        asked.extend(messages)
        return len(tokenizer.apply_chat_template(list(messages), tools=list(tools), tokenize=True)["input_ids"])

    with_tokens = envs.check("tests.envs.spot:Spot", tasks=6, pool=60, count_tokens=count)
    assert with_tokens.rewards["oracle"] == 1.0 and "tokens" in with_tokens.rules["tiny profile"]
    assert asked and all(isinstance(m["content"], str) for m in asked)  # images are counted apart
    without = envs.check("tests.envs.spot:Spot", tasks=6, pool=60)
    assert "characters" in without.rules["tiny profile"]


@pytest.mark.parametrize("env, rule, said", [
    (Big, "tiny profile", "1500"), (Empty, "messages", "0 x 7 pixels shows nothing"),
])  # fmt: skip
def test_what_breaks_the_contract_is_named(env, rule, said):
    with pytest.raises(CheckError, match=said) as broken:
        envs.check(env, tasks=4, pool=20)
    assert broken.value.rule == rule


@pytest.mark.parametrize("size, tokens", [
    ((28, 28), 6), ((56, 56), 6), ((57, 56), 8), ((280, 140), 52), ((644, 644), 531),
])  # fmt: skip
def test_an_image_counts_as_one_token_per_28_by_28_pixels(size, tokens):
    assert image_tokens(Image.new("RGB", size)) == tokens
    assert (tokens > TINY_TOKENS) == (size == (644, 644))


def test_opening_and_tool_result_hold_images():
    env, observation = started()
    assert observation in env.observation_space
    picture, asked = observation["messages"][0]["content"]
    assert picture["image"].size == (56, 56) and "colour" in asked["text"]
    observation, *_, info = env.step(ZOOM)
    (message,) = observation["messages"]
    assert (message["role"], message["name"]) == ("tool", "zoom") and message_problem(message) is None
    (part,) = message["content"]
    assert part["image"] == picture["image"].crop((0, 14, 28, 42)) and info["tool_results"][0].text == ""
    assert env.step("<answer>no idea</answer>")[1] == 0.0


def test_what_is_handed_out_belongs_to_the_caller_but_for_the_pixels():
    env, first = started()
    later = env.step(ZOOM)[0]
    for observation, place in ((first, 0), (later, 2)):
        (message,) = observation["messages"]
        kept = env.episode.messages[place]["content"]
        assert message["content"] == kept and message["content"][0]["image"] is kept[0]["image"]
        message["content"][0]["image"] = None
        message["content"].clear()
        assert kept and kept[0]["image"] is not None
    assert env.episode.results[0].parts[0]["image"] is not None


def test_copies_taken_mid_episode_hold_equal_pictures_of_their_own():
    env, _ = started()
    env.step(ZOOM)
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert twin.episode.messages == env.episode.messages
        mine, theirs = (e.episode.messages[0]["content"][0]["image"] for e in (env, twin))
        theirs.paste((1, 2, 3), (0, 0, 56, 56))
        assert mine != theirs and twin.step(ZOOM)[0]["messages"][0]["content"][0]["image"].size == (28, 28)
    assert len(env.episode.messages) == 3


def test_transcripts_say_how_large_an_image_is():
    env, _ = started(render_mode="ansi")
    env.step(ZOOM)
    shown = env.render()
    assert "user | [image 56x56] Which colour" in shown and "tool:zoom | [image 28x28]\n" in shown
    env.episode.messages.append({"role": "user", "content": [{"type": "image"}]})
    assert "user | [image]\n" in env.render()


def test_random_play_and_demonstrators():
    env = Spot()
    for script in ("random", "oracle", "direct"):
        played = [run_script(env, script, np.random.default_rng(i), {"index": i}) for i in range(40)]
        rewards = [p.reward for p in played]
        assert np.mean(rewards) < 0.5 if script == "random" else min(rewards) == 1.0
        assert all(message_problem(m) is None for p in played for m in p.messages)


images = st.tuples(st.sampled_from(["L", "RGB", "RGBA", "I;16", "F"]), st.integers(1, 5), st.integers(1, 5), st.binary(
    min_size=100, max_size=100,
)).map(lambda t: Image.frombytes(t[0], t[1:3], t[3][: len(Image.new(t[0], t[1:3]).tobytes())]))  # fmt: skip


@given(images, images, st.text(max_size=5))
@settings(deadline=None)
def test_fingerprints_are_of_pixels_and_mode(a, b, text):
    again = Image.frombytes(a.mode, a.size, a.tobytes())
    again.info["noted"] = text
    assert fingerprint(text, {"p": [a]}) == fingerprint(text, {"p": [again]}) == fingerprint(text, {"p": [a.copy()]})
    same = (a.mode, a.size, a.tobytes()) == (b.mode, b.size, b.tobytes())
    assert (fingerprint(a) == fingerprint(b)) == same
    assert fingerprint(a) != fingerprint([a]) and fingerprint(a) != fingerprint(text)


def test_palettes_count_in_a_fingerprint():
    red, blue = (Image.new("P", (2, 2), 0) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert red.tobytes() == blue.tobytes() and fingerprint(red) != fingerprint(blue)
    assert fingerprint(red) == fingerprint(red.copy()) != fingerprint(red.convert("RGB"))


def test_fingerprints_of_images_are_the_same_in_every_process():
    code = "from tests.envs.spot import Spot; print(*[Spot().task('eval', i).fingerprint for i in range(5)])"
    said = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1] == " ".join(Spot().task("eval", i).fingerprint for i in range(5)) + "\n"
