"""Environment workers against environments in process. Prints two tables, then JSON; exit 1 on a miss.

    python -m tests.benchmarks.workers [--workers 2] [--ms 5] [--episodes 64] [--steps 3000] [--repeats 3]

    speed       a rollout in an environment whose turns cost so many milliseconds of CPU each: in process, and in
                workers. The bound is the smaller of workers and cores; at least 0.8 of what the machine gives just now,
                which is measured beside it: as many busy processes side by side against one.
    round trip  a step that does nothing: in process; in a worker; and the floor under it, the same bytes there and
                back between two processes that do nothing else. At most 8 x the floor. Beside it what a step of OpenEnv
                takes over its WebSocket, 380 µs on a machine of this kind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.config import WorkerConfig
from agents.engines.base import Said
from agents.rollout import Limits, play_text
from agents.workers.pool import start_workers
from agents.workers.wire import encode
from policy_opt.protocols import Job
from tests.agents.faulty import Busy

SPEC = "tests.agents.faulty:Busy"
SHARE, TIMES, OPENENV_US = 0.8, 8.0, 380.0


class Talker:
    """Says the same at every turn."""

    def begin(self, env: Any, seed: Any) -> Any:
        return lambda messages, obs, most: Said("on")


def rollout(make: Callable[[], Any], episodes: int) -> float:
    """Seconds of so many episodes of three turns."""
    began = time.perf_counter()
    played = play_text([Job(i, i, 0) for i in range(episodes)], make, Talker(), Limits(), 0)
    assert {t.stop_reason for t in played} == {"answered"} and sum(len(t.turns) for t in played) == 3 * episodes
    return time.perf_counter() - began


BURN = "import time\nwhile time.process_time() < 0.5: pass"


def cores(n: int) -> float:
    """How many of `n` processes the machine runs at full speed just now."""
    seconds = {1: float("inf"), n: float("inf")}
    for _ in range(3):
        for count in seconds:
            began = time.perf_counter()
            for process in [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]:
                process.wait()
            seconds[count] = min(seconds[count], time.perf_counter() - began)
    return n * seconds[1] / seconds[n]


def speed(workers: int, ms: float, episodes: int, repeats: int) -> dict[str, float]:
    """Seconds in process and in workers, best of the repeats, in turn."""
    pool = start_workers(SPEC, {"ms": ms}, workers, WorkerConfig())
    try:
        rollout(pool, 2 * workers)
        both = [(rollout(lambda: Busy(ms=ms), episodes), rollout(pool, episodes)) for _ in range(repeats)]
    finally:
        pool.close()
    here, there = (min(seconds) for seconds in zip(*both, strict=True))
    bound, free = min(workers, os.cpu_count() or 1), cores(workers)
    return {"in_process_s": here, "workers_s": there, "speedup": here / there, "bound": bound, "cores_free": free}


def microseconds(step: Callable[[], Any], steps: int) -> float:
    """The best stretch of 20 calls, per call: what others on the machine cost is no part of it."""
    stretches = []
    for _ in range(max(1, steps // 20)):
        began = time.perf_counter()
        for _ in range(20):
            step()
        stretches.append((time.perf_counter() - began) / 20 * 1e6)
    return min(stretches)


ECHO = """
import socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
while data := end.recv(65536):
    end.sendall(b"x" * int(sys.argv[2]))
"""


def floor(sent: int, answered: int, steps: int) -> float:
    """Microseconds of bytes there and back between two processes over a pair of sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", ECHO, str(theirs.fileno()), str(answered)], pass_fds=[theirs.fileno()]
        )
        theirs.close()

        def there_and_back() -> None:
            ours.sendall(b"x" * sent)
            left = answered
            while left:
                left -= len(ours.recv(65536))

        there_and_back()
        found = microseconds(there_and_back, steps)
        ours.close()
        child.wait()
    return found


def round_trip(steps: int) -> dict[str, float]:
    """Microseconds per step that does nothing, in process, in a worker, and at least."""
    pool = start_workers(SPEC, {"ms": 0.0, "talks": True}, 1, WorkerConfig())
    here, there = Busy(ms=0.0, talks=True), pool()
    try:
        for env in (here, there):
            env.reset(seed=0)
        reply = there.worker.call("step", there._number, "on")
        sizes = len(encode(["step", 0, ["on"], []])) + 4, len(encode({"ok": reply})) + 4
        return {
            "in_process_us": microseconds(lambda: here.step("on"), steps),
            "worker_us": microseconds(lambda: there.step("on"), steps),
            "floor_us": floor(*sizes, steps), "bytes": sum(sizes),
        }  # fmt: skip
    finally:
        pool.close()


def main() -> int:
    """Print both tables and one line of JSON; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ms", type=float, default=5.0)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    console = Console()
    fast = speed(args.workers, args.ms, args.episodes, args.repeats)
    table = Table("", "s", "x", "bound", "cores free", title=f"{3 * args.episodes} turns of {args.ms:g} ms", box=None)
    table.add_row("in process", f"{fast['in_process_s']:.2f}", "1")
    table.add_row(
        f"{args.workers} workers", f"{fast['workers_s']:.2f}", f"{fast['speedup']:.2f}", f"{fast['bound']:.2f}",
        f"{fast['cores_free']:.2f}",
    )  # fmt: skip
    console.print(table)
    trip = round_trip(args.steps)
    floor_us, worker_us = trip["floor_us"], trip["worker_us"]
    table = Table("", "µs a step", "x floor", title=f"a step that does nothing, {trip['bytes']} bytes", box=None)
    table.add_row("in process", f"{trip['in_process_us']:.1f}", "")
    table.add_row("floor: the same bytes there and back", f"{floor_us:.1f}", "1")
    table.add_row("in a worker", f"{worker_us:.1f}", f"{worker_us / floor_us:.2f}")
    table.add_row("OpenEnv's WebSocket", f"{OPENENV_US:.0f}", f"{OPENENV_US / floor_us:.2f}")
    console.print(table)
    holds = worker_us <= TIMES * floor_us and fast["speedup"] >= SHARE * min(fast["bound"], fast["cores_free"])
    console.print("both bounds hold" if holds else "[red]a bound does not hold[/]")
    about = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({"benchmark": "workers", **about, "load": os.getloadavg()[0], **fast, **trip, "holds": holds}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
