"""Whole runs of a vision-language model on an environment that shows pictures and has a tool that returns them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from agents import eval as evaluation
from agents.chat import ChatFormatError
from agents.config import (
    AheadConfig,
    EvalConfig,
    LoraConfig,
    OptimConfig,
    RolloutConfig,
    SaveConfig,
    TrainConfig,
    WarmConfig,
)
from agents.models import chat_of, load_model
from agents.store import TrajectoryReader
from tests.agents.seeing import KINDS, seeing_folder
from tests.agents.test_resume import assert_same_run, interrupt, resume
from tests.agents.test_train import own_cache, start  # noqa: F401  (a fixture)

SPOT, WORDY = "tests.envs.spot:Spot", "tests.agents.seeing:Wordy"


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> str:
    return str(seeing_folder(tmp_path_factory.mktemp(request.param), request.param, scale=1.0))


def small(folder: str, **changes) -> TrainConfig:
    """A run of seconds."""
    config = TrainConfig(
        env=SPOT, model=folder, steps=2, groups=2, group_size=4, train_tasks=16,
        rollout=RolloutConfig(max_new_tokens=8, max_turns=3), warm=WarmConfig(when="never"),
        optim=OptimConfig(lr=1e-3), eval=EvalConfig(episodes=4, hard_episodes=0), save=SaveConfig(every=2, keep=9),
    )  # fmt: skip
    return replace(config, **changes)


def demonstrated(episodes: int = 24, epochs: int = 2) -> WarmConfig:
    return WarmConfig(when="always", episodes=episodes, epochs=epochs)


@pytest.mark.parametrize(
    ("algo", "changes"),
    [
        ("grpo", {}),
        ("ppo", {}),
        ("kto", {}),
        ("grpo", {"packing": "never", "recompute": True}),
        ("grpo", {"lora": LoraConfig(rank=4)}),
        ("grpo", {"workers": 2}),
        ("grpo", {"ahead": AheadConfig(on=True)}),
    ],
)  # fmt: skip
def test_sampler_and_trainer_agree(folder, tmp_path, algo, changes):
    trainer = start(small(folder, algo=algo, warm=demonstrated(), **changes), tmp_path / "run")
    trainer.run()
    assert max(m["logp_gap"] for m in trainer.history) < 1e-4
    assert all(t.ledger.pictures for t in trainer.session.actor.played)
    if not changes:
        tower = trainer.session.model.base_model.visual
        before = load_model(folder)[0].base_model.visual
        moved = [not torch.equal(a, b) for a, b in zip(tower.parameters(), before.parameters(), strict=True)]
        assert any(moved)


@pytest.mark.parametrize("algo", ["otc_grpo", "t_ppo"])
def test_resume_equals_going_on(folder, tmp_path, algo):
    rollout = RolloutConfig(max_new_tokens=8, max_turns=3)
    config = small(folder, env=WORDY, algo=algo, steps=4, rollout=rollout, warm=demonstrated())
    start(config, tmp_path / "whole").run()
    begun = start(config, tmp_path / "halved")
    interrupt(begun)
    resume(config, tmp_path / "halved").run()
    assert_same_run(tmp_path / "whole", tmp_path / "halved")
    assert max(m["grad_norm"] for m in begun.history) > 0, "nothing was learnt, so nothing was tested"


def test_a_run_leaves_a_model_and_pictures(folder, tmp_path):
    start(small(folder), tmp_path / "run").run()
    model, tokenizer = load_model(str(tmp_path / "run"))
    ours, theirs = (chat_of(*load_model(spec)) for spec in (folder, str(tmp_path / "run")))
    image = Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 20).convert("RGB")
    a, b = ours.pictures.read(image), theirs.pictures.read(image)
    assert a.key == b.key and torch.equal(a.patches_PD, b.patches_PD)
    reader = TrajectoryReader(tmp_path / "run" / "trajectories")
    stored, columns = reader[0], reader.read(len(reader) - 1).columns
    assert "picture" not in columns
    part = stored.messages[0]["content"][0]
    assert part["type"] == "image" and part["image"].size == (56, 56)
    spans = [s for s in stored.ledger.segments[0].spans if s.kind == "image"]
    assert spans and chat_of(model, tokenizer).pictures.read(part["image"]).key == spans[0].ref


def test_a_text_model_is_told_so(tmp_path):
    with pytest.raises(ChatFormatError, match="reads text only"):
        start(small("bundled"), tmp_path / "run").run()


@pytest.mark.full
def test_it_learns_to_see(tmp_path, capsys):
    """A policy that does not look is right once in four; the run of docs/vision.md."""
    folder = str(seeing_folder(tmp_path / "model", "qwen3_vl", scale=1.0))
    config = small(
        folder, steps=20, groups=8, group_size=8, train_tasks=1000, rollout=RolloutConfig(),
        warm=demonstrated(400, 4), optim=OptimConfig(), eval=EvalConfig(episodes=200, hard_episodes=0),
    )  # fmt: skip
    trainer = start(config, tmp_path / "run")
    summary = trainer.run()
    assert summary["success_after"][0] > 0.5
    assert summary["success_after"][0] > summary["success_before"][0] + 0.1
    assert evaluation.main(["--env", SPOT, "--model", str(tmp_path / "run"), "--episodes", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["success"][0] > 0.25
