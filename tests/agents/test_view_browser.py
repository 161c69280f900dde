"""The report in a real headless Chromium: what it shows, logs, asks of the network, and how it reacts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from agents.report import collect, render
from tests.agents import chromium
from tests.agents.sample_runs import HOSTILE, QUESTION, build, episode, run_data, thousands
from tests.envs.spot import Spot

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.find() is None:
        pytest.skip("no Chromium on this machine")
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def show(browser, tmp_path: Path, page) -> None:
    file = tmp_path / "report.html"
    file.write_text(render.render(page), encoding="utf-8")
    browser.errors.clear()
    browser.requests.clear()
    browser.open(file, "document.documentElement.dataset.ready === 'yes'")


def text(browser, selector: str) -> str:
    return browser.value(f"document.querySelector({json.dumps(selector)}).innerText")


def click(browser, selector: str, label: str | None = None) -> None:
    wanted = "true" if label is None else f"e.textContent === {json.dumps(label)}"
    browser.value(f"[...document.querySelectorAll({json.dumps(selector)})].find(e => {wanted}).click()")


def hover(browser, selector: str) -> None:
    """Move the pointer over the first such element."""
    browser.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
    x, y = browser.value(
        f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        " return [b.x + 2, b.y + 4]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def choose(browser, name: str, value: str) -> None:
    """Set one of the table's filters."""
    browser.value(
        f"(() => {{ const s = document.querySelector('select[data-filter={name}]');"
        f" s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); }})()"
    )


def test_a_browser_shows_the_report_and_asks_the_network_for_nothing(browser, tmp_path):
    entries = [
        episode(s, g, m, correct=(g + m) % 2 == 0, level=1 + g % 2)
        for s in (1, 5)
        for g in range(4)
        for m in range(4)
    ]
    show(browser, tmp_path, build(entries, total=640))
    assert "30.0 %" in text(browser, ".headline") and "87.5 %" in text(browser, ".headline")
    assert "paired gain 0.575" in text(browser, ".headline")
    assert "zero variance groups" in text(browser, ".findings")
    assert "harder" in text(browser, ".evals") and "0.225" in text(browser, ".evals")
    charts = browser.value("[...document.querySelectorAll('.chart')].map(c => c.dataset.metric)")
    assert set(charts) >= {
        "correct",
        "reward",
        "tool_calls",
        "length",
        "entropy",
        "kl",
        "clip_frac",
        "grad_norm",
        "logp_gap",
    }
    assert browser.value("document.querySelectorAll('.chart[data-metric=correct] g.mark').length") == 2
    assert "32 of 32" in text(browser, ".count")
    choose(browser, "correct", "1")
    assert "16 of 32" in text(browser, ".count")
    click(browser, ".row")
    browser.wait("document.querySelector('.episode .verdict')")
    shown = text(browser, ".episode")
    assert (
        QUESTION in shown and "lookup(entity='Zanvel', attribute='mentor')" in shown and "answer_key" in shown
    )
    click(browser, ".segments button", "adv")
    browser.wait("document.querySelector('.legend')")
    shades = browser.value(
        "new Set([...document.querySelectorAll('.message.assistant .tokens span')]"
        ".map(s => s.style.background)).size"
    )
    assert shades == 1, "one advantage, one colour"
    click(browser, ".segments button", "tokens")
    browser.wait("document.querySelector('.episode > .tokens')")
    assert text(browser, ".episode > .tokens").startswith(QUESTION[:10])
    hover(browser, ".tokens span:not(.env)")
    browser.wait("document.querySelector('#tip') && !document.querySelector('#tip').hidden")
    assert "probability" in text(browser, "#tip") and "logp" in text(browser, "#tip")
    assert browser.errors == [], browser.errors
    assert [r for r in browser.requests if not r.startswith("file:")] == [] and len(browser.requests) == 1


def test_a_browser_runs_nothing_of_what_a_model_wrote(browser, tmp_path):
    entries = [episode(1, g, 0, say=h, task=h, stop_reason=h) for g, h in enumerate(HOSTILE)]
    for entry, hostile in zip(entries, HOSTILE, strict=True):
        entry.trajectory.messages[3] = {"role": "tool", "name": hostile, "content": hostile}
    run = run_data(note=HOSTILE[0])
    show(browser, tmp_path, build(entries, collect.RunData(HOSTILE[0], run.config, run.metrics, run.evals)))
    assert browser.value("document.title").startswith("</script>")
    for i in range(len(HOSTILE)):
        click(browser, f".row[data-row='{i}']")
        browser.wait(
            f"document.querySelector('.row.on').dataset.row === '{i}' && document.querySelector('.verdict')"
        )
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.value("document.querySelectorAll('script:not([type])').length") == 1
    body = browser.value("document.body.innerText")
    assert "\u202e" not in body and "\x00" not in body and "\u2066" not in body
    assert browser.errors == [] and len(browser.requests) == 1


def test_a_browser_shows_the_images_of_a_conversation(browser, tmp_path):
    """In order, decoded, from the file itself; where one is not kept, its size stands."""
    entries = []
    for group, colour in enumerate(("red", "blue")):
        env = Spot()
        env.reset(options={"index": group})
        picture = env.episode.messages[0]["content"][0]
        entry = episode(1, group)
        parts = [{"type": "text", "text": "Look: "}, picture, {"type": "text", "text": " and say."}]
        lost = {"type": "image", "image": {"png": "0" * 32, "width": 640, "height": 480}}
        entry.trajectory.messages[0]["content"] = [{"type": "text", "text": "s" * 800}, picture]
        entry.trajectory.messages[1]["content"] = parts
        side = {"type": "image", "image": Image.new("RGB", (28, 28), colour)}
        entry.trajectory.messages[3] = {"role": "tool", "name": "zoom", "content": [side, lost]}
        entries.append(entry)
    show(browser, tmp_path, build(entries))
    for group in range(2):
        click(browser, f".row[data-row='{group}']")
        browser.wait(f"document.querySelector('.episode h3').innerText === 'tool_qa/train/{group}'")
        browser.wait("document.querySelector('.message.user img').naturalWidth > 0")
        sizes = browser.value(
            "[...document.querySelectorAll('.message img')].map(i => [i.naturalWidth, i.naturalHeight])"
        )
        assert sizes == [[56, 56], [56, 56], [28, 28]]
        shown = browser.value(
            "[...document.querySelector('.message.user .body').childNodes].map(n => n.textContent || n.tagName)"
        )
        assert shown == ["Look: ", "IMG", " and say."]
        assert "640 × 480 pixels, not kept" in text(browser, ".message.tool .body")
        pixel = browser.value(
            "(() => { const c = document.createElement('canvas').getContext('2d');"
            " c.drawImage(document.querySelector('.message.tool img'), 0, 0);"
            " return [...c.getImageData(3, 3, 1, 1).data]; })()"
        )
        assert pixel == ([255, 0, 0, 255] if group == 0 else [0, 0, 255, 255])
    browser.value("document.querySelector('.episode').scrollIntoView()")
    browser.screenshot(tmp_path / "images.png")
    assert browser.errors == [] and [r for r in browser.requests if not r.startswith(("file:", "data:"))] == []


def test_a_browser_is_quick_with_two_thousand_trajectories(browser, tmp_path):
    """Rows of the table exist only where they are seen; any of them can be reached."""
    show(browser, tmp_path, build(thousands()))
    assert browser.value("document.querySelectorAll('.row').length") <= 60
    assert browser.value("document.querySelectorAll('*').length") < 3000
    browser.value("document.querySelector('.window').scrollTop = 1e9")
    browser.wait("document.querySelector('.row[data-row=\"1999\"]')")
    click(browser, '.row[data-row="1999"]')
    browser.wait("document.querySelector('.episode h3').innerText === 'tool_qa/train/9'")
    assert browser.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(browser, tmp_path, scheme):
    """Contrast of running text and of muted text against what they stand on is at least 4.5 (WCAG AA)."""
    browser.emulate(scheme)
    show(browser, tmp_path, build([episode()]))
    colours = browser.value(
        "['--paper', '--card', '--ink', '--soft', '--clay', '--sea', '--good', '--bad', '--warn'].map(n => "
        "getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
    )
    paper, card, *inks = [luminance(c) for c in colours]
    assert (paper > 0.5) == (scheme == "light")
    for ink in inks:
        for ground in (paper, card):
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
