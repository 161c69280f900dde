"""The report: complete, self-contained, safe against hostile text, and looked at in a real browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import stats
from agents.ledger import Ledger
from agents.report import collect, episodes, render
from agents.report.episodes import Entry, Scales, TokenTable
from agents.trajectory import Trajectory, TurnInfo
from envs import Verdict
from tests.agents import chromium
from tests.agents.tokenizers import byte_bpe

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; \" ' ` ${1} {{ 7 * 7 }} {% raw %}",
    "\x00\x01\x1b[31m\u202egnp.exe\u2066",
    "lone \ud800 surrogate \udfff",
    "<!-- ]]> <![CDATA[",
    "\u2028\u2029\ufeff",
]
FACTS = {"tool_calls": 1, "answer_key": "Toruna"}
QUESTION = "Who is the mentor of Zanvel?"


def episode(
    step=1, group=0, member=0, *, say="<answer>Toruna</answer>", correct=True, level=1, task=None, **more
):
    """A stored trajectory of two turns: a tool call and an answer, tokens by a real tokenizer."""
    tokenizer, rng = byte_bpe(), np.random.default_rng((step, group, member))
    call = (
        '<tool_call>{"name": "lookup", "arguments": {"entity": "Zanvel", "attribute": "mentor"}}</tool_call>'
    )
    ledger = Ledger()

    def encode(text):
        return tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)

    ledger.observe(encode(QUESTION), 0)
    for turn, text in enumerate((call, say)):
        ids = encode(text)
        ledger.act(ids, (-rng.exponential(0.3, len(ids))).tolist(), turn, step)
        if turn == 0:
            ledger.observe(encode("Toruna"), 1)
    sign = 1.0 if correct else -1.0
    columns = {"adv_BT": [[sign] * len(ledger)], "entropy_BT": [rng.random(len(ledger)).tolist()]}
    trajectory = Trajectory(
        task or f"tool_qa/train/{group}", group, "train", level, group, member, ledger=ledger, version=step,
        messages=[
            {"role": "system", "content": "Use the tools."}, {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": call}, {"role": "tool", "name": "lookup", "content": "Toruna"},
            {"role": "assistant", "content": say},
        ],
        turns=[TurnInfo(call, 0.0, ("lookup",)), TurnInfo(say, float(correct))],
        verdict=Verdict(float(correct), {"correct": float(correct)}, FACTS),
        reward=float(correct), stop_reason="answered",
    )  # fmt: skip
    for name, value in more.items():
        setattr(trajectory, name, value)
    return Entry(step, trajectory, columns)


def run_data(steps=30, **config) -> collect.RunData:
    rng = np.random.default_rng(0)
    metrics = [
        {"step": s + 1, "correct": 0.3 + 0.02 * s, "reward": 0.3 + 0.02 * s, "entropy": 0.3 / (s + 1),
         "grad_norm": float(rng.lognormal()), "logp_gap": 1e-6, "zero_variance_groups": 0.95, "kl": 1e-3,
         "tool_calls": 1.5, "length": 40.0, "clip_frac": 0.01, "truncated": 0.0}
        for s in range(steps)
    ]  # fmt: skip
    evals = [
        evaluation("before", 120, 0),
        evaluation("after", 350, steps),
        evaluation("harder", 90, steps, "hard"),
    ]
    options = {"env": "tool_qa", "algo": "grpo", "seed": 3, "level": None, **config}
    return collect.RunData("a run", options, metrics, evals)


def evaluation(label, right, step, level=None):
    correct = [[1]] * right + [[0]] * (400 - right)
    row = {"level": 1, "success": [0.5, 0.4, 0.6], "tool_calls": 1.0, "productivity": 0.5, "episodes": 200}
    return {
        "label": label, "env": "tool_qa", "split": "eval", "level": level, "step": step, "episodes": 400,
        "success": list(stats.success_interval(correct)), "pass_at": {"1": [0.5, 0.4, 0.6]},
        "tool_calls": [1.5, 1.4, 1.6], "productivity": 0.6, "failure_share": 0.0, "marked": False,
        "levels": [row, row | {"level": 2}], "correct": correct, "tasks_key": str(level),
    }  # fmt: skip


def build(entries, run=None, tokenizer=None, total=None):
    entries = list(entries)
    return collect.page(run or run_data(), entries, total or len(entries), tokenizer or byte_bpe(), "a test")


def contents(html: str) -> tuple[dict, list[list[dict]]]:
    """Summary and blocks as the page will unpack them."""
    found = dict(re.findall(r'<script type="text/plain" id="([\w-]+)">(.*?)</script>', html, re.S))
    summary = render.unpack(found.pop("summary"))
    return summary, [render.unpack(found[f"block-{i}"]) for i in range(len(found))]


def test_the_page_holds_everything_and_fetches_nothing():
    entries = [episode(step, group, member) for step in (1, 2) for group in range(3) for member in range(8)]
    html = render.render(build(entries))
    summary, blocks = contents(html)
    assert summary["table"]["count"] == 48 == sum(map(len, blocks))
    assert len(set(summary["table"]["unit"])) == 6, "groups of a step share a start state"
    assert summary["metrics"]["steps"] == list(range(1, 31))
    assert [e["label"] for e in summary["evals"]] == ["before", "after", "harder"]
    assert [e["main"] for e in summary["evals"]] == [True, True, False]
    assert summary["gain"][0] == pytest.approx(230 / 400)
    assert (
        summary["findings"][0]["name"] == "zero_variance_groups" and summary["findings"][0]["level"] == "bad"
    )
    assert ["algo", "grpo"] in summary["config"]
    assert {c["name"] for c in summary["columns"]} == {"logp", "mask", "version", "adv", "entropy"}
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
    assert "default-src 'none'" in html


def test_tokens_of_the_page_are_the_ledgers():
    entry = episode()
    summary, ((detail,),) = contents(render.render(build([entry])))
    (segment,) = detail["segments"]
    (own,) = entry.trajectory.ledger.segments
    assert [summary["ids"][n] for n in segment["tokens"]] == own.ids
    assert segment["mask"] == own.mask and segment["turn"] == own.turn
    logp = [v for v in segment["columns"]["logp"] if v is not None]
    assert logp == pytest.approx([p for p, m in zip(own.logp, own.mask, strict=True) if m], rel=1e-3)
    assert "".join(summary["tokens"][n] for n in segment["tokens"]) == byte_bpe().decode(own.ids)
    assert [m.get("turn") for m in detail["messages"]] == [None, None, 0, None, 1]
    assert detail["messages"][2]["calls"] == [{"text": "lookup(entity='Zanvel', attribute='mentor')"}]
    assert ["answer_key", "Toruna"] in detail["facts"]


def test_columns_are_cut_at_segments_and_shown_where_the_policy_spoke():
    entry = episode()
    ledger = entry.trajectory.ledger
    first = len(ledger)
    ledger.branch([1, 2, 3], 2)
    ledger.act([4, 5], [-1.0, -2.0], 2, 1)
    columns = {"credit_BT": [[0.5] * first, [0.0, 0.0, 0.0, 7.0, 8.0]]}
    _, ((detail,),) = contents(render.render(build([Entry(1, entry.trajectory, columns)])))
    one, two = detail["segments"]
    assert two["parent"] == 0 and two["columns"]["credit"] == [None, None, None, 7, 8]
    assert set(one["columns"]["credit"]) == {None, 0.5}


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_run_is_markup(text):
    entry = episode(say=text, task=text, stop_reason=text)
    entry.trajectory.messages.append(
        {"role": text, "name": text, "content": [{"type": text}, {"type": "text", "text": text}]}
    )
    run = run_data(note=text)
    run = collect.RunData(text, run.config, run.metrics, run.evals)
    page = build([entry], run)
    html = render.render(page)
    harmless = render.render(build([episode()], run_data()))
    for tag in ("<script", "</script", "<img", "<!--", "<style"):
        assert html.lower().count(tag) == harmless.lower().count(tag), tag
    html.encode("utf-8")
    _, ((detail,),) = contents(html)
    assert detail["messages"][4]["text"] == text, "escaped, not altered"


def test_a_megabyte_is_capped_and_said():
    big = "x" * 1_000_000
    entry = episode(say=big)
    entry.trajectory.messages += [{"role": "tool", "content": "y"}] * 5000
    html = render.render(build([entry]))
    _, ((detail,),) = contents(html)
    assert len(html) < 400_000
    assert detail["messages"][4]["cut"] == 1_000_000 - episodes.MAX_TEXT
    assert len(detail["messages"]) == episodes.MAX_MESSAGES
    assert detail["segments"][0]["cut"] > 0 and len(detail["segments"][0]["tokens"]) == episodes.MAX_TOKENS


def thousands() -> list[Entry]:
    """2,000 trajectories of 25 steps, ten groups each; the steps share their episodes' contents."""
    some = [episode(1, group, member) for group in range(10) for member in range(8)]
    return [Entry(step, e.trajectory, e.columns) for step in range(25) for e in some]


def test_two_thousand_trajectories_stay_small():
    html = render.render(build(thousands(), total=12_800))
    summary, _ = contents(html)
    assert summary["table"]["count"] == 2000 and summary["table"]["total"] == 12_800
    assert "2000 of 12800" in summary["table"]["note"]
    assert len(html) < 8_000_000


def test_without_ledger_verdict_or_tokenizer():
    entry = episode(ledger=None, verdict=None, stop_reason="error:ValueError")
    summary, ((detail,),) = contents(render.render(build([entry])))
    assert detail["segments"] == [] and detail["failure"] == "no verdict"
    assert summary["table"]["correct"] == [-1]
    page = collect.page(run_data(), [episode()], 1, None, "a test")
    assert all(re.fullmatch(r"⟨\d+⟩", t) for t in page.summary["tokens"])


def test_an_empty_run_has_a_report():
    html = render.render(collect.page(collect.RunData("new"), [], 0, None, "a test"))
    summary, blocks = contents(html)
    assert blocks == [] and summary["metrics"]["steps"] == [] and summary["gain"] is None


@given(st.lists(st.floats() | st.integers(-5, 5), max_size=30))
@settings(deadline=None)
def test_scales_are_finite_and_hold_zero(values):
    scales = Scales()
    scales.add("x", [episodes.rounded(v) for v in values])
    for spec in scales.specs():
        assert math.isfinite(spec["low"]) and math.isfinite(spec["high"]) and spec["low"] < spec["high"]
        assert spec["low"] <= 0 <= spec["high"]
        assert spec["kind"] == "sequential" or spec["low"] == -spec["high"]


@given(st.floats(allow_nan=True))
def test_rounding_keeps_four_digits(value):
    kept = episodes.rounded(value)
    if math.isfinite(value):
        assert kept == pytest.approx(min(max(value, -1e100), 1e100), rel=1e-3, abs=0)
    else:
        assert kept is None


def test_tokens_that_are_pieces_of_a_character_show_their_raw_form():
    tokenizer = byte_bpe()
    ids = tokenizer.encode("é€", add_special_tokens=False)
    table = TokenTable(tokenizer)
    table.numbers([*ids, 10**9])
    texts = table.texts()
    assert all("\ufffd" not in t and t for t in texts) and texts[-1] == "⟨1000000000⟩"


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
)
names = st.sampled_from(
    ["step", "success", "label", "correct", "tasks_key", "levels", "level", "tool_calls", "failure_share"]
)


@given(
    st.lists(st.dictionaries(names, json_values), max_size=4),
    st.dictionaries(st.text(max_size=5), json_values),
)
@settings(max_examples=60, deadline=None)
def test_damaged_run_files_still_give_a_page(tmp_path_factory, records, config):
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text(json.dumps(config))
    lines = "\n".join(json.dumps(r) for r in records)
    (run / "metrics.jsonl").write_text(lines + '\n{"torn')
    (run / "eval.jsonl").write_text(lines)
    data = collect.read(run)
    assert any("1 damaged" in note for note in data.notes)
    render.render(collect.page(data, [], 0, None, "a test"))


# ---------------------------------------------------------------- in a real browser


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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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
