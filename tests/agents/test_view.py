"""The report: complete, self-contained, safe against hostile text. `test_view_browser` looks at it."""

from __future__ import annotations

import base64
import io
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agents.cli import UsageError
from agents.report import collect, episodes, gallery, render
from agents.report.episodes import Entry, Scales, TokenTable
from agents.report.stored import choose
from agents.runfolder import plain
from agents.store import TrajectoryWriter
from agents.view import main, write_report
from tests.agents.sample_runs import HOSTILE, QUESTION, build, episode, run_data, thousands
from tests.agents.tokenizers import byte_bpe


def contents(html: str) -> tuple[dict, list[list[dict]]]:
    """Summary and blocks as the page will unpack them."""
    found = dict(re.findall(r'<script type="text/plain" id="(summary|block-\d+)">(.*?)</script>', html, re.S))
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
    assert summary["findings"][0]["name"] == "zero_variance_groups" and summary["findings"][0]["level"] == "bad"
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


def pictured(*images, group=0, text="look"):
    """An episode that shows images in its question and in a tool's answer."""
    entry = episode(1, group)
    parts = [{"type": "image", "image": image} for image in images]
    entry.trajectory.messages[1]["content"] = [{"type": "text", "text": text}, *parts, {"type": "text", "text": "!"}]
    entry.trajectory.messages[3]["content"] = parts[:1]
    return entry


def shown_images(html: str) -> list[Image.Image]:
    found = re.findall(r'<script type="text/plain" id="image-(\d+)" data-kind="image/(\w+)">(.*?)</script>', html)
    assert [int(number) for number, *_ in found] == list(range(len(found)))
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for *_, data in found]
    assert [image.format.lower() for image in images] == [kind for _, kind, _ in found]
    return images


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_each_distinct_image_stands_in_the_file_once():
    red, red_again, wide = Image.new("RGB", (7, 5), "red"), Image.new("RGB", (7, 5), "red"), noise(2048, 512)
    html = render.render(build([pictured(red, wide), pictured(red_again, group=1)]))
    first, second = shown_images(html)
    assert first.convert("RGB").tobytes() == red.tobytes() and second.size == (512, 128) and second.format == "JPEG"
    _, ((one, two),) = contents(html)
    small, large = ({"width": 7, "height": 5, "image": 0}, {"width": 2048, "height": 512, "image": 1})
    assert one["messages"][1]["parts"] == ["look", small, large, "!"] and one["messages"][3]["parts"] == [small]
    assert two["messages"][1]["parts"] == ["look", small, "!"] and "parts" not in two["messages"][0]
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
    assert "img-src data:;" in html


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I", "F", "I;16"])
def test_images_of_any_mode_are_shown(mode):
    (image,) = shown_images(render.render(build([pictured(Image.new(mode, (9, 9)))])))
    assert image.size == (9, 9)


def test_images_are_bounded_in_all_and_what_is_left_out_is_said(monkeypatch):
    monkeypatch.setattr(gallery, "MAX_BYTES", 40_000)
    html = render.render(build([pictured(noise(80, 80, group), group=group) for group in range(3)]))
    summary, ((*_, last),) = contents(html)
    assert len(shown_images(html)) == 1 and "2 images are left out" in summary["table"]["note"]
    assert last["messages"][3]["parts"] == [{"width": 80, "height": 80, "image": None}]


def test_long_texts_many_parts_and_no_images_beside_them():
    dot = {"type": "image", "image": Image.new("L", (1, 1))}
    entry = pictured(text="x" * (episodes.MAX_TEXT + 50))
    entry.trajectory.messages[1]["content"] += [dot, {"type": "image", "image": None}] * 500
    old = {"type": "image", "image": {"width": 3, "height": "x"}}
    entry.trajectory.messages[3]["content"] = [old, {"type": "image"}]
    _, ((detail,),) = contents(render.render(build([entry])))
    shown = detail["messages"][1]
    assert shown["cut"] == 51 and shown["parts_cut"] == 1002 - episodes.MAX_PARTS
    assert shown["parts"][0] == "x" * episodes.MAX_TEXT and len(shown["parts"]) == episodes.MAX_PARTS - 1
    nothing = {"width": None, "height": None, "image": None}
    assert shown["parts"][2] == nothing and detail["messages"][3]["parts"] == [nothing | {"width": 3}, nothing]


def test_images_of_a_run_folder_are_shown_and_missing_ones_are_said(run_folder):
    with TrajectoryWriter(run_folder / "trajectories") as writer:
        for number, colour in enumerate(("red", "blue")):
            writer.append(pictured(Image.new("RGB", (8, 6), colour), group=number).trajectory, step=5)
    html = write_report(run_folder).read_text()
    assert [image.getpixel((0, 0)) for image in shown_images(html)] == [(255, 0, 0), (0, 0, 255)]
    next((run_folder / "trajectories" / "images").iterdir()).unlink()
    html = write_report(run_folder).read_text()
    summary, blocks = contents(html)
    assert len(shown_images(html)) == 1 and summary["table"]["count"] == 26
    assert "images of some episodes are missing" in summary["table"]["note"]
    parts = [d["messages"][3]["parts"][0] for d in blocks[0][24:] + blocks[1]]
    assert sorted(parts, key=str) == [{"width": 8, "height": 6, "image": n} for n in (0, None)]


def test_an_episode_shows_the_images_that_are_left(run_folder):
    with TrajectoryWriter(run_folder / "trajectories") as writer:
        writer.append(pictured(*(Image.new("RGB", (8, 6), c) for c in ("red", "blue"))).trajectory, step=5)
    files = {Image.open(path).getpixel((0, 0)): path for path in (run_folder / "trajectories" / "images").iterdir()}
    files[0, 0, 255].unlink()
    html = write_report(run_folder).read_text()
    assert [image.getpixel((0, 0)) for image in shown_images(html)] == [(255, 0, 0)]
    summary, blocks = contents(html)
    assert "images of some episodes are missing" in summary["table"]["note"]
    parts = blocks[-1][-1]["messages"][1]["parts"]
    assert [part["image"] for part in parts if isinstance(part, dict)] == [0, None]


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


def test_another_tokenizer_is_noticed():
    other = byte_bpe(merges=20)
    assert other.encode(QUESTION) != byte_bpe().encode(QUESTION)
    summary, _ = contents(render.render(build([episode()], tokenizer=other)))
    assert not summary["named"] and "not the run's" in summary["table"]["note"]
    assert all(re.fullmatch(r"⟨\d+⟩", t) for t in summary["tokens"])
    summary, _ = contents(render.render(build([episode()])))
    assert summary["named"] and summary["table"]["note"] == ""


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


@pytest.fixture
def run_folder(tmp_path):
    """A run as training leaves it: 4 steps of 2 groups of 3, with per-token columns."""
    run = tmp_path / "one"
    with TrajectoryWriter(run / "trajectories") as writer:
        for step in range(1, 5):
            for e in (episode(step, group, member) for group in range(2) for member in range(3)):
                writer.append(e.trajectory, e.columns, step=step)
    data = run_data()
    byte_bpe().save_pretrained(run / "model")
    (run / "config.json").write_text(json.dumps({**data.config, "model": "bundled"}))
    for name, records in (("metrics.jsonl", data.metrics), ("eval.jsonl", data.evals)):
        (run / name).write_text("".join(json.dumps(plain(r)) + "\n" for r in records))
    return run


def test_the_command_writes_one_file_of_a_run_folder(run_folder, capsys):
    assert main([str(run_folder)]) == 0
    file = run_folder / "report.html"
    assert capsys.readouterr().out.strip() == str(file)
    assert sorted(p.name for p in run_folder.iterdir()) == [
        "config.json", "eval.jsonl", "metrics.jsonl", "model", "report.html", "trajectories",
    ]  # fmt: skip
    summary, blocks = contents(file.read_text())
    assert summary["table"]["count"] == summary["table"]["total"] == 24
    assert summary["table"]["step"] == [s for s in range(1, 5) for _ in range(6)]
    assert {c["name"] for c in summary["columns"]} == {"logp", "mask", "version", "adv", "entropy"}
    assert len(blocks[0][0]["segments"][0]["columns"]["adv"]) == len(blocks[0][0]["segments"][0]["tokens"])
    assert all(not t.startswith("⟨") for t in summary["tokens"]), "the run's own tokenizer names its tokens"


def test_a_limit_keeps_whole_groups(run_folder, tmp_path):
    out = tmp_path / "small.html"
    assert main([str(run_folder), "--out", str(out), "--trajectories", "7"]) == 0
    summary, _ = contents(out.read_text())
    assert summary["table"]["step"] == [1, 1, 1, 4, 4, 4] and summary["table"]["member"] == [0, 1, 2] * 2
    assert summary["table"]["note"].startswith("6 of 24")


def test_a_torn_and_a_damaged_record_are_left_out_and_said(run_folder):
    data = run_folder / "trajectories" / "episodes.bin"
    raw = bytearray(data.read_bytes()[:-10])
    raw[300] ^= 0xFF
    data.write_bytes(raw)
    summary, _ = contents(write_report(run_folder).read_text())
    assert summary["table"]["count"] == 22
    assert "torn" in summary["table"]["note"] and "damaged" in summary["table"]["note"]


def test_what_is_no_run_is_named(tmp_path, run_folder):
    with pytest.raises(UsageError, match="no folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UsageError, match="not the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="cannot write"):
        write_report(run_folder, tmp_path / "missing" / "report.html")


@given(st.lists(st.integers(0, 12) | st.none(), max_size=60), st.integers(0, 70))
@settings(deadline=None)
def test_choice_is_of_whole_groups_within_the_limit(keys, limit):
    chosen = choose(keys, limit)
    assert chosen == sorted(set(chosen)) and len(chosen) <= limit
    groups = {keys[i] for i in chosen}
    assert None not in groups
    assert chosen == [i for i, key in enumerate(keys) if key in groups]
    named = [k for k in keys if k is not None]
    if len(named) <= limit:
        assert len(chosen) == len(named)
    if len(groups) > 1:
        assert {named[0], list(dict.fromkeys(named))[-1]} <= groups
