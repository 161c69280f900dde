"""What goes wrong in a run is said in a line, with exit code 2 or a note, and nothing that was saved is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents import checkpoint, cli, train
from agents.config import SaveConfig
from agents.models import load_model
from tests.agents.letters import SPEC, save_model
from tests.agents.test_resume import final, finish, forked, same
from tests.agents.test_train import model_folder, own_cache, small, start  # noqa: F401  (fixtures)
from tests.agents.tokenizers import QWEN3


def refused(capsys, monkeypatch, *argv: str) -> str:
    """What the command says; it must exit 2 with one line."""
    monkeypatch.setattr("sys.argv", ["train", *argv, *([] if "--resume" in argv else ["--processes", "1"])])
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, train.user_errors)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("argv, words", [
    (["--env", "tool_qq"], "did you mean"),
    (["--algo", "gropo"], "did you mean `grpo`"),
    (["--set", "advantag=group_norm()"], "did you mean `advantage`"),
    (["--set", "advantage.epz=1"], "epz"),
    (["--env-args", "levle=2"], "levle"),
    (["--env-args", "level"], "NAME=VALUE"),
    (["--level", "hardd"], "hard"),
    (["--model", "/no/such/folder"], "there is no folder /no/such/folder"),
    (["--optim.name", "adamv"], "unknown optimizer `adamv`; did you mean `adam`?"),
    (["--rollout.top-k", "5"], "top_k=5"),
    (["--rollout.temperature", "0"], "temperature above 0"),
    (["--resume", "/no/such/run"], "/no/such/run/config.json cannot be read"),
])  # fmt: skip
def test_mistakes_on_the_command_line(capsys, monkeypatch, tmp_path, argv, words):
    assert words in refused(capsys, monkeypatch, *argv, *([] if "--resume" in argv else ["--runs", str(tmp_path)]))
    assert list(tmp_path.glob("*-s0-*")) == []


@pytest.mark.full
def test_python_m_exits_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "agents.train", "--algo", "gropo"], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean `grpo`" in done.stderr and "Traceback" not in done.stderr


def test_a_model_without_a_chat_template(capsys, monkeypatch, tmp_path, model_folder):  # noqa: F811
    folder = shutil.copytree(model_folder, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    said = refused(capsys, monkeypatch, "--env", SPEC, "--model", str(folder), "--runs", str(tmp_path))
    assert "has no chat template" in said and "chat_template.jinja" in said


def test_folders_that_are_no_models(capsys, monkeypatch, tmp_path, model_folder):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    for name, words in (("empty", "no config.json"), ("unfinished", "--resume"), ("broken", "cannot load the model")):
        assert words in refused(capsys, monkeypatch, "--env", SPEC, "--model", str(tmp_path / name))


def test_a_template_that_rewrites_history_trains_in_segments(tmp_path):
    """Qwen3's template strips earlier thoughts: said at the start, and the run goes on, exact to the token."""
    folder = save_model(tmp_path / "thinking", QWEN3)
    trainer = start(small(str(folder), steps=1), tmp_path / "run")
    assert any("rewrites history" in note for note in trainer.session.notes)
    trainer.run()
    assert trainer.history[0]["logp_gap"] <= 1e-4


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, model_folder):  # noqa: F811
    """The kernel refuses files above a limit, as a full disk would; what was saved before stays whole."""
    config = small(model_folder, steps=1, save=SaveConfig(every=1, keep=2))
    begun = start(config, tmp_path / "run")
    begun.run()
    begun.folder.close()
    before = final(tmp_path / "run")
    log = tmp_path / "log"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        pid = forked(["--resume", str(tmp_path / "run"), "--steps", "2"], log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    code = finish(pid, log)
    assert code == 1 and "no checkpoint at step 2" in log.read_text()
    assert f"when there is room again: python -m agents.train --resume {tmp_path / 'run'}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "Older ones are untouched" in log.read_text()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [0, 1]
    same(final(tmp_path / "run"), before)
    assert finish(forked(["--resume", str(tmp_path / "run"), "--steps", "2"], log), log) == 0, log.read_text()


@pytest.mark.parametrize("damage, words", [
    ("truncate", "is truncated"),
    ("foreign", "is no checkpoint of this program"),
    ("other model", "is of another model"),
    ("other kind", "not a training checkpoint"),
])
def test_a_checkpoint_that_cannot_be_used_is_named(capsys, monkeypatch, tmp_path, model_folder, damage, words):  # noqa: F811
    run = tmp_path / "run"
    trainer = start(small(model_folder, steps=2, save=SaveConfig(every=1, keep=2)), run)
    trainer.run()
    trainer.folder.close()
    newest = checkpoint.latest(run / "checkpoints")
    if damage == "truncate":
        data = (newest / "state.json").read_bytes()
        (newest / "state.json").write_bytes(data[:-9])
    elif damage == "foreign":
        shutil.rmtree(newest)
        newest.mkdir()
        torch.save({"model": torch.ones(3)}, newest / "pytorch_model.bin")
    else:
        state = checkpoint.load(newest).state
        if damage == "other model":
            state["learner"]["members"]["policy"]["model"]["lm_head.weight"] = torch.ones(2, 2)
        else:
            del state["loop"]
        checkpoint.save(run / "checkpoints", 2, state, keep=9)
    said = refused(capsys, monkeypatch, "--resume", str(run))
    assert words in said and newest.name in said
    if damage == "truncate":
        assert "--from-step 1" in said


def test_a_folder_that_is_taken(capsys, monkeypatch, tmp_path, model_folder):  # noqa: F811
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not overwrite")
    said = refused(capsys, monkeypatch, "--env", SPEC, "--model", model_folder, "--run", str(tmp_path / "mine"))
    assert "exists and is not empty" in said
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_context_too_small_is_an_outcome(tmp_path, model_folder):  # noqa: F811
    config = small(model_folder, steps=1)
    config = replace(config, rollout=replace(config.rollout, max_context=8))
    trainer = start(config, tmp_path / "run")
    trainer.run()
    assert trainer.evals[0]["stop_reasons"] == {"context": 12}
    assert trainer.history[0]["truncated"] == 1.0


def test_models_are_located(monkeypatch, model_folder):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, _ = load_model(model_folder, torch.float64)
    assert next(model.parameters()).dtype == torch.float64 and not model.training
    with pytest.raises(cli.UsageError, match="local cache"):
        load_model("nobody/has-this-model-0123456789")
