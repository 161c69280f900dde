"""Tools that return images: order, bounds, modes; the same in place and from a worker process."""

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

from tests.tools import picture_tools
from tools import Tool, Toolbox, ToolCall, ToolResult
from tools.images import MAX_IMAGES, MAX_PIXELS, MAX_SIDE, rgb
from tools.toolbox import CUT

ROOT = Path(__file__).resolve().parent.parent.parent
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16")


@pytest.fixture(params=[None, 60.0], ids=["in place", "in a worker"])
def call(request):
    """Calls a tool, in this process or in one of its own."""

    def run(fn, limit: int = 4_000, **arguments) -> ToolResult:
        box = Toolbox([Tool.from_function(fn, timeout_s=request.param)], max_output_chars=limit)
        return box.call(ToolCall(fn.__name__, arguments))

    return run


def outline(result: ToolResult) -> list:
    """Texts, and sizes of images, in order."""
    assert result.parts is not None
    return [part["text"] if part["type"] == "text" else part["image"].size for part in result.parts]


@pytest.mark.parametrize("mode", MODES)
def test_any_mode_becomes_rgb(call, mode):
    result = call(picture_tools.show, mode=mode)
    assert (result.text, result.error, outline(result)) == ("", None, [(7, 5)])
    image = result.parts[0]["image"]
    assert image.mode == "RGB" and image == rgb(picture_tools.pattern(mode))
    if not picture_tools.pattern(mode).has_transparency_data and mode != "I;16":
        assert image.tobytes() == picture_tools.pattern(mode).convert("RGB").tobytes()


def test_what_is_transparent_is_white_and_greys_of_16_bits_keep_their_upper_bits():
    see_through = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    see_through.putpixel((1, 0), (10, 20, 30, 0))
    assert np.array(rgb(see_through)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16))
    assert grey.mode == "I;16" and np.array(rgb(grey))[0, :, 0].tolist() == [0, 0, 1, 156, 255]


def test_texts_and_images_keep_their_order(call):
    result = call(picture_tools.mixed, words=3, images=2)
    assert outline(result) == ["xxx", (2, 3), "after 0", (3, 3), "after 1"]
    assert result.text == "xxx after 0 after 1" and not result.truncated
    for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert twin == result


@pytest.mark.parametrize("words, images, limit, shown", [
    (100, 1, 30, ["x" * 21, (2, 3), CUT]),
    (8, 2, 20, ["x" * 8, (2, 3), "af", (3, 3), CUT]),
    (18, 1, 26, ["x" * 18, (2, 3), "after 0"]),
    (10, 0, 10, "x" * 10),
])  # fmt: skip
def test_words_are_cut_and_images_stay(call, words, images, limit, shown):
    result = call(picture_tools.mixed, limit, words=words, images=images)
    if images:
        assert outline(result) == shown and len(result.text) <= limit and result.truncated == (CUT in shown)
    else:  # a list without images is JSON, as ever
        assert result.parts is None and result.text == f'["{"x" * 10}"]'[: limit - len(CUT)] + CUT


def test_a_worker_cuts_where_this_process_cuts():
    boxes = [Tool.from_function(picture_tools.mixed, timeout_s=limit) for limit in (None, 60.0)]
    for limit in range(9, 40):
        here, there = (
            Toolbox([tool], max_output_chars=limit).call(ToolCall("mixed", {"words": 9, "images": 2})) for tool in boxes
        )
        assert here == there and len(here.text) <= limit and here.truncated == (limit < 25), limit


@given(st.lists(st.text(max_size=12) | st.none(), max_size=12), st.integers(10, 60))
@settings(deadline=None, max_examples=60)
def test_results_with_images_are_encodable_and_bounded(texts, limit):
    image = Image.new("RGB", (2, 2))

    def look() -> list:
        """looks"""
        return [image, *(image if t is None and i < 5 else t or "" for i, t in enumerate(texts))]

    result = Toolbox([Tool.from_function(look)], max_output_chars=limit).call(ToolCall("look", {}))
    assert result.error is None and len(result.text) <= limit
    result.text.encode()
    assert all(part["type"] == "image" or part["text"] for part in result.parts or ())
    sizes = [part for part in result.parts or () if part["type"] == "image"]
    assert len(sizes) == 1 + sum(t is None and i < 5 for i, t in enumerate(texts))


@pytest.mark.parametrize("fn, arguments, kind, said", [
    (picture_tools.many, {"count": MAX_IMAGES + 1}, "too_large", f"{MAX_IMAGES + 1} images, at most {MAX_IMAGES}"),
    (picture_tools.sized, {"width": MAX_SIDE + 1, "height": 1}, "too_large", f"at most {MAX_SIDE} a side"),
    (picture_tools.sized, {"width": 2001, "height": 2000}, "too_large", f"{MAX_PIXELS} in all"),
    (picture_tools.huge, {}, "too_large", "an image of 20000 x 20000 pixels"),
    (picture_tools.sized, {"width": 0, "height": 5}, "exception", "0 x 5 pixels shows nothing"),
    (picture_tools.torn, {}, "exception", "OSError"),
    (picture_tools.hidden, {}, "exception", "inside other data"),
    (picture_tools.beside, {}, "exception", "no int"),
])  # fmt: skip
def test_what_cannot_be_shown_is_an_error_in_words(call, fn, arguments, kind, said):
    result = call(fn, **arguments)
    assert (result.error, result.parts) == (kind, None) and result.text.startswith("error: ") and said in result.text


def test_the_bounds_themselves_are_allowed(call):
    assert outline(call(picture_tools.many, count=MAX_IMAGES)) == [(4, 4)] * MAX_IMAGES
    assert outline(call(picture_tools.sized, width=2000, height=2000)) == [(2000, 2000)]
    assert outline(call(picture_tools.sized, width=MAX_SIDE, height=1)) == [(MAX_SIDE, 1)]


def test_a_huge_image_is_refused_before_it_is_read():
    """400 million pixels of RGB would be 1.2 GB."""
    code = (
        "import resource\n"
        "from tests.tools.picture_tools import huge\n"
        "from tools import Tool, Toolbox, ToolCall\n"
        "box, image = Toolbox([Tool.from_function(huge)]), huge()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))\n"
        "print(Toolbox([Tool('show', '', {'type': 'object'}, lambda: image)]).call(ToolCall('show', {})).error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "too_large\n", ended.stderr


def test_pillow_is_imported_by_those_who_show_images_only():
    """Also in the process that runs a tool with a time limit."""
    code = (
        "import sys, envs\n"
        "from tests.tools import slow_tools\n"
        "from tools import Tool, Toolbox, ToolCall\n"
        "env = envs.make('tool_qa')\n"
        "env.reset(seed=1)\n"
        "env.step('hm')\n"
        "box = Toolbox([Tool.from_function(slow_tools.add, timeout_s=30)])\n"
        "print(box.call(ToolCall('add', {'a': 1, 'b': 2})).text, 'PIL' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "3 False\n", ended.stderr
