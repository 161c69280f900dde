"""The report: complete, self-contained, safe against hostile text. `test_view_browser` looks at it."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.report import collect, episodes, render
from agents.report.episodes import Entry, Scales, TokenTable
from tests.agents.sample_runs import HOSTILE, build, episode, run_data, thousands
from tests.agents.tokenizers import byte_bpe


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
