"""An environment with pictures: a disc to name the colour of, and a tool that shows one half of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from envs import ChatEnv, Message, Task, Verdict, answers, fingerprint
from envs.hacks import COMMON_HACKS
from envs.random_agent import random_agent
from tools import Tool, Toolbox, ToolCall

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SIDES = ("left", "right")


def drawn(colour: str, side: str, grey: int, radius: int) -> Image.Image:
    """56 x 56 pixels: a disc in the middle of one half, on grey."""
    picture = Image.new("RGB", (56, 56), (grey, grey, grey))
    x = 14 if side == "left" else 42
    ImageDraw.Draw(picture).ellipse((x - radius, 28 - radius, x + radius, 28 + radius), fill=COLOURS[colour])
    return picture


class Glass:
    """What one can look at a picture through; of a module, so that it can be copied and pickled."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture

    def zoom(self, side: Literal["left", "right"]) -> Image.Image:
        """the middle of one half"""
        x = 0 if side == "left" else 28
        return self.picture.crop((x, 14, x + 28, 42))


def looks(env, rng):
    yield env.call_format.render("", [ToolCall("zoom", {"side": env.episode.task.truth["side"]})])
    yield from answers_at_once(env, rng)


def answers_at_once(env, rng):
    yield f"<answer>{env.episode.task.truth['colour']}</answer>"


class Spot(ChatEnv):
    """Name the colour of the disc in the picture."""

    name = "spot"
    scripts = {"oracle": looks, "direct": answers_at_once, "random": random_agent}  # noqa: RUF012
    hacks = COMMON_HACKS
    demonstrators = {"oracle": 0.5, "direct": 0.5}  # noqa: RUF012

    def task(self, split: str, index: int, level: int | str | None = None) -> Task:
        rng = np.random.default_rng([self.splits.index(split), index])
        colour, side = list(COLOURS)[rng.integers(len(COLOURS))], SIDES[rng.integers(2)]
        # Greys of train are even, of eval odd: the splits share no picture.
        grey = int(rng.integers(40, 100)) * 2 + self.splits.index(split)
        picture = drawn(colour, side, grey, int(rng.integers(7, 13)))
        truth = {"colour": colour, "side": side}
        name = f"{self.name}/{split}/{index}"
        return Task(name, split, index, 1, {"picture": picture}, truth, fingerprint(picture))

    def opening(self, task: Task) -> Sequence[Message]:
        asked = "Which colour is the disc: red, green, blue or yellow? Say <answer>colour</answer>."
        parts: list[dict[str, Any]] = [{"type": "image", "image": task.prompt["picture"]}]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": asked}]}]

    def toolbox(self, task: Task) -> Toolbox:
        return Toolbox([Tool.from_function(Glass(task.prompt["picture"]).zoom)])

    def judge(self, task: Task, final: str | None) -> Verdict:
        said = answers.extract(final) if final is not None else None
        correct = float(said is not None and answers.same(said, task.truth["colour"]))
        return Verdict(correct, {"correct": correct}, {"answer_key": answers.key(said)})
