"""Stored episodes: round trip, size, torn tails, damage, growth; export as JSON lines."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agents import export
from agents.cli import UsageError
from agents.engines.base import SampleParams
from agents.ledger import Ledger
from agents.runfolder import RunFolder
from agents.store import DATA, INDEX, StoreError, TrajectoryReader, TrajectoryWriter, pack, unpack
from agents.stored_images import IMAGES
from agents.trajectory import Trajectory, TurnInfo
from envs import Verdict
from tests.tools.picture_tools import pattern


def episode(tokens: int = 600, turns: int = 6, seed: int = 0, vocabulary: int = 150_000) -> Trajectory:
    """An episode of so many tokens, half of them sampled, with text of the usual length."""
    rng = np.random.default_rng(seed)
    ledger, each = Ledger(), tokens // turns // 2
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        ledger.observe(rng.integers(0, vocabulary, each).tolist(), turn)
        logps = np.float32(-rng.exponential(size=each)).astype(float).tolist()
        ledger.act(rng.integers(0, vocabulary, each).tolist(), logps, turn, version=3)
        words = " ".join(f"word{i}" for i in rng.integers(0, 500, each // 2))
        messages += [{"role": "tool", "name": "f", "content": words}, {"role": "assistant", "content": words}]
    return Trajectory(
        task_id=f"q/{seed}", task_index=seed, split="train", level=2, group=seed, member=1, ledger=ledger,
        messages=messages, turns=[TurnInfo("text", 0.25, ("f", "?"), ("schema",), "length")] * turns,
        verdict=Verdict(1.0, {"correct": 1.0}, {"key": "Toruna", "calls": 3, "ok": True}), reward=1.0,
        stop_reason="answered", version=3, sampler=SampleParams(top_k=5), facts={"error": "none"},
    )  # fmt: skip


def same(a: Trajectory, b: Trajectory) -> None:
    assert (a.ledger is None) == (b.ledger is None)
    if a.ledger is not None and b.ledger is not None:
        assert a.ledger.segments == b.ledger.segments
    rest = [{k: v for k, v in t.__dict__.items() if k != "ledger"} for t in (a, b)]
    assert rest[0] == rest[1]


segments = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2**31), max_size=5),
        st.lists(st.tuples(st.integers(0, 70_000), st.floats(-100, 0, width=32)), max_size=5),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(parts=segments, text=st.text(max_size=30), reward=st.floats(-1, 1), known=st.booleans())
def test_round_trip(parts: list, text: str, reward: float, known: bool) -> None:
    ledger = Ledger()
    for turn, (seen, drawn) in enumerate(parts):
        (ledger.branch if turn == 2 else ledger.observe)(seen, turn)
        if ledger.segments[-1].ids:
            ledger.act([i for i, _ in drawn], [lp for _, lp in drawn], turn, turn)
        if turn == 1:
            ledger.observe([1, 2], turn, privileged=range(2))
    t = Trajectory(
        "id\x00\ud800", 1, "eval", 3, 4, 5, ledger=ledger if known else None, reward=reward,
        messages=[{"role": "user", "content": text}, {"role": "tool", "name": "\ud800", "content": ""}],
        verdict=Verdict(reward, {}, {}, "broken") if known else None, parent=2 if known else None,
    )  # fmt: skip
    columns = {"adv_BT": [np.linspace(-1, 1, len(s)) for s in ledger.segments]} if known else {}
    back = unpack(pack(t, columns, {"step": 7, "who": text}))
    same(back.trajectory, t)
    assert back.extra == {"step": 7, "who": text}
    for name, values in columns.items():
        for got, want in zip(back.columns[name], values, strict=True):
            assert np.array_equal(got, want.astype(np.float16))


@pytest.mark.parametrize("vocabulary", [1280, 150_000])
def test_600_tokens_take_at_most_6_kb(vocabulary: int, tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path) as writer:
        for seed in range(50):
            t = episode(seed=seed, vocabulary=vocabulary)
            assert t.ledger is not None and len(t.ledger) == 600
            writer.append(t, {"adv_BT": [np.ones(600)]}, step=seed)
    size = sum((tmp_path / name).stat().st_size for name in (DATA, INDEX)) / 50
    assert size <= 6 * 1024, size


def test_random_access_and_growth(tmp_path: Path) -> None:
    for start in (0, 3):
        with TrajectoryWriter(tmp_path) as writer:
            assert len(writer) == start
            for seed in range(start, start + 3):
                assert writer.append(episode(60, seed=seed), step=seed) == seed
            writer.flush()
            assert len(TrajectoryReader(tmp_path)) == start + 3
    reader = TrajectoryReader(tmp_path)
    for seed in (4, 0, 5, 2):
        same(reader[seed], episode(60, seed=seed))
    assert [s.extra["step"] for s in reader.records()] == list(range(6))
    assert [t.task_index for t in reader[1:3]] == [1, 2] and reader[-1].task_index == 5
    with pytest.raises(IndexError):
        reader[6]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    with TrajectoryWriter(tmp_path) as writer:
        for seed in range(3):
            writer.append(episode(60, seed=seed))
    return tmp_path


def test_a_torn_tail_is_left_out_counted_and_cut_off(three: Path) -> None:
    """Whatever number of bytes a killed writer left behind, whatever of them reached the index."""
    whole, index = (three / DATA).read_bytes(), (three / INDEX).read_bytes()
    second = int.from_bytes(index[16:24], "little")
    for size in (second + 1, second + 7, second + 8, second + 9, (second + len(whole)) // 2, len(whole) - 1):
        for kept in (index, index[:16], index[:19], b""):
            (three / DATA).write_bytes(whole[:size])
            (three / INDEX).write_bytes(kept)
            reader = TrajectoryReader(three)
            assert (len(reader), reader.dropped, reader.dropped_bytes) == (2, 1, size - second)
            same(reader[1], episode(60, seed=1))
            with TrajectoryWriter(three) as writer:
                assert writer.cut == size - second
                writer.append(episode(60, seed=9))
            assert [t.task_index for t in TrajectoryReader(three)] == [0, 1, 9]


def test_a_tail_of_zeros_or_an_unwritten_page_is_torn(three: Path) -> None:
    whole = (three / DATA).read_bytes()
    for damaged in (whole + bytes(100), whole[:-50] + bytes(50), whole + b"\xff" * 9):
        (three / DATA).write_bytes(damaged)
        reader = TrajectoryReader(three)
        assert reader.dropped == 1 and len(reader) in (2, 3)
        assert [t.task_index for t in reader] == list(range(len(reader)))


def test_files_cut_back_to_a_checkpoint_are_gone_on_with(three: Path) -> None:
    """A run that is rewound truncates both files to the sizes that it noted."""
    sizes = {name: (three / name).stat().st_size for name in (DATA, INDEX)}
    with TrajectoryWriter(three) as writer:
        writer.append(episode(60, seed=7))
    for name, size in sizes.items():
        os.truncate(three / name, size)
    assert [t.task_index for t in TrajectoryReader(three)] == [0, 1, 2]
    with TrajectoryWriter(three) as writer:
        assert (len(writer), writer.cut) == (3, 0)


def test_a_wrong_index_is_only_slower(three: Path) -> None:
    for index in (b"", b"\x00" * 24, os.urandom(40), (three / INDEX).read_bytes()[::-1]):
        (three / INDEX).write_bytes(index)
        assert [t.task_index for t in TrajectoryReader(three)] == [0, 1, 2]


def test_damage_in_the_middle_is_named(three: Path) -> None:
    data = bytearray((three / DATA).read_bytes())
    start = int.from_bytes((three / INDEX).read_bytes()[8:16], "little")
    data[start + 30] ^= 1
    (three / DATA).write_bytes(bytes(data))
    reader = TrajectoryReader(three)
    assert reader[0].task_index == 0 and reader[2].task_index == 2
    with pytest.raises(StoreError, match=r"record 1 of .* checksum"):
        reader[1]


@pytest.mark.parametrize("content", [b"", b"abc", b"PALT\x09\x00\x00\x00", b"\x80\x04N." * 9])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / DATA).write_bytes(content)
    with pytest.raises(StoreError, match=r"episodes\.bin"):
        TrajectoryReader(tmp_path)
    with pytest.raises(StoreError, match="no stored episodes"):
        TrajectoryReader(tmp_path / "nowhere")


def test_a_full_disk_leaves_a_readable_file(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TrajectoryWriter(three)
    real = writer._data

    class Full:
        def write(self, data: bytes) -> int:
            real.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    writer._data = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        writer.append(episode(60, seed=3))
    writer._data = real
    assert writer.append(episode(60, seed=4)) == 3
    writer.close()
    assert [t.task_index for t in TrajectoryReader(three)] == [0, 1, 2, 4]


def with_images(*images: Any, seed: int = 0) -> Trajectory:
    """An episode that shows images in its first message and in a tool's."""
    t = episode(60, seed=seed)
    parts = [{"type": "text", "text": "look"}, *({"type": "image", "image": image} for image in images)]
    t.messages = [{"role": "user", "content": parts}, *t.messages, {"role": "tool", "name": "f", "content": parts[:2]}]
    return t


def files(store: Path) -> list[str]:
    return sorted(path.name for path in (store / IMAGES).iterdir())


@settings(max_examples=40, deadline=None)
@given(modes=st.lists(st.sampled_from(["1", "L", "LA", "RGB", "RGBA", "I;16"]), min_size=1, max_size=4),
       width=st.integers(1, 40), height=st.integers(1, 40))  # fmt: skip
def test_images_come_back_equal_to_the_pixel(tmp_path_factory, modes, width, height) -> None:
    store = tmp_path_factory.mktemp("store")
    t = with_images(*(pattern(mode, width, height) for mode in modes))
    with TrajectoryWriter(store) as writer:
        writer.append(t)
    same(TrajectoryReader(store)[0], t)
    assert len(files(store)) == len(set(modes)) and all(name.endswith(".png") for name in files(store))


@pytest.mark.parametrize("mode", ["P", "PA", "La", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16B"])
def test_modes_that_png_lacks_come_back_as_what_they_show(mode: str, tmp_path: Path) -> None:
    image = pattern(mode)
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(with_images(image))
    back = TrajectoryReader(tmp_path)[0].messages[0]["content"][1]["image"]
    shown = image if mode != "La" else image.convert("LA")
    assert back.mode in ("RGB", "RGBA", "LA") and back.convert("RGB").tobytes() == shown.convert("RGB").tobytes()


def test_an_image_is_written_once_whoever_shows_it(tmp_path: Path) -> None:
    for step in range(2):
        with TrajectoryWriter(tmp_path) as writer:
            for member in range(4):
                noted = pattern("RGB")
                noted.info["comment"] = f"{step}{member}"  # notes are no pixels
                writer.append(with_images(noted, pattern("L"), seed=member))
        (tmp_path / IMAGES / files(tmp_path)[0]).touch()
        assert len(files(tmp_path)) == 2
    reader = TrajectoryReader(tmp_path)
    one, other = (reader[i].messages[0]["content"][1]["image"] for i in (0, 7))
    assert one == pattern("RGB") and type(one) is Image.Image and one == other
    kept = [t.messages for t in reader]
    assert kept[0][0]["content"][1]["image"] is kept[7][0]["content"][1]["image"]  # those who hold it share it
    before = {name: (tmp_path / IMAGES / name).stat().st_mtime_ns for name in files(tmp_path)}
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(with_images(pattern("L")))
    assert before == {name: (tmp_path / IMAGES / name).stat().st_mtime_ns for name in files(tmp_path)}


def test_without_images_a_reader_names_the_files(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(with_images(pattern("RGB")))
    reader = TrajectoryReader(tmp_path, images=False)
    part = reader[0].messages[0]["content"][1]
    assert part == {"type": "image", "image": {"png": files(tmp_path)[0][:-4], "width": 7, "height": 5}}
    assert reader.with_images(reader[0].messages)[0]["content"][1]["image"] == pattern("RGB")


def test_a_missing_or_damaged_image_is_named(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(with_images(pattern("RGB", 30, 30)))
        writer.append(episode(60, seed=1))
    (name,) = files(tmp_path)
    file = tmp_path / IMAGES / name
    whole = file.read_bytes()
    other = tmp_path / "other.png"
    pattern("L", 30, 30).save(other)
    for damaged in (whole[:-40], whole[:90] + b"\x00" * 9 + whole[99:], b"", b"GIF89a", other.read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=name):
            TrajectoryReader(tmp_path)[0]
    file.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        TrajectoryReader(tmp_path)[0]
    assert TrajectoryReader(tmp_path)[1].task_index == 1
    assert TrajectoryReader(tmp_path, images=False)[0].messages[0]["content"][1]["image"]["width"] == 30


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a" * 31, "A" * 32, "a" * 32 + "/..", 7, None, ""])
def test_names_that_no_image_has_are_refused(name: Any, tmp_path: Path) -> None:
    t = episode(60)
    t.messages = [{"role": "user", "content": [{"type": "image", "image": {"png": name, "width": 1, "height": 1}}]}]
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(t)
    with pytest.raises(StoreError, match="names no stored image"):
        TrajectoryReader(tmp_path)[0]


def test_a_store_of_old_that_kept_sizes_only_is_read(tmp_path: Path) -> None:
    t = with_images(pattern("RGB"))
    payload = pack(t, {}, {})  # what was written before there were image files
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(episode(60))
    with (tmp_path / DATA).open("ab") as data:
        data.write(len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little") + payload)
    back = TrajectoryReader(tmp_path)[1]
    assert back.messages[0]["content"][1] == {"type": "image", "image": {"width": 7, "height": 5}}
    assert not (tmp_path / IMAGES).exists()


def test_a_full_disk_leaves_no_half_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, file: Path, kind: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with TrajectoryWriter(tmp_path) as writer:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(Image.Image, "save", full)
            writer.append(with_images(pattern("RGB")))
        assert files(tmp_path) == [] and len(writer) == 0
        writer.append(with_images(pattern("RGB")))
    same(TrajectoryReader(tmp_path)[0], with_images(pattern("RGB")))


def test_a_run_that_is_rewound_loses_later_images_and_writes_them_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tmp_path, "x")
    store = run.path / "trajectories"
    early, late = with_images(pattern("RGB")), with_images(pattern("L"), seed=1)
    with TrajectoryWriter(store) as writer:
        writer.append(early)
    mark, kept = run.mark(), files(store)
    for _ in range(2):
        with TrajectoryWriter(store) as writer:
            writer.append(late)
        assert len(files(store)) == 2
        same(TrajectoryReader(store)[1], late)
        run.rewind(mark)
        assert files(store) == kept
        same(TrajectoryReader(store)[0], early)
    run.close()


def test_columns_must_fit() -> None:
    with pytest.raises(ValueError, match="column adv has 3 entries for a segment of 60"):
        pack(episode(60), {"adv": [[1, 2, 3]]}, {})
    with pytest.raises(ValueError, match="column adv has 2 segments, the episode 1"):
        pack(episode(60), {"adv": [[], []]}, {})


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrajectoryWriter(tmp_path / "trajectories") as writer:
        t = episode(60, vocabulary=50)
        writer.append(t, {"adv_BT": [np.full(60, np.inf)]}, step=4)
    assert export.main([str(tmp_path)]) == 0
    [line] = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert line["messages"] == t.messages and line["step"] == 4 and line["verdict"]["scores"] == {"correct": 1.0}
    assert line["segments"][0]["ids"] == t.ledger.concat() and line["segments"][0]["adv_BT"] == [None] * 60
    out = tmp_path / "out.jsonl"
    assert export.main([str(tmp_path / "trajectories"), "--out", str(out), "--no-tokens"]) == 0
    assert "segments" not in json.loads(out.read_text())
    with pytest.raises(UsageError, match="no stored episodes"):
        export.main([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="cannot write"):
        export.main([str(tmp_path), "--out", str(tmp_path / "no" / "such")])


def test_export_names_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrajectoryWriter(tmp_path / "trajectories") as writer:
        writer.append(with_images(pattern("RGB")))
    assert export.main([str(tmp_path)]) == 0
    image = json.loads(capsys.readouterr().out)["messages"][0]["content"][1]["image"]
    with Image.open(tmp_path / "trajectories" / IMAGES / f"{image['png']}.png") as file:
        assert file.size == (image["width"], image["height"]) == (7, 5) and file.tobytes() == pattern("RGB").tobytes()
