"""What rollouts one iteration ahead save: seconds per iteration of the bundled model, in each way that there is.

    python -m tests.benchmarks.ahead [--env tool_qa] [--groups 16] [--group-size 8] [--iterations 8]

play, then learn      one process; the reference
thread                a copy of the model plays in a thread of the process that learns
process               `--ahead.on`: a copy of the model plays in a process of its own
2 processes           `--processes 2`: both play, then both learn; no token is behind

The median over the iterations after the first two; `waited` is what is left of the rollout when the update is over.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from agents.ahead import Ahead, InThread
from agents.config import AheadConfig, EvalConfig, SaveConfig, TrainConfig
from agents.display import Silent
from agents.dist import World
from agents.engines.hf import HFEngine
from agents.engines.reference import plain_log_probs
from agents.session import build
from agents.sync import WeightSync, probe_ids
from agents.trainer import Trainer

SKIPPED = 2
"""Iterations that caches and the other process need to get going."""


class OwnWeights(HFEngine):
    """The engine over a copy of the model."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(copy.deepcopy(model), **options)

    def deliver(self, model: Any, version: int) -> None:
        """Copy the weights."""
        self.model.load_state_dict(model.state_dict())
        self.version = version
        self.reset()

    def log_probs(self, ids: Any, pictures: Any = ()) -> list[float]:
        """By a plain forward of the copy."""
        return plain_log_probs(self.model, ids, pictures=pictures).tolist()


def configured(args: argparse.Namespace, **changes: Any) -> TrainConfig:
    """A run of a few iterations without evaluations worth the name."""
    return TrainConfig(
        env=args.env, steps=args.iterations + SKIPPED, groups=args.groups, group_size=args.group_size,
        eval=EvalConfig(episodes=1, hard_episodes=0), save=SaveConfig(trajectories=0), processes=1, **changes,
    )  # fmt: skip


def alone(args: argparse.Namespace, ahead: bool, thread: bool) -> list[dict[str, Any]]:
    """The iterations' numbers of a run of one process."""
    trainer = Trainer(build(configured(args, ahead=AheadConfig(on=ahead)), World()), None, Silent())
    s = trainer.session
    if thread:
        old = s.player.engine
        how = {name: getattr(old, name) for name in ("stop_ids", "banned_ids", "params", "rows", "max_context")}
        s.player.engine = OwnWeights(s.model, **how)
        s.player.sync = WeightSync(s.player.engine, s.model, s.world, probe_ids(old.vocab_size, 40), 1e-3)
        s.actor.ahead = Ahead(s.player, InThread())
    play, spent = s.actor.play, []

    def timed(jobs: Any) -> Any:
        began = time.monotonic()
        b = play(jobs)
        spent.append(time.monotonic() - began)
        return b

    s.actor.play = timed
    trainer.run()
    if not ahead:
        print(f"rollout {median(spent[SKIPPED:]):.2f} s of it; no overlap does better than the longer of both parts")
    return trainer.history


def together(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same of a run of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        subprocess.run(
            [sys.executable, "-m", "agents.train", "--env", args.env, "--steps", str(args.iterations + SKIPPED),
             "--groups", str(args.groups), "--group-size", str(args.group_size), "--processes", "2",
             "--eval.episodes", "1", "--eval.hard-episodes", "0", "--save.trajectories", "0", "--run", str(run)],
            check=True, capture_output=True,
        )  # fmt: skip
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="tool_qa")
    for name, default in (("--groups", 16), ("--group-size", 8), ("--iterations", 8)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    ways = {
        "play, then learn": lambda: alone(args, False, False),
        "thread": lambda: alone(args, True, True),
        "process": lambda: alone(args, True, False),
        "2 processes": lambda: together(args),
    }
    found: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        rows = way()[SKIPPED:]
        found[name] = {
            "seconds": median(row["seconds"] for row in rows),
            "waited": median(row.get("wait_seconds", 0.0) for row in rows),
            "length": sum(row["length"] for row in rows) / len(rows),
        }
        line, share = found[name], found[name]["seconds"] / found["play, then learn"]["seconds"]
        print(f"{name:18} {line['seconds']:6.2f} s  {share:5.2f}  waited {line['waited']:5.2f} s", flush=True)
    where = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"ways": found, **where, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
