"""Resume is exact: k iterations, a stop of any kind, a resume and k more equal 2k, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents import checkpoint, cli, train
from agents.cli import UsageError
from agents.config import EvalConfig, SaveConfig, WarmConfig
from agents.display import Silent
from agents.dist import World
from agents.runfolder import RunFolder
from agents.session import build
from agents.trainer import Interrupted, Trainer
from tests.agents.letters import SHAPED
from tests.agents.test_train import WARM, model_folder, own_cache, small, start  # noqa: F401  (fixtures)

CLOCKS = {"seconds", "tokens_per_second", "wait_seconds", "sync_seconds"}
"""What the clock decides."""


def final(run: Path) -> dict:
    return checkpoint.load(checkpoint.latest(run / "checkpoints")).state


def same(a, b, where="state"):
    """Bit for bit, with the place of the first difference."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def assert_same_run(one: Path, two: Path):
    a, b = final(one), final(two)
    for state in (a, b):
        state.pop("files")
    same(a, b)
    lines = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    same(*[[{k: v for k, v in m.items() if k not in CLOCKS} for m in run] for run in lines])
    evals = [[json.loads(x) for x in (run / "eval.jsonl").read_text().splitlines()] for run in (one, two)]
    same(*[[{k: v for k, v in e.items() if k not in CLOCKS} for e in run] for run in evals])


def resume(config, path: Path) -> Trainer:
    folder = RunFolder.open(path)
    trainer = Trainer(build(config, World()), folder, Silent())
    trainer.restore(checkpoint.latest(path / "checkpoints"))
    return trainer


def interrupt(begun: Trainer) -> None:
    """Run until the end comes: after the third iteration, beyond the checkpoint of the second."""
    iterate = begun.iterate

    def stop_late():
        iterate()
        if begun.session.loop.step == 3:
            begun.folder.log("metrics.jsonl", {"step": "beyond the checkpoint"})
            raise KeyboardInterrupt

    begun.iterate = stop_late
    with pytest.raises(KeyboardInterrupt):
        begun.run()
    begun.folder.close()


@pytest.mark.parametrize("algo", ["grpo", "ppo", "dapo", "otc_grpo"])
def test_resume_equals_going_on(model_folder, tmp_path, algo):  # noqa: F811
    config = small(
        model_folder, algo=algo, steps=4, warm=WARM if algo == "dapo" else WarmConfig(when="never"),
        eval=EvalConfig(episodes=6, hard_episodes=0, every=1, every_episodes=4), save=SaveConfig(every=2, keep=9),
    )  # fmt: skip
    start(config, tmp_path / "whole").run()
    begun = start(config, tmp_path / "halved")
    interrupt(begun)
    assert checkpoint.steps(tmp_path / "halved" / "checkpoints") == [0, 2]
    resume(config, tmp_path / "halved").run()
    assert_same_run(tmp_path / "whole", tmp_path / "halved")
    assert max(m["grad_norm"] for m in begun.history) > 0, "nothing was learnt, so nothing was tested"


def test_a_signal_leaves_a_checkpoint_of_this_very_step(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, steps=4, save=SaveConfig(every=100, keep=2))
    start(config, tmp_path / "whole").run()
    begun = start(config, tmp_path / "halved")
    iterate = begun.iterate

    def with_signal():
        if begun.session.loop.step == 2:
            signal.raise_signal(signal.SIGTERM)
        iterate()

    begun.iterate = with_signal
    with pytest.raises(Interrupted) as stop:
        begun.run()
    assert stop.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint.steps(tmp_path / "halved" / "checkpoints") == [0, 3]
    begun.folder.close()
    resume(config, tmp_path / "halved").run()
    assert_same_run(tmp_path / "whole", tmp_path / "halved")


def arguments(model, run: Path, *more: str) -> list[str]:
    return [
        "--env", SHAPED, "--model", model, "--run", str(run), "--steps", "6", "--groups", "2", "--group-size", "3",
        "--train-tasks", "8", "--eval.episodes", "4", "--rollout.max-new-tokens", "3", "--warm.when", "never",
        "--save.every", "1", "--optim.lr", "0.01", *more,
    ]  # fmt: skip


def forked(argv: list[str], log: Path) -> int:
    """The command in a process of its own, forked so that nothing has to be imported again; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stderr = os.fdopen(os.dup(handle), "w", buffering=1)
        sys.argv = ["train", *argv]
        cli.run(train.main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """Exit code of a process, negative for a signal; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def newest(run: Path) -> int:
    return (checkpoint.steps(run / "checkpoints") or [-1])[-1]


def finish(pid: int, log: Path, seconds: float = 120) -> int:
    end = time.monotonic() + seconds
    while (code := ended(pid)) is None:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)
    return code


def wait_for_step(pid: int, run: Path, step: int, log: Path) -> int | None:
    """Until a checkpoint of `step` shows; the exit code if the process was quicker."""
    end = time.monotonic() + 120
    while newest(run) < step:
        if (code := ended(pid)) is not None:
            return code
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.002)
    return None


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_exits_with_the_command_that_goes_on(model_folder, tmp_path, number, code):  # noqa: F811
    run, log = tmp_path / "run", tmp_path / "log"
    pid = forked(arguments(model_folder, run, "--steps", "100000"), log)
    assert wait_for_step(pid, run, 2, log) is None, log.read_text()
    os.kill(pid, number)
    assert finish(pid, log) == code, log.read_text()
    assert f"python -m agents.train --resume {run}" in log.read_text()
    step = newest(run)
    assert finish(forked(["--resume", str(run), "--steps", str(step + 1)], log), log) == 0, log.read_text()
    assert newest(run) == step + 1


def kill_and_resume(model: str, run: Path, log: Path, points: list[tuple[int, float]]) -> None:
    """kill -9 some seconds after the checkpoint of a step shows, resume, again and again; then run to the end."""
    for i, (step, delay) in enumerate(points):
        pid = forked(arguments(model, run) if i == 0 else ["--resume", str(run)], log)
        if wait_for_step(pid, run, step, log) is not None:
            continue
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        finish(pid, log)
    assert finish(forked(["--resume", str(run)], log), log) == 0, log.read_text()


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_and_resume_equal_the_uninterrupted_run(model_folder, tmp_path, seed):  # noqa: F811
    log = tmp_path / "log"
    assert finish(forked(arguments(model_folder, tmp_path / "whole"), log), log) == 0, log.read_text()
    draw = random.Random(seed)
    points = [(step, draw.random() * 0.2) for step in (0, 2, 3, 5)]
    kill_and_resume(model_folder, tmp_path / "killed", log, points)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    norms = [json.loads(x)["grad_norm"] for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert min(norms) > 0, "nothing was learnt, so nothing was tested"


def test_killed_before_the_first_checkpoint_starts_again(model_folder, tmp_path):  # noqa: F811
    log, run = tmp_path / "log", tmp_path / "run"
    assert finish(forked(arguments(model_folder, tmp_path / "whole", "--steps", "1"), log), log) == 0
    pid = forked(arguments(model_folder, run, "--steps", "1"), log)
    while not (run / "config.json").exists():
        assert ended(pid) is None, log.read_text()
    os.kill(pid, signal.SIGKILL)
    finish(pid, log)
    assert finish(forked(["--resume", str(run)], log), log) == 0, log.read_text()
    assert_same_run(tmp_path / "whole", run)


def test_a_resumed_run_keeps_its_configuration(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, steps=1, set=("advantage.eps=1e-4",))
    trainer = start(config, tmp_path / "run")
    trainer.run()
    trainer.folder.close()
    run = str(tmp_path / "run")
    again = train.resolve(["--resume", run, "--steps", "3"])
    assert replace(again, resume=None, steps=1, run=None) == replace(config, run=None)
    with pytest.raises(UsageError, match="`seed` was 0 and cannot become 7"):
        train.resolve(["--resume", run, "--seed", "7"])
    with pytest.raises(UsageError, match="--from-step names a checkpoint"):
        train.resolve(["--from-step", "7"])
    with pytest.raises(UsageError, match=r"no checkpoint of step 7; there are: 0, 1"):
        train.main(["--resume", run, "--from-step", "7"])


def test_from_step_goes_back(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, steps=4, save=SaveConfig(every=1, keep=9))
    start(config, tmp_path / "whole").run()
    trainer = start(config, tmp_path / "run")
    trainer.run()
    trainer.folder.close()
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(checkpoint.CheckpointError, match=r"truncated.*--from-step 3"):
        train.main(["--resume", str(tmp_path / "run")])
    assert train.main(["--resume", str(tmp_path / "run"), "--from-step", "2"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
