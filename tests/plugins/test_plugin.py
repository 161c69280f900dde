"""A plugin package is installed for real into a throw-away folder and found by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "tests" / "plugins" / "key_cabinet"


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """The folder that holds the installed plugin; add it to PYTHONPATH."""
    import shutil

    source = tmp_path_factory.mktemp("source") / "key_cabinet"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", str(target), str(source)]  # fmt: skip
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    return target


def run(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(installed), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, cwd=installed, timeout=300
    )


def test_the_plugin_is_listed_and_keeps_the_contract(installed):
    listed = run(installed, "-m", "envs", "--json", "--episodes", "5")
    assert listed.returncode == 0, listed.stderr
    cards = {card["name"]: card for card in json.loads(listed.stdout)}
    assert cards["key_cabinet"]["rewards"]["oracle"] == 1.0 and "tool_qa" in cards
    checked = run(installed, "-m", "envs", "check", "key_cabinet", "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert json.loads(checked.stdout)["ok"] is True


SMALL = ("--steps", "2", "--groups", "2", "--group-size", "4", "--train-tasks", "20", "--warm.episodes", "12",
         "--warm.epochs", "1", "--warm.no-cache", "--eval.episodes", "8", "--eval.hard-episodes", "0", "--json",
         "--plain")  # fmt: skip


def test_two_steps_of_training_on_the_plugin(installed, tmp_path):
    done = run(installed, "-m", "agents.train", "--env", "key_cabinet", "--runs", str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert len(last["success_after"]) == 3
    steps = [json.loads(line)["step"] for line in (Path(last["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2


@pytest.mark.full
def test_two_steps_of_training_on_questions_of_ones_own(tmp_path):
    rows = [{"question": f"Repeat {i}.", "answer": str(i)} for i in range(100, 140)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_reward.py").write_text("def near(text, row):\n    return float(row['answer'] in text)\n")
    done = run(tmp_path, "-m", "agents.train", "--env", "jsonl:questions.jsonl", "--reward", "my_reward:near",
               "--runs", str(tmp_path / "runs"), *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["success_before"]) == 3
