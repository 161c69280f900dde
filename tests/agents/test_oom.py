"""Out of memory in a micro-batch: halved and done again, counted, with the gradient of the undisturbed run."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from transformers.modeling_layers import GradientCheckpointingLayer

from agents import train
from agents.critic import trunk_of
from agents.dist import World
from agents.launcher import free_port
from agents.learner import LMLearner
from agents.memory import NoRoom, in_halves
from agents.packing import plan
from policy_opt.batch import Batch
from tests.agents.test_learner import LOGP, batch
from tests.agents.test_packing import gpt2, grouped, world
from tests.agents.test_resume import final
from tests.agents.test_train import model_folder, own_cache, small, start  # noqa: F401  (fixtures)


class Small:
    """A device with room for so many tokens at a time; more raise what torch raises, in the pass that is named."""

    def __init__(self, model, most: int, where: str):
        self.most, self.tokens, self.failures = most, 0, 0
        trunk = trunk_of(model)
        trunk.register_forward_pre_hook(lambda m, a, k: self.enter(k["input_ids"], where), with_kwargs=True)
        if where == "backward":  # the last layer has its gradient by then, the first does not
            first = next(m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer))
            first.register_forward_hook(lambda m, a, out: self.arm(out))

    def enter(self, tokens: torch.Tensor, where: str) -> None:
        self.tokens = tokens.numel()
        if where == "forward":
            self.check(self.tokens)

    def arm(self, out: torch.Tensor) -> None:
        if out.requires_grad:
            tokens = self.tokens
            out.register_hook(lambda grad: self.check(tokens))

    def check(self, tokens: int) -> None:
        if tokens > self.most:
            self.failures += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} tokens")


def results(b: Batch, where: str | None = None, most: int = 30, before: float = 0.0, **options):
    one = LMLearner(gpt2(), **options)
    one.score(b, [LOGP])  # tries what the model can
    if before:
        for p in one.model.parameters():
            p.grad = torch.full_like(p, before)
    device = Small(one.model, most, where) if where else None
    weight_BT = torch.linspace(-1, 1, b.B, dtype=torch.float64)[:, None] * b.mask_BT
    streams = one.backward(b, [LOGP], lambda rows, live: {"logp_BT": weight_BT[rows] * live["logp_BT"]})
    streams["again_BT"] = one.score(b, [LOGP])["logp_BT"]
    return {**streams, **{n: p.grad for n, p in one.model.named_parameters()}}, one, device


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("rows", [batch, grouped])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("before", [0.0, 0.5])
def test_the_gradient_is_that_of_the_undisturbed_run(where, rows, packing, before):
    b = rows()
    want, calm, _ = results(b, packing=packing, before=before)
    got, one, device = results(b, where, packing=packing, before=before)
    assert calm.count_splits() == 0
    assert device.failures > 0 and one.count_splits() == device.failures and one.count_splits() == 0
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_without_a_shortage_nothing_is_done_twice():
    b = batch()
    _, one, _ = results(b)
    seen = []
    trunk_of(one.model).register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    one.backward(b, [LOGP], lambda rows, live: {"logp_BT": b.mask_BT[rows].double()})
    assert sum(seen) == int(b.real_BT.sum(1)[b.mask_BT.any(1)].sum())


def test_a_failed_forward_costs_only_its_own_micro_batch():
    """A failed backward pass costs those before it too."""
    b = batch(rows=24)
    chunks = plan(b, torch.ones(b.B, dtype=torch.bool), 60, world(0, 1), False, "never")
    for spoils in (False, True):
        done, failed = [], []

        def work(chunk, done=done, failed=failed):
            if chunk is chunks[2] and not failed:
                failed.append(chunk)
                raise torch.OutOfMemoryError("no room")
            done.append(chunk)

        assert in_halves(chunks, b.real_BT.sum(1).tolist(), work, lambda spoils=spoils: spoils) == 1
        assert len(done) == len(chunks) + 1 + (2 if spoils else 0)


def test_other_errors_pass():
    def work(chunk):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    b = batch()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        in_halves(plan(b, b.mask_BT.any(1), 60, world(0, 1), False), b.real_BT.sum(1).tolist(), work)


def test_a_row_that_does_not_fit_alone():
    with pytest.raises(NoRoom, match=r"a row of 1\d tokens does not fit .*--recompute .*--rollout.max-context"):
        results(batch(), "backward", most=9)


def test_processes_that_hold_shards_do_not_halve():
    b = batch()

    def work(chunk):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(NoRoom, match="split over processes: give a smaller --micro-tokens, or --recompute"):
        in_halves(plan(b, b.mask_BT.any(1), 60, world(0, 1), False), b.real_BT.sum(1).tolist(), work, alone=False)


def worker(rank: int, port: int, folder: str, where: str) -> None:
    """Only the second process is short of memory."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": "2"}
    world = World.start()
    torch.set_num_threads(1)
    found, one, _ = results(batch(rows=12), where if rank == 1 else None, most=30, world=world)
    norm = one.step()["grad_norm"]
    torch.save({**{n: found[n] for n in ("logp_BT", "again_BT")}, "norm": torch.tensor(norm),
                "splits": torch.tensor(one.count_splits())}, f"{folder}/{rank}.pt")  # fmt: skip
    world.close()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_process_of_two_is_short(tmp_path, where):
    mp.start_processes(worker, (free_port(), str(tmp_path), where), nprocs=2, start_method="fork")
    want, one, _ = results(batch(rows=12))
    norm = one.step()["grad_norm"]
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got["splits"] > 0
        for name in ("logp_BT", "again_BT"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-9)
        assert float(got["norm"]) == pytest.approx(norm, rel=1e-6)


def test_a_run_goes_on_and_counts(model_folder, tmp_path):  # noqa: F811
    calm = start(small(model_folder, steps=2, dtype="float64"), tmp_path / "calm")
    calm.run()
    assert [x["oom_splits"] for x in calm.history] == [0, 0]
    short = start(small(model_folder, steps=2, dtype="float64", packing="always"), tmp_path / "short")
    trunk = short.session.model.model

    def check(m, args, options):
        if torch.is_grad_enabled() and options["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trunk.register_forward_pre_hook(check, with_kwargs=True)
    short.run()
    assert all(x["oom_splits"] > 0 for x in short.history)
    assert [x["reward"] for x in short.history] == [x["reward"] for x in calm.history]
    for name, value in calm.session.model.state_dict().items():
        got = short.session.model.state_dict()[name]
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-7)  # Qwen3's norms are float32


def test_a_run_that_cannot_go_on_says_how_it_could(capsys, monkeypatch, model_folder, tmp_path):  # noqa: F811
    """Exit code 1 and a line; with --micro-tokens, --packing or --recompute of another value it is the same run."""
    config = small(model_folder, steps=2, dtype="float64")
    whole = start(config, tmp_path / "whole")
    whole.run()
    whole.folder.close()
    run = tmp_path / "run"
    begun = start(replace(config, steps=1, processes=1), run)
    begun.run()
    begun.folder.close()
    full = torch.OutOfMemoryError("CUDA out of memory.")
    with monkeypatch.context() as short:
        short.setattr("agents.streams.Work.hidden", lambda self, name, piece: (_ for _ in ()).throw(full))
        assert train.main(["--resume", str(run), "--steps", "2"]) == 1
    said = capsys.readouterr().err
    assert "does not fit into memory" in said and f"go on with: python -m agents.train --resume {run}" in said
    assert train.main(["--resume", str(run), "--steps", "2", "--recompute", "--micro-tokens", "64"]) == 0
    assert json.loads((run / "config.json").read_text())["recompute"] is True
    for name, value in final(tmp_path / "whole")["learner"]["members"]["policy"]["model"].items():
        other = final(run)["learner"]["members"]["policy"]["model"][name]
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-7)  # Qwen3's norms are float32
