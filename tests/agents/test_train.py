"""Whole runs on a toy: what a run leaves behind, that it learns, and what each process count gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from agents import train
from agents.cli import UsageError
from agents.config import EvalConfig, OptimConfig, RolloutConfig, SaveConfig, TrainConfig, WarmConfig
from agents.demonstrate import demonstrator_weights
from agents.display import Silent
from agents.dist import World
from agents.models import load_model
from agents.runfolder import RunFolder
from agents.session import build
from agents.trainer import Trainer, save_config
from tests.agents.letters import SHAPED, SPEC, save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PALAESTRA_CACHE", str(tmp_path / "cache"))


WARM = WarmConfig(when="always", episodes=8, epochs=60, batch=8, lr=2e-2)


def small(model_folder, **changes) -> TrainConfig:
    """A run of seconds."""
    config = TrainConfig(
        env=SHAPED, model=model_folder, steps=4, groups=3, group_size=4, train_tasks=8,
        optim=OptimConfig(lr=1e-2),
        rollout=RolloutConfig(max_new_tokens=3),
        warm=WarmConfig(when="never"),
        eval=EvalConfig(episodes=12, hard_episodes=0),
        save=SaveConfig(every=2, keep=3),
    )  # fmt: skip
    return replace(config, **changes)


def start(config: TrainConfig, path) -> Trainer:
    folder = RunFolder.create(path, path.parent, "x")
    save_config(folder, config)
    return Trainer(build(config, World()), folder, Silent())


def test_a_run_leaves_what_it_promises(model_folder, tmp_path):
    trainer = start(small(model_folder), tmp_path / "run")
    summary = trainer.run()
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for name in ("reward", "correct", "tool_calls", "length", "entropy", "kl", "clip_frac", "grad_norm", "logp_gap",
                 "tokens_per_second", "zero_variance_groups", "truncated", "loss"):
        assert all(isinstance(m[name], (int, float)) for m in metrics), name
    assert max(m["logp_gap"] for m in metrics) <= 1e-4
    evals = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [e["label"] for e in evals] == ["before", "after"]
    assert summary["success_after"] == evals[1]["success"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000000", "step-00000002", "step-00000004"]
    model, tokenizer = load_model(str(run))
    for name, value in trainer.session.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert tokenizer.chat_template == trainer.session.tokenizer.chat_template
    assert json.loads((run / "summary.json").read_text())["run"] == str(run)


def test_it_learns(model_folder, tmp_path):
    save = SaveConfig(every=100, trajectories=0)
    config = small(model_folder, env=SPEC, steps=20, group_size=16, warm=WARM, save=save)
    trainer = start(config, tmp_path / "run")
    trainer.run()
    success = [m["correct"] for m in trainer.history]
    assert sum(success[-3:]) / 3 > sum(success[:3]) / 3 + 0.2


def test_global_random_state_is_left_alone(model_folder, tmp_path):
    import random

    import numpy as np

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    start(small(model_folder, steps=2), tmp_path / "run").run()
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_float64_training_matches_its_sampler_to_nine_digits(model_folder, tmp_path):
    trainer = start(small(model_folder, steps=2, dtype="float64"), tmp_path / "run")
    trainer.run()
    assert max(m["logp_gap"] for m in trainer.history) <= 1e-9


def test_the_warm_start_is_kept_by_content(model_folder, tmp_path, monkeypatch):
    config = small(model_folder, warm=replace(WARM, epochs=3))
    notes = []
    trained = []
    for seed_config in (config, config, replace(config, warm=replace(config.warm, lr=1e-2))):
        trainer = Trainer(build(seed_config, World()), None, Silent())
        monkeypatch.setattr(trainer.display, "note", notes.append, raising=False)
        trainer.warm_start()
        trained.append(trainer.session.model.lm_head.weight.detach().clone())
    assert ["cached" in n for n in notes] == [False, True, False]
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_scripts_to_imitate_are_chosen_by_share(model_folder):
    make_env = build(small(model_folder, env=SPEC), World()).make_env
    assert demonstrator_weights(make_env) == {"oracle": 0.5, "babble": 0.5}
    assert demonstrator_weights(make_env, ("babble=3", "oracle=0.5")) == {"babble": 3.0, "oracle": 0.5}
    with pytest.raises(UsageError, match=r"--warm.scripts: no script `orcle`; did you mean `oracle`\?"):
        demonstrator_weights(make_env, ("orcle=1",))
    for share in ("0", "-1", "nan", "True", "much", "1e999"):
        with pytest.raises(UsageError, match="a share is a number above zero"):
            demonstrator_weights(make_env, (f"oracle={share}",))
    with pytest.raises(UsageError, match="NAME=VALUE"):
        demonstrator_weights(make_env, ("oracle",))


def test_json_and_dry_run(model_folder, tmp_path, capsys):
    common = ["--env", SPEC, "--model", model_folder, "--steps", "1", "--groups", "2", "--group-size", "2",
              "--eval.episodes", "6", "--rollout.max-new-tokens", "2", "--runs", str(tmp_path), "--warm.when", "never"]
    assert train.main([*common, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for word in ("model", "episode", "iteration", "minutes", "MiB"):
        assert word in printed
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("Letters")]
    assert train.main([*common, "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(last["success_before"]) == len(last["success_after"]) == 3
    assert last["run"].startswith(str(tmp_path)) and last["report"].endswith("report.html")


def reward_by_length(final, row):
    """A user's own reward: short answers."""
    return float(len(final or "") < 4)


def test_a_users_own_questions(model_folder, tmp_path):
    """`--env jsonl:FILE --reward module:function` trains without an environment being written."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"number {i}?"}) + "\n" for i in range(40)))
    config = small(model_folder, env=f"jsonl:{file}", reward="tests.agents.test_train:reward_by_length", steps=1,
                   train_tasks=2000)  # fmt: skip
    trainer = start(config, tmp_path / "run")
    assert trainer.session.tasks < 40, "the pool is what the file has"
    trainer.run()
    assert trainer.history[0]["reward"] > 0


def test_an_environment_without_training_tasks_is_refused(model_folder):
    from agents.cli import UsageError

    config = small(model_folder, env="tests.agents.letters:OnlyEval")
    with pytest.raises(UsageError, match="for evaluation only"):
        build(config, World())
