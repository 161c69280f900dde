"""Whole runs of the bundled model through `python -m agents.train --engine vllm`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agents.test_resume import CLOCKS, final, same

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]
SMALL = (
    "--env", "tool_qa", "--steps", "5", "--groups", "4", "--group-size", "4", "--rollout.rows", "16",
    "--warm.episodes", "64", "--warm.epochs", "1", "--eval.episodes", "16", "--eval.hard-episodes", "0",
    "--save.every", "1", "--save.keep", "9", "--plain", "--engine", "vllm", "--vllm.kv-gib", "0.25",
)  # fmt: skip
ALSO = {*CLOCKS, "sync_seconds"}
"""What the clock decides."""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Starts the command with its output in a file; whatever still runs at the end is killed."""
    folder = tmp_path_factory.mktemp("runs")
    env = {**os.environ, "PALAESTRA_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    running = []

    def start(name: str, *argv: str) -> tuple[subprocess.Popen, Path, Path]:
        log, run = folder / f"{name}.log", folder / name
        where = () if "--resume" in argv else ("--run", str(run))
        with log.open("a") as stream:
            command = [sys.executable, "-m", "agents.train", *argv, *where]
            running.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=stream, stderr=stream))
        return running[-1], run, log

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def whole(started):
    """A run of five iterations."""
    process, run, log = started("whole", *SMALL)
    assert process.wait() == 0, log.read_text()
    return run


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def core_of(pid: int) -> int | None:
    """The engine's process under a process."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"agents.engines.vllm_core" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except (OSError, ValueError):
            continue
    return None


def gone(pid: int) -> bool:
    """Whether a process has ended, waiting for it."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_five_iterations(whole):
    lines = metrics(whole)
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5]
    for m in lines:
        assert 0 < m["logp_gap"] <= 1e-4 and 0 < m["sync_gap"] <= 1e-4
        assert m["episodes"] == 16 and m["failures"] == 0
    assert all(m["sync_seconds"] > 0 for m in lines[1:]), "weights are delivered before every rollout"
    assert sum(m["grad_norm"] > 0 for m in lines) >= 2
    evals = [json.loads(line) for line in (whole / "eval.jsonl").read_text().splitlines()]
    assert [e["label"] for e in evals] == ["before", "after"]
    assert (whole / "model" / "config.json").is_file() and (whole / "report.html").is_file()


def test_an_engine_killed_in_a_rollout_ends_the_run_and_resume_goes_on_exactly(started, whole):
    process, run, log = started("killed", *SMALL)
    while len(metrics(run)) < 2 and process.poll() is None:
        time.sleep(0.02)
    core = core_of(process.pid)
    assert core is not None, log.read_text()
    os.kill(core, signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    said = [line for line in log.read_text().splitlines() if line.startswith(("error", "go on"))]
    assert said[0].startswith("error: the engine vllm is gone: its process ended (killed by SIGKILL; its log: ")
    assert said[1] == f"go on with: python -m agents.train --resume {run}"
    assert "Traceback" not in log.read_text() and len(said) == 2
    process, _, log = started("resumed", "--resume", str(run))
    assert process.wait() == 0, log.read_text()
    a, b = final(whole), final(run)
    for state in (a, b):
        state.pop("files")
    same(a, b)
    same(*[[{k: v for k, v in m.items() if k not in ALSO} for m in metrics(r)] for r in (whole, run)])


def test_a_stop_by_signal_finishes_the_iteration_and_leaves_no_process(started):
    """As a Ctrl-C in a terminal does: the signal goes to the whole group of processes."""
    process, run, log = started("stopped", *SMALL[:-4], "--engine", "vllm", "--vllm.kv-gib", "0.1")
    while not metrics(run) and process.poll() is None:
        time.sleep(0.02)
    core = core_of(process.pid)
    assert core is not None and os.getpgid(core) != os.getpgid(process.pid), "a Ctrl-C does not reach the engine"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert f"--resume {run}" in log.read_text() and gone(core)


def test_an_engine_ends_with_its_trainer(started):
    process, run, log = started("orphaned", *SMALL)
    while not metrics(run) and process.poll() is None:
        time.sleep(0.02)
    core = core_of(process.pid)
    assert core is not None, log.read_text()
    process.kill()
    process.wait()
    assert gone(core)


def test_two_processes_have_an_engine_each(started):
    process, run, log = started("two", *SMALL, "--steps", "2", "--processes", "2")
    assert process.wait() == 0, log.read_text()
    for m in metrics(run):
        assert m["episodes"] == 16 and m["failures"] == 0
        assert 0 < m["logp_gap"] <= 1e-4 and 0 < m["sync_gap"] <= 1e-4


def test_what_the_engine_cannot_do_is_refused(tmp_path):
    """One line, exit code 2, before anything is played."""
    cases = [
        (("--algo", "hapo"), "take --engine hf"),
        (("--dtype", "float64"), "leave out --dtype float64"),
        (("--vllm.tensor-parallel", "2"), "there is none"),
    ]
    for argv, words in cases:
        done = subprocess.run(
            [sys.executable, "-m", "agents.train", *SMALL, *argv, "--runs", str(tmp_path)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and words in errors[0], (argv, done.stderr)
    assert not list(tmp_path.iterdir())
