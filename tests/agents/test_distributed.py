"""Two gloo processes give what one gives: streams, gradients, steps, and whole runs."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from agents import cli
from agents.config import OptimConfig, SaveConfig
from agents.dist import World
from agents.launcher import free_port
from agents.forward import Convention
from agents.learner import LMLearner
from agents.sharding import full
from policy_opt.bank import CRITIC
from policy_opt.need import VALUES
from tests.agents.test_learner import ENTROPY, LOGP, batch, loss_of, tiny
from tests.agents.test_resume import final, finish, forked, same, wait_for_step
from tests.agents.test_train import model_folder, own_cache, small, start  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parents[2]


def steps_of(world: World) -> dict[str, torch.Tensor]:
    """Scores, gradients and weights of three optimizer steps with a critic."""
    b = batch(rows=9)
    convention = Convention(0.8, (0, 7))
    one = LMLearner(tiny(), OptimConfig(lr=0.01, clip=0.3), convention=convention, world=world, micro_tokens=60)
    one.prepare({"critic": CRITIC}, [], None)
    out = {}
    for step in range(3):
        scored = one.score(b, [LOGP, ENTROPY])
        whole = {k: v.clone().requires_grad_() for k, v in scored.items()}
        pulls = dict(zip(whole, torch.autograd.grad(loss_of(whole), list(whole.values())), strict=True))
        streams = one.backward(b, [LOGP, ENTROPY, VALUES], lambda rows, live, pulls=pulls: {
            **{k: v[rows] for k, v in pulls.items()}, "values_BT": (live["values_BT"] - 1) * b.mask_BT[rows]})
        metrics = one.step()
        out |= {f"{step}/{k}": v for k, v in streams.items()}
        out[f"{step}/norm"] = torch.tensor([metrics["grad_norm"], metrics["grad_norm_critic"]])
    out |= {f"policy/{k}": full(v).detach() for k, v in one.model.named_parameters()}
    out |= {f"critic/{k}": full(v).detach() for k, v in one.bank.members["critic"].model.named_parameters()}
    return out


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": "2"}
    world = World.start()
    torch.set_num_threads(1)
    assert world.size == 2 and world.share(range(5)) == list(range(rank, 5, 2))
    assert world.gather(rank) == [0, 1] and world.from_main(rank) == 0
    torch.save(steps_of(world), f"{folder}/{rank}.pt")
    world.close()


def test_two_processes_equal_one(tmp_path):
    mp.start_processes(worker, (free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    want = steps_of(World())
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.full
def test_a_run_of_two_processes_equals_one(model_folder, tmp_path):  # noqa: F811
    """Same episodes, same updates to rounding; and the second process leaves with the first."""
    config = replace(small(model_folder, steps=3, dtype="float64", save=SaveConfig(every=1, keep=9)), run=None)
    one = start(config, tmp_path / "one")
    one.run()
    argv = as_arguments(replace(config, processes=2, run=str(tmp_path / "two")))
    log = tmp_path / "log"
    assert finish(forked(argv, log), log, 300) == 0, log.read_text()
    a, b = final(tmp_path / "one"), final(tmp_path / "two")
    for name, value in a["learner"]["members"]["policy"]["model"].items():
        torch.testing.assert_close(value, b["learner"]["members"]["policy"]["model"][name], rtol=1e-6, atol=1e-9)
    rewards = [[json.loads(x)["reward"] for x in (tmp_path / r / "metrics.jsonl").read_text().splitlines()]
               for r in ("one", "two")]
    assert rewards[0] == rewards[1]
    again = ["--resume", str(tmp_path / "two"), "--from-step", "1"]
    assert finish(forked(again, log), log, 300) == 0, log.read_text()
    c = final(tmp_path / "two")
    for state in (b, c):
        state.pop("files")
    same(b, c)


def test_mixed_precision_computes_coarsely_and_steps_full_weights(model_folder, tmp_path):  # noqa: F811
    """In a process of its own, because accelerate remembers the precision of the first."""
    run, log = tmp_path / "run", tmp_path / "log"
    config = small(model_folder, algo="ppo", steps=2, dtype="bfloat16", run=str(run), processes=1)
    assert finish(forked(as_arguments(config), log), log) == 0, log.read_text()
    assert all(v.dtype == torch.float32 for v in final(run)["learner"]["members"]["policy"]["model"].values())
    gaps = [json.loads(x)["logp_gap"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert 1e-6 < max(gaps) < 0.3


@pytest.mark.full
def test_a_signal_stops_both_processes(model_folder, tmp_path):  # noqa: F811
    run, log = tmp_path / "run", tmp_path / "log"
    config = small(model_folder, steps=100_000, save=SaveConfig(every=1, keep=2), processes=2, run=str(run))
    pid = forked(as_arguments(config), log)
    assert wait_for_step(pid, run, 2, log) is None, log.read_text()
    os.kill(pid, signal.SIGINT)
    assert finish(pid, log, 300) == 130, log.read_text()
    assert f"--resume {run}" in log.read_text() and "error" not in log.read_text()


def as_arguments(config) -> list[str]:
    """The configuration as a TOML file's argument, since child processes get the same command line."""
    file = Path(config.run).parent / "run.toml"
    lines, tables = [], []
    for key, value in cli.as_json(config).items():
        if isinstance(value, dict):
            tables.append(f"[{key}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in value.items() if v is not None))
        elif value is not None:
            lines.append(f"{key} = {json.dumps(value)}")
    file.write_text("\n".join([*lines, *tables]))
    return ["--config", str(file)]
