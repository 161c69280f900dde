"""Two gloo processes give what one gives: streams, gradients, steps, and whole runs; one that is lost ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from agents import cli, train
from agents.cli import UsageError
from agents.config import LoraConfig, OptimConfig, SaveConfig
from agents.dist import World
from agents.forward import Convention
from agents.launcher import free_port
from agents.learner import LMLearner
from agents.sharding import full
from policy_opt.bank import CRITIC
from policy_opt.need import VALUES
from tests.agents.test_learner import ENTROPY, LOGP, batch, loss_of, tiny
from tests.agents.test_resume import final, finish, forked, newest, same, wait_for_step
from tests.agents.test_train import WARM, model_folder, own_cache, small, start  # noqa: F401  (fixtures)

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


# ---------------------------------------------------------------------- accelerate launch

CONFIGS = ROOT / "scenarios" / "accelerate"


def launched(name: str, argv: list[str], log: Path, *options: str) -> subprocess.Popen:
    """`accelerate launch` with one of the shipped configurations for two processes without GPUs."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port()),
        "--config_file", str(CONFIGS / f"{name}_cpu2.yaml"), *options, "-m", "agents.train", *argv,
    ]  # fmt: skip
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def rewards(run: Path) -> list[float]:
    return [json.loads(line)["reward"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_but_for_rounding(one: Path, two: Path) -> None:
    a, b = final(one)["learner"]["members"], final(two)["learner"]["members"]
    assert a.keys() == b.keys()
    for member in a:
        for kind in ("model", "optimizer"):
            close(a[member][kind], b[member][kind], f"{member}.{kind}")
    assert rewards(one) == rewards(two)
    theirs, ours = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    close(theirs, ours, "export")


def close(a, b, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda m: f"{where}: {m}")


@pytest.mark.full
@pytest.mark.parametrize("name, changes", [
    ("ddp", {}), ("fsdp2", {}), ("fsdp2", {"lora": LoraConfig(rank=2), "warm": replace(WARM, epochs=3)}),
])  # fmt: skip
def test_a_launched_run_equals_one_process(model_folder, tmp_path, name, changes):  # noqa: F811
    """Same episodes, same weights and optimizer states; and the checkpoint goes on in any number of processes."""
    config = small(model_folder, algo="ppo", steps=3, dtype="float64", save=SaveConfig(every=1, keep=9), **changes)
    start(replace(config, run=None), tmp_path / "one").run()
    log, run = tmp_path / "log", tmp_path / "two"
    assert launched(name, as_arguments(replace(config, run=str(run))), log).wait(250) == 0, log.read_text()
    assert_same_but_for_rounding(tmp_path / "one", run)
    before = final(run)
    assert launched(name, ["--resume", str(run), "--from-step", "1"], log).wait(250) == 0, log.read_text()
    after = final(run)
    for state in (before, after):
        state.pop("files")
    same(before, after)
    assert finish(forked(["--resume", str(run), "--from-step", "2"], log), log, 250) == 0, log.read_text()
    assert "had 2 process(es) and now has 1" in log.read_text()
    assert_same_but_for_rounding(tmp_path / "one", run)


@pytest.mark.full
def test_split_weights_in_bfloat16(model_folder, tmp_path):  # noqa: F811
    """Gathered in bfloat16, by sampler and trainer alike; kept, stepped and saved in float32."""
    run, log = tmp_path / "run", tmp_path / "log"
    config = small(model_folder, algo="ppo", steps=2, dtype="bfloat16", run=str(run))
    done = launched("fsdp2", as_arguments(config), log, "--mixed_precision", "bf16")
    assert done.wait(250) == 0, log.read_text()
    assert all(v.dtype == torch.float32 for v in final(run)["learner"]["members"]["policy"]["model"].values())
    gaps = [json.loads(x)["logp_gap"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert 1e-6 < max(gaps) < 0.3


@pytest.mark.parametrize("variables, bfloat16, words", [
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, False, "mixed_precision: bf16"),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, True, "--dtype says bfloat16"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, True, "fp8"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, False, "DeepSpeed"),
])  # fmt: skip
def test_what_the_launcher_was_told_must_agree(monkeypatch, variables, bfloat16, words):
    monkeypatch.setenv("RANK", "0")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=words):
        World.start(bfloat16)


def test_the_launcher_says_how_many(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="a launcher has started 4"):
        train.resolve(["--processes", "2"])
    assert train.resolve([]).processes == 1


# ---------------------------------------------------------------------- processes that are lost


def process_of(rank: int, pid: int) -> psutil.Process:
    """The process of a rank, of those that `pid` started."""
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank) and "agents.train" in child.cmdline():
                return child
    raise AssertionError(f"no process of rank {rank}")


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("error: ")]


def endless(model: str, run: Path, **changes):
    """A run that is long enough to be interrupted, with a checkpoint after every step."""
    return small(model, steps=100_000, save=SaveConfig(every=1, keep=2), run=str(run), **changes)


def assert_it_goes_on(run: Path, log: Path) -> None:
    step = newest(run)
    again = ["--resume", str(run), "--steps", str(step + 1), "--processes", "1"]
    assert finish(forked(again, log), log, 250) == 0, log.read_text()
    assert newest(run) == step + 1


@pytest.mark.full
@pytest.mark.parametrize("how, code, words", [
    ("SIGKILL", 1, "process 1 of 2 has ended"),
    ("SIGSTOP", 1, "did not answer for 25 s (--peer-timeout-s)"),
])  # fmt: skip
def test_a_lost_process_ends_the_run_in_a_line(model_folder, tmp_path, how, code, words):  # noqa: F811
    """Killed, or hanging for longer than the others are told to wait."""
    run, log = tmp_path / "run", tmp_path / "log"
    pid = forked(as_arguments(endless(model_folder, run, processes=2, peer_timeout_s=25.0)), log)
    assert wait_for_step(pid, run, 2, log) is None, log.read_text()
    other = process_of(1, pid)
    os.kill(other.pid, getattr(signal, how))
    assert finish(pid, log, 120) == code, log.read_text()
    (line,) = errors(log)
    assert words in line and f"python -m agents.train --resume {run}" in line and "Traceback" not in log.read_text()
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    assert_it_goes_on(run, log)


@pytest.mark.full
def test_the_first_process_is_killed(model_folder, tmp_path):  # noqa: F811
    """The others say so, and end."""
    run, log = tmp_path / "run", tmp_path / "log"
    pid = forked(as_arguments(endless(model_folder, run, processes=2)), log)
    assert wait_for_step(pid, run, 2, log) is None, log.read_text()
    other = process_of(1, pid)
    os.kill(pid, signal.SIGKILL)
    assert finish(pid, log) == -signal.SIGKILL
    other.wait(30)
    (line,) = errors(log)
    assert "process 0 of 2 has ended" in line and f"--resume {run}" in line and "Traceback" not in log.read_text()
    assert_it_goes_on(run, log)


@pytest.mark.full
@pytest.mark.parametrize("name, rank", [("ddp", 1), ("fsdp2", 1), ("fsdp2", 0)])
def test_a_process_of_accelerates_launcher_is_killed(model_folder, tmp_path, name, rank):  # noqa: F811
    """Our line stands before the launcher's own report; its exit code says that the run failed."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = launched(name, as_arguments(endless(model_folder, run)), log)
    end = time.monotonic() + 120
    while newest(run) < 2:
        assert launcher.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.01)
    process_of(rank, launcher.pid).kill()
    assert launcher.wait(90) == 1
    (line,) = errors(log)
    assert f"process {rank} of 2 has ended" in line and f"-m agents.train --resume {run}" in line
    assert_it_goes_on(run, log)
