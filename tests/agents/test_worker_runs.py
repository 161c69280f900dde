"""Whole runs with environment workers: the same run bit for bit, losses shown, and a stop that can be resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agents import cli, train
from agents.config import EvalConfig, WorkerConfig
from agents.runfolder import read_json
from tests.agents.test_distributed import as_arguments
from tests.agents.test_faults import refused
from tests.agents.test_resume import final, finish, forked, same
from tests.agents.test_train import model_folder, own_cache, small, start  # noqa: F401  (fixtures)
from tests.agents.test_workers import FAULTY


def run(folder: Path, config) -> dict:
    """Train; the last checkpoint's state, without the places of files."""
    trainer = start(config, folder)
    trainer.run()
    trainer.folder.close()
    return {key: value for key, value in final(folder).items() if key != "files"}


def test_a_run_with_workers_is_the_run_without(model_folder, tmp_path):  # noqa: F811
    """Weights, optimizer, streams; evaluations; and a resumed run may have other workers."""
    config = small(model_folder, env=FAULTY, steps=2)
    want = run(tmp_path / "0", config)
    same(run(tmp_path / "2", small(model_folder, env=FAULTY, steps=2, workers=2)), want)
    one, two = ([json.loads(line) for line in (tmp_path / n / "eval.jsonl").read_text().splitlines()] for n in "02")
    assert [{**e, "seconds": 0} for e in one] == [{**e, "seconds": 0} for e in two]
    config = read_json(tmp_path / "2" / "config.json")
    assert config["workers"] == 2 and config["worker"]["timeout_s"] == 60


def test_losses_are_shown_and_the_run_goes_on(model_folder, tmp_path):  # noqa: F811
    worker = WorkerConfig(timeout_s=0.3)
    config = small(
        model_folder, env=FAULTY, env_args=("what='hang'", "on=[1,2,3]"), steps=1, workers=1, worker=worker,
        eval=EvalConfig(episodes=2, hard_episodes=0),
    )  # fmt: skip
    trainer = start(config, tmp_path / "run")
    notes: list[str] = []
    trainer.display.note = notes.append  # type: ignore[method-assign]
    trainer.run()
    assert len(trainer.history) == 1 and 0 < trainer.history[-1]["failures"] <= 1
    assert trainer.history[-1]["workers_lost"] >= 1
    assert any("WorkerTimeout" in note for note in notes)
    kinds = trainer.evals[0]["failures"]
    assert kinds["error:WorkerTimeout no answer within 0.3 s"] >= 1 and trainer.evals[0]["marked"]


@pytest.mark.parametrize(("argv", "words"), [
    (["--env", "tool_qq"], "did you mean 'tool_qa'"),
    pytest.param(
        ["--env", FAULTY, "--env-args", "what='exit'", "--env-args", "at='make'"], "these are my last words",
        marks=pytest.mark.full,
    ),
    (["--env", FAULTY, "--worker.timeout-s", "0"], "--worker.timeout-s is above 0"),
])  # fmt: skip
def test_mistakes_are_one_line_and_code_2(capsys, monkeypatch, tmp_path, model_folder, argv, words):  # noqa: F811
    own = ["--runs", str(tmp_path), "--model", model_folder, "--workers", "1", "--processes", "1"]
    monkeypatch.setattr("sys.argv", ["train", *own, *argv])
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, train.user_errors)
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert list(tmp_path.glob("*-s0-*")) == []


def test_a_cluster_without_workers_is_refused(capsys, monkeypatch, tmp_path):
    said = refused(capsys, monkeypatch, "--runs", str(tmp_path), "--worker.ray", "auto")
    assert "give --workers N" in said


@pytest.mark.full
def test_a_run_that_has_no_workers_left_stops_and_can_be_resumed(model_folder, tmp_path, monkeypatch):  # noqa: F811
    """In a process of its own: exit code 1, one line that says why and how to go on; then it does, to the same end."""
    module = tmp_path / "fleeting.py"
    module.write_text(FLEETING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FLEETING", str(tmp_path / "gone"))
    config = small(model_folder, env="fleeting:Fleeting", steps=3, workers=1, processes=1, run=str(tmp_path / "run"))
    log, argv = tmp_path / "log", as_arguments(config)
    assert finish(forked(argv, log), log) == 1, log.read_text()
    said = log.read_text()
    assert "no environment worker is left" in said and "exit code 9" in said and "Traceback" not in said
    assert f"--resume {tmp_path / 'run'}" in said
    (tmp_path / "gone").unlink()
    os.environ.pop("FLEETING")
    assert finish(forked(["--resume", str(tmp_path / "run")], log), log) == 0, log.read_text()
    want = run(tmp_path / "whole", small(model_folder, env="fleeting:Fleeting", steps=3, workers=0))
    same({k: v for k, v in final(tmp_path / "run").items() if k != "files"}, want)


FLEETING = """
import os
from pathlib import Path

from tests.agents.faulty import Faulty

sign = Path(os.environ.get("FLEETING", "/nonexistent"))
if sign.exists():
    os._exit(9)


class Fleeting(Faulty):
    '''After thirty episodes its workers cannot be started any more.'''

    name = "fleeting"
    begun = 0

    def opening(self, task):
        Fleeting.begun += 1
        if Fleeting.begun > 30 and "FLEETING" in os.environ:
            sign.touch()
            os._exit(9)
        return super().opening(task)
"""
