"""Environment workers: the same episodes as in process, and every loss an outcome that is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import envs
from agents.cli import UsageError
from agents.config import WorkerConfig
from agents.engines.base import Said
from agents.engines.scripted import Scripted, UnknownScript
from agents.evaluate import TextPlayer, evaluate
from agents.rollout import EnvPool, Limits, play, play_text
from agents.trajectory import Trajectory
from agents.workers.errors import WorkerDied, WorkersBroken
from agents.workers.pool import WorkerPool, start_workers
from agents.workers.wire import decode, encode
from policy_opt.protocols import Job
from tests.agents.faulty import Faulty, Shouting
from tests.agents.test_rollout import jobs, setup
from tests.agents.test_unfinished import in_windows
from tests.envs.spot import Spot
from tests.tools.picture_tools import pattern
from tools.processes import family, resident_bytes

ROOT = Path(__file__).resolve().parents[2]
FAULTY = "tests.agents.faulty:Faulty"
LIMITS = Limits(max_new_tokens=6, max_context=400, error_reward=-1.0)


class Talker:
    """Says the same at every turn."""

    def begin(self, env: Any, seed: Any) -> Any:
        return lambda messages, obs, most: Said("on")


@pytest.fixture
def start():
    """`start_workers`, and the end of all that were started."""
    pools: list[WorkerPool] = []

    def begin(spec: str, count: int = 1, config: WorkerConfig | None = None, **arguments: Any) -> WorkerPool:
        pools.append(start_workers(spec, arguments, count, config or WorkerConfig()))
        return pools[-1]

    yield begin
    for pool in pools:
        pool.close()


def plain(t: Trajectory) -> dict[str, Any]:
    """All of a trajectory, comparable."""
    ledger = None if t.ledger is None else [asdict(s) for s in t.ledger.segments]
    return {**{k: v for k, v in vars(t).items() if k != "ledger"}, "ledger": ledger}


def talk(make: Any, n: int = 6, threads: int | None = None) -> list[Trajectory]:
    return play_text([Job(i, i, 0) for i in range(n)], make, Talker(), LIMITS, 0, threads=threads)


def pids(pool: WorkerPool) -> list[int]:
    return [worker.connection.process.pid for worker in pool._workers]  # type: ignore[attr-defined]


def gone(pid: int) -> bool:
    """Whether a process has ended (one that its parent has not looked after counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def running(mark: bytes) -> list[Path]:
    """Processes whose command lines hold `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path] if mark in path.read_bytes() else []
        except OSError:  # it has just ended
            continue
    return found


def soon(what: Any, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(what())


# ---------------------------------------------------------------------------------------- the same as in process


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.full), 3])
def test_trajectories_are_those_of_environments_in_process(start, count: int) -> None:
    """Bit for bit, tokens and log-probs included; with raising environments among them; whoever plays."""
    arguments = {"what": "raise", "on": [2]}
    pool, make = start(FAULTY, count, **arguments), lambda: Faulty(**arguments)  # type: ignore[arg-type]
    chat, engine = setup()
    todo = jobs(5)
    want = [plain(t) for t in play(todo, make, chat, engine, LIMITS, 5)]
    assert [plain(t) for t in play(todo, pool, chat, engine, LIMITS, 5)] == want
    assert [plain(t) for t in play(todo, pool, chat, engine, LIMITS, 5, threads=0)] == want
    assert [t["stop_reason"] for t in want] == ["answered"] * 4 + ["error:KeyError"] * 2 + ["answered"] * 4
    assert want[4]["facts"] == {"error": "'as told'"}
    assert [plain(t) for t in talk(pool)] == [plain(t) for t in talk(make)]
    assert not pool.losses


def test_scripts_tools_and_levels_of_a_built_in_environment(start) -> None:
    pool, make = start("tool_qa", 2, profile="tiny"), lambda: envs.make("tool_qa", profile="tiny")
    for script in ("oracle", "random"):
        for options in ({}, {"level": "hard"}):
            here, there = (
                play_text(jobs(4), m, Scripted(script), Limits(), 3, options=options) for m in (make, pool)
            )
            assert [plain(t) for t in here] == [plain(t) for t in there]
    demos = [play_text(jobs(4), m, Scripted(make().demonstrators), Limits(), 3) for m in (make, pool)]
    assert [plain(t) for t in demos[0]] == [plain(t) for t in demos[1]]
    here, there = (evaluate(TextPlayer(m, Scripted("random"), Limits()), "tool_qa", episodes=9) for m in (make, pool))
    assert replace(here, seconds=0) == replace(there, seconds=0)
    one, other = make(), pool()
    assert (other.splits, other.lowest_reward, other.name) == (one.splits, one.lowest_reward, one.name)
    assert [other.task_count(s) for s in other.splits] == [one.task_count(s) for s in one.splits]
    assert other.call_format is one.call_format and other.unwrapped is other and other.privileged is None
    for env in (one, other):
        with pytest.raises(UnknownScript, match="did you mean `oracle`"):
            Scripted("oracel").begin(env, (0, 0, 0))
        with pytest.raises(ValueError, match="hardd"):
            env.reset(options={"level": "hardd"})
    a, b = one.reset(seed=3)[0], other.reset(seed=3)[0]
    assert a == b and type(a["tools"]) is type(b["tools"])
    assert other.step("hm")[0]["tools"] is b["tools"]  # who formats tools may remember by identity


def test_hints_and_call_formats_of_an_environment_of_ones_own(start) -> None:
    """A hint that costs a worker is none, and counted; the next one is to be had."""
    env = start("tests.agents.faulty:Hinting", 1, what="kill", on=[7])()
    assert env.call_format == Shouting(mark="?") and env.call_format.parse("SO?").calls
    assert [env.privileged(i, "hint", 2) for i in (3, 7, 4)] == ["hint 2 of 3", None, "hint 2 of 4"]
    assert env.worker.losses == {"WorkerDied": 1}


def test_episodes_that_a_token_budget_cuts_go_on_in_their_worker(start) -> None:
    pool = start(FAULTY, 2)
    for window in (3, 7):
        here, there = (in_windows(window, make=make) for make in (Faulty, pool))
        assert here[0] == there[0] and [plain(t) for t in here[1]] == [plain(t) for t in there[1]]


def test_nothing_but_plain_data_travels() -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for value in (
        [1, 2.5, float("inf"), None, True, "x\ud800\u2028", 10**30], {"a": (1, (2,))}, {1: {"$": "tuple", "v": 3}},
        {("a", 1): b"\x00\xff"}, [], (), {"$": 1},
    ):  # fmt: skip
        assert decode(encode(value)) == value and repr(decode(encode(value))) == repr(value)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    back, seen = decode(encode([array, picture]))
    assert back.dtype == array.dtype and (back == array).all() and seen.mode == "RGB"
    assert seen.tobytes() == picture.tobytes() and encode(np.float64(0.1)) == encode(0.1)
    for value in (object(), {1, 2}, len, np.array([object()])):
        with pytest.raises(TypeError, match="cannot leave"):
            encode([value])
    for text in (b"{", b"[" * 100_000, b'{"$":"array","type":"O","shape":[1],"v":""}', b'{"$":"pickle","v":""}',
                 b'{"$":"image","mode":"RGB","size":[9],"v":""}', b'{"$":"bytes","v":"*"}', b"\xff",
                 b'{"$":"image","mode":"P","size":[1,1],"v":"AA=="}'):  # fmt: skip
        with pytest.raises(ValueError):
            decode(text)


MODES = ["1", "L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode_arrive_equal_to_the_pixel(mode: str) -> None:
    picture = pattern(mode, 9, 4)
    assert decode(encode({"a": (picture,)})) == {"a": (picture,)}


def test_pictures_with_a_palette_arrive_in_their_colours() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([1, 2, 3, 4, 5, 6])
    picture.putdata([0, 1])
    seen = decode(encode(picture))
    assert seen.mode == "RGBA" and seen.tobytes() == bytes([1, 2, 3, 255, 4, 5, 6, 255])


def test_no_picture_makes_this_process_take_more_memory_than_pictures_may() -> None:
    assert decode(encode(Image.new("1", (4000, 4000)))).size == (4000, 4000)
    with pytest.raises(ValueError, match="4001 x 4000 pixels cannot leave"):
        encode(Image.new("1", (4001, 4000)))
    for size in ("[1000000,1000000]", "[-1,5]", "[1e9,1e9]", "[Infinity,1]", '["9","9"]', "[true,1]", "{}", "[1,1,1]"):
        with pytest.raises(ValueError):
            decode(f'{{"$":"image","mode":"L","size":{size},"v":""}}'.encode())


def test_an_environment_with_images_plays_the_same_in_workers(start) -> None:
    """Openings and tool results, to the pixel; an evaluation counts the same."""
    pool = start("tests.envs.spot:Spot", 2)
    for script in ("oracle", "random"):
        here, there = ([plain(t) for t in play_text(jobs(5), m, Scripted(script), Limits(), 3)] for m in (Spot, pool))
        assert here == there
    shown = [part for t in there for m in t["messages"] if isinstance(m["content"], list) for part in m["content"]]
    assert {part["image"].size for part in shown if part["type"] == "image"} == {(56, 56), (28, 28)}
    found = evaluate(TextPlayer(pool, Scripted("oracle"), Limits()), "spot", episodes=8)
    assert found.success.mean == 1.0 and found.tool_calls.mean == 1.0 and not pool.losses


# ---------------------------------------------------------------------------------------- losses are outcomes


@pytest.mark.parametrize(("what", "reason"), [
    ("kill", "error:WorkerDied its worker was killed by SIGKILL (out of memory?)"),
    pytest.param("crash", "error:WorkerDied its worker was killed by SIGSEGV", marks=pytest.mark.full),
    pytest.param("exit", "error:WorkerDied its worker ended with exit code 3", marks=pytest.mark.full),
])  # fmt: skip
def test_a_worker_that_dies_costs_the_episodes_that_it_held(start, what: str, reason: str) -> None:
    """The others go on, the next ones find a new worker, and the evaluation counts the lost ones by cause."""
    pool = start(FAULTY, 1, what=what, on=[1])
    chat, engine = setup()
    todo = [Job(i, i, 0) for i in range(8)]  # four at once, in one worker: the first four start together
    played = play(todo, pool, chat, engine, LIMITS, 5)
    lost = [t for t in played if t.stop_reason == "error:WorkerDied"]
    assert played[1] in lost and all(t.verdict is None and t.reward == -1.0 for t in lost)
    assert {t.stop_reason for t in played if t not in lost} == {"answered"} and 1 <= len(lost) <= 4
    assert pool.losses == {"WorkerDied": 1} and pool.news() and not pool.news()
    assert talk(pool, 1)[0].stop_reason == "answered"
    result = evaluate(TextPlayer(pool, Talker(), LIMITS), FAULTY, episodes=4, split="train")
    assert result.failures == {reason: 1} and result.marked and result.stop_reasons["answered"] == 3


def test_a_worker_that_hangs_is_ended_and_counted(start) -> None:
    pool = start(FAULTY, 1, WorkerConfig(timeout_s=1.5), what="hang", on=[1, 4])
    first = pids(pool)
    played = talk(pool, threads=1)
    assert [t.stop_reason for t in played] == ["answered", "error:WorkerTimeout", *["answered"] * 2,
                                               "error:WorkerTimeout", "answered"]  # fmt: skip
    assert played[1].facts["error"] == "no answer within 1.5 s"
    assert pool.losses == {"WorkerTimeout": 2} and gone(first[0])
    assert pool.news() == ["environment workers lost: 2 x WorkerTimeout"]


@pytest.mark.parametrize("what", ["gorge", pytest.param("graze", marks=pytest.mark.full), "feed"])
def test_memory_has_a_ceiling(start, what: str) -> None:
    """At once where one allocation is too large, within a second where it grows, or grows in a child."""
    pool = start(FAULTY, 1, WorkerConfig(memory_gib=0.4), what=what, on=[1])
    assert [t.stop_reason for t in talk(pool, 4, threads=1)] == [
        "answered", "error:WorkerMemory", "answered", "answered"]  # fmt: skip
    assert resident_bytes(pids(pool)[0]) < 0.4 * 2**30
    assert pool.losses == ({"WorkerMemory": 1} if what == "feed" else pool.losses)
    assert soon(lambda: not running(b"(250 << 20)"))


def test_an_exit_or_an_unreadable_message_costs_one_episode(start) -> None:
    for what, reason in (
        ("leave", "error:SystemExit"), ("object", "error:TypeError"), ("poster", "error:ValueError"),
    ):  # fmt: skip
        pool = start(FAULTY, 1, what=what, on=[1])
        assert [t.stop_reason for t in talk(pool, 3, threads=1)] == ["answered", reason, "answered"]
        assert not pool.losses


def test_idle_and_unfinished_environments_survive_or_are_missed(start) -> None:
    """A worker that ends between episodes costs none, be it found dead before or by the next reset; an episode in
    mid-course is missed by name."""
    pool = start(FAULTY, 2)
    waiting = EnvPool(pool)
    env, other = waiting.take(), waiting.take()
    want, _ = env.reset(seed=1)
    other.reset(seed=1)
    waiting.give(other, broken=False)
    for pid in pids(pool):
        os.kill(pid, signal.SIGKILL)
    assert waiting.take() is other and other.reset(seed=1)[0] == want
    with pytest.raises(WorkerDied, match=r"another episode|killed by SIGKILL"):
        env.step("on")
    assert env.reset(seed=1)[0] == want and env.step("on")[0]["messages"][0]["content"] == "result 0"
    assert pool.losses == {"WorkerDied": 2}


def test_a_reset_that_ends_its_worker_is_tried_twice(start) -> None:
    pool = start(FAULTY, 1, what="kill", on=[1], at="reset")
    assert [t.stop_reason for t in talk(pool, 3, threads=1)] == ["answered", "error:WorkerDied", "answered"]
    assert pool.losses == {"WorkerDied": 2}


# ---------------------------------------------------------------------------------------- at the start, at the end


@pytest.mark.parametrize(("spec", "arguments", "words"), [
    ("tool_qq", {}, "did you mean 'tool_qa'"),
    ("tool_qa", {"levle": 2}, "did you mean 'level'"),
    ("tests.agents.faulty:Faultty", {}, "did you mean 'Faulty'"),
    (FAULTY, {"what": "file", "at": "make"}, "/no/such/file"),
    (FAULTY, {"on": {1}}, "a set cannot"),
])  # fmt: skip
def test_mistakes_show_when_the_run_is_built(start, spec: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        start(spec, 1, **arguments)


def test_a_worker_that_never_starts_is_one_clear_error(start) -> None:
    with pytest.raises(WorkersBroken, match="did not start, 3 times in a row") as stop:
        start(FAULTY, 1, what="exit", at="make")
    assert FAULTY in str(stop.value) and "exit code 3" in str(stop.value)
    assert "these are my last words" in str(stop.value)


@pytest.mark.full
def test_when_no_worker_can_start_any_more_the_run_stops(start, tmp_path, monkeypatch) -> None:
    """Not an episode after the other, each with three vain starts."""
    (tmp_path / "fleeting.py").write_text("from tests.agents.faulty import Faulty\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = start("fleeting:Faulty", 2, what="kill", on=[1])
    (tmp_path / "fleeting.py").write_text("import os\nos._exit(9)\n")
    with pytest.raises(WorkersBroken, match=r"fleeting:Faulty: no environment worker is left(.|\n)*exit code 9"):
        play_text([Job(i % 2, i, 0) for i in range(9)], pool, Talker(), LIMITS, 0)
    assert set(pool.losses) == {"WorkerDied"} and all(worker.broken for worker in pool._workers)


def test_plugins_work_by_name_and_by_class(start, tmp_path, monkeypatch) -> None:
    """An entry point of an installed distribution, and a module on the path: resolved in the worker."""
    (tmp_path / "kites.py").write_text(
        "from tests.agents.faulty import Faulty\n\n\nclass Kites(Faulty):\n    name = 'kites'\n"
    )
    info = tmp_path / "kites-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kites\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[palaestra.envs]\nkites = kites:Kites\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in ("kites", "kites:Kites"):
        assert [t.task_id for t in talk(start(spec, 1), 2)] == ["kites/train/0", "kites/train/1"]
    assert "kites" not in sys.modules  # this process never loaded it


OWNER = """
import sys, time
from agents.config import WorkerConfig
from agents.workers.pool import start_workers
pool = start_workers("tests.agents.faulty:Faulty", {"what": "hang", "on": [1]}, 2, WorkerConfig())
for worker in pool._workers:
    worker.facts() if not worker._up else None
print(*[w.connection.process.pid for w in pool._workers], flush=True)
if sys.argv[1] == "hang":
    env = pool()
    env.reset(options={"index": 1})
    env.step("on")
    print("now", flush=True)
    env.step("on")
if sys.argv[1] == "wait":
    time.sleep(3600)
if sys.argv[1] == "raise":
    raise SystemError("as told")
"""


FULL = [pytest.param(how, marks=pytest.mark.full) for how in ("return", "raise", "wait")]


@pytest.mark.parametrize("how", [*FULL, "hang"])
def test_workers_end_with_their_process(how: str) -> None:
    """When it returns, raises, is killed while they are idle, or while one of them hangs."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, how], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdout is not None
    workers = list(map(int, owner.stdout.readline().split()))
    assert len(workers) == 2
    if how in ("wait", "hang"):
        assert how == "wait" or owner.stdout.readline() == "now\n"
        assert set(workers) <= set(family(owner.pid))
        owner.kill()
    owner.wait(30)
    owner.stdout.close()
    assert soon(lambda: all(map(gone, workers)))
