"""Rollouts one iteration ahead with a language model: one behind, corrected, counted, exact across checkpoints."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import policy_opt
from agents import train
from agents.actor import LMActor, Player
from agents.ahead import Ahead, InThread, corrected
from agents.checkpoint import pack, unpack
from agents.cli import UsageError
from agents.config import AheadConfig, EvalConfig, OptimConfig, SaveConfig
from agents.dist import World
from agents.engines.base import EngineFailure
from agents.engines.hf import HFEngine
from agents.engines.reference import plain_log_probs
from agents.player_process import SharedWeights
from agents.sync import WeightSync, probe_ids
from agents.trainer import Interrupted, Trainer
from policy_opt.credits import MIS, TIS
from policy_opt.errors import RecipeError
from policy_opt.protocols import Job
from tests.agents.small import Chatter, qwen3
from tests.agents.test_resume import (
    arguments,
    assert_same_run,
    ended,
    final,
    finish,
    forked,
    interrupt,
    newest,
    wait_for_step,
)
from tests.agents.test_resume import resume as resumed
from tests.agents.test_train import WARM, model_folder, own_cache, small, start  # noqa: F401  (fixtures)
from tests.agents.test_unfinished import LIMITS, SCRIPT, T_PPO, Side, setup
from tools.processes import family

AHEAD = AheadConfig(on=True)


class OwnWeights(HFEngine):
    """The engine over a copy of the model: it samples from what was delivered, whatever the trainer does."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(copy.deepcopy(model), **options)
        self.delivered: list[int] = []

    def deliver(self, model: Any, version: int) -> None:
        self.delivered.append(version)
        self.model.load_state_dict(model.state_dict())
        self.version = version
        self.reset()

    def log_probs(self, ids, pictures=()):
        return plain_log_probs(self.model, ids, pictures=pictures).tolist()


def in_thread(trainer: Trainer) -> Trainer:
    """The trainer with an engine of its own that plays in a thread: what an engine beside the trainer does."""
    s = trainer.session
    old = s.player.engine
    how = {name: getattr(old, name) for name in ("stop_ids", "banned_ids", "params", "rows", "max_context")}
    s.player.engine = OwnWeights(s.model, **how)
    probe = probe_ids(old.vocab_size, 20)
    s.player.sync = WeightSync(s.player.engine, s.model, s.world, probe, 1e-4)
    if s.config.ahead.on:
        s.actor.ahead = Ahead(s.player, InThread())
    return trainer


def checked(trainer: Trainer) -> dict[str, Any]:
    """The run's summary; the numbers of every iteration are as they must be one step ahead."""
    noted: list[Any] = []
    iterate = trainer.session.loop.iterate

    def iterated(more: bool = True):
        b, numbers = iterate(more)
        noted.append(b.version_BT[b.mask_BT].unique().tolist())
        account = trainer.session.loop.account
        assert account.sent == account.arrived.trajectories + account.in_flight
        return b, numbers

    trainer.session.loop.iterate = iterated
    summary = trainer.run()
    for k, (m, versions) in enumerate(zip(trainer.history, noted, strict=True)):
        assert versions == [max(k - 1, 0)] and m["stale_max"] == min(k, 1)
        assert m["dropped_stale"] == 0 and m["total_played"] == m["total_trained"] == 12 * (k + 1)
    return summary


def test_it_trains_one_behind_and_corrected(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, steps=6, ahead=AHEAD, optim=OptimConfig(lr=3e-2))
    trainer = in_thread(start(config, tmp_path / "run"))
    assert trainer.session.recipe.credit == (TIS(2.0),)
    assert any("importance weights TIS(cap=2.0, level='token')" in note for note in trainer.session.notes)
    before = copy.deepcopy(trainer.session.model.state_dict())
    checked(trainer)
    assert trainer.session.loop.account.in_flight == 0
    assert max(m["stale_kl"] for m in trainer.history) > 1e-4, "the sampler was the policy, so nothing was corrected"
    assert max(m["logp_gap"] for m in trainer.history) <= 1e-4, "that of the weights that played"
    assert min(m["grad_norm"] for m in trainer.history) > 0
    assert any(not torch.equal(v, before[k]) for k, v in trainer.session.model.state_dict().items())
    assert trainer.session.player.engine.delivered == sorted(set(trainer.session.player.engine.delivered))


def test_where_weights_stand_still_ahead_is_the_synchronous_run(model_folder, tmp_path):  # noqa: F811
    """Batch for batch and number for number, with evaluations in between."""
    runs = []
    for on in (False, True):
        config = small(
            model_folder, steps=4, ahead=AheadConfig(on=on), optim=OptimConfig(lr=1e-30),
            eval=EvalConfig(episodes=8, hard_episodes=0, every=1, every_episodes=6),
        )  # fmt: skip
        trainer = in_thread(start(config, tmp_path / str(on)))
        episodes: list[Any] = []
        iterate = trainer.iterate

        def keeping(trainer=trainer, iterate=iterate, episodes=episodes):
            iterate()
            episodes.extend((t.group, t.member, t.ledger.concat(), t.reward) for t in trainer.session.actor.played)

        trainer.iterate = keeping
        trainer.run()
        runs.append((trainer, episodes))
    (sync, a), (ahead, b) = runs
    assert a == b and len(a) == 48
    assert [e["success"] for e in sync.evals] == [e["success"] for e in ahead.evals]
    for x, y in zip(sync.history, ahead.history, strict=True):
        for name in ("reward", "length", "entropy", "correct", "tokens"):
            assert x[name] == y[name]
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"algo": "dapo", "warm": WARM}, T_PPO], ids=["grpo", "dapo", "t_ppo"])
def test_resume_is_exact_with_a_rollout_in_flight(model_folder, tmp_path, changes):  # noqa: F811
    save, ahead = SaveConfig(every=2, keep=9), replace(AHEAD, staleness=3)
    config = small(model_folder, steps=5, ahead=ahead, save=save, **changes)
    in_thread(start(config, tmp_path / "whole")).run()
    begun = in_thread(start(config, tmp_path / "halved"))
    interrupt(begun)
    state = final(tmp_path / "halved")
    assert state["loop"]["step"] == 2 and len(state["actor"]["ahead"]["played"]) == state["loop"]["sent"]["jobs"] > 0
    again = in_thread(resumed(config, tmp_path / "halved"))
    again.restore(tmp_path / "halved" / "checkpoints" / "step-00000002")
    again.run()
    assert_same_run(tmp_path / "whole", tmp_path / "halved")
    assert final(tmp_path / "whole")["actor"]["ahead"] is None
    assert max(m.get("grad_norm", 0) for m in again.history) > 0, "nothing was learnt, so nothing was tested"


def test_a_signal_while_both_are_under_way_leaves_a_checkpoint_of_this_step(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, steps=4, ahead=AHEAD, save=SaveConfig(every=100, keep=2))
    in_thread(start(config, tmp_path / "whole")).run()
    begun = in_thread(start(config, tmp_path / "halved"))
    step = begun.session.learner.step

    def with_signal(lr_scale=1.0):
        if begun.session.loop.step == 1:
            assert begun.session.actor.ahead.flight is not None
            signal.raise_signal(signal.SIGINT)
        return step(lr_scale)

    begun.session.learner.step = with_signal
    with pytest.raises(Interrupted):
        begun.run()
    begun.folder.close()
    again = in_thread(resumed(config, tmp_path / "halved"))
    again.restore(tmp_path / "halved" / "checkpoints" / "step-00000002")
    again.run()
    assert_same_run(tmp_path / "whole", tmp_path / "halved")


def test_what_fails_behind_the_scenes_fails_in_front(model_folder, tmp_path):  # noqa: F811
    """At the next iteration, as one failure; the update that was under way is finished first."""
    config = small(model_folder, steps=4, ahead=AHEAD, save=SaveConfig(every=1, keep=2))
    trainer = in_thread(start(config, tmp_path / "run"))
    engine = trainer.session.player.engine
    run = engine.run

    def broken():
        if engine.version == 1:
            raise FloatingPointError("the model's logits are not finite")
        return run()

    engine.run = broken
    with pytest.raises(EngineFailure, match="rollout ahead failed: FloatingPointError: the model's logits are not"):
        trainer.run()
    # What learns iteration 1 is whole; its checkpoint waits for the rollout, so that the last one is of iteration 1.
    assert trainer.session.loop.step == 2 and newest(tmp_path / "run") == 1


def test_weights_that_did_not_arrive_are_caught_before_they_are_learned_from(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, steps=4, ahead=AHEAD, optim=OptimConfig(lr=0.1))
    trainer = in_thread(start(config, tmp_path / "run"))
    trainer.session.player.engine.deliver = lambda model, version: None
    with pytest.raises(EngineFailure, match="log-probs of the probe"):
        trainer.run()
    assert trainer.session.loop.step == 1


def test_two_processes_play_their_shares_ahead():
    """Each in a thread of its own; what they played is gathered when it is collected, in order of the jobs."""
    chat, engine = setup()
    import threading

    table, meet = [b"", b""], threading.Barrier(2)
    engines = [
        OwnWeights(engine.model, stop_ids=chat.stop_ids, banned_ids=chat.banned_ids, rows=3, max_context=300)
        for _ in range(3)
    ]

    def run(world: World, engine: HFEngine) -> list[Any]:
        player = Player(lambda: Chatter(script=SCRIPT), chat, engine, LIMITS, 5, world)
        actor = LMActor(player, torch.float64)
        actor.ahead = Ahead(player, InThread())
        found = []
        actor.send([Job(g, g, 0, budget=5) for g in range(5)])
        for _ in range(3):
            found.append(actor.collect())
            actor.begin()
            actor.send([Job(g, g, m, resume=True, budget=5) for g, m in sorted(player.carried.waiting)])
        actor.settle()
        tensors: dict[str, torch.Tensor] = {}
        state = unpack(pack(actor.state_dict(), tensors), tensors)
        again = LMActor(Player(lambda: Chatter(script=SCRIPT), chat, engine, LIMITS, 5, world), torch.float64)
        again.ahead = Ahead(again.player, InThread())
        again.load_state_dict(state)
        a, b = actor.collect(), again.collect()
        for name in a.columns:
            assert torch.equal(a[name], b[name]), name
        assert sorted(actor.player.carried.waiting) == sorted(again.player.carried.waiting)
        return [*found, a]

    alone = run(World(), engines[0])
    with ThreadPoolExecutor(2) as threads:
        sides = list(threads.map(run, [Side(0, table, meet), Side(1, table, meet)], engines[1:]))
    for batches in sides:
        for a, b in zip(alone, batches, strict=True):
            assert torch.equal(a["group_B"], b["group_B"])
            for name in a.columns:
                torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-12)


def test_importance_weights_are_added_once_and_where_they_fit():
    def credit(algo: str, config: AheadConfig = AHEAD, *settings: str) -> Any:
        return corrected(policy_opt.get(algo).set(*settings), config)

    assert credit("grpo")[0].credit == (TIS(2.0),)
    assert credit("grpo", replace(AHEAD, correction="mis", cap=4.0))[0].credit == (MIS(0.25, 4.0),)
    assert credit("gspo")[0].credit[-1] == TIS(2.0, "sequence"), "its loss is one per row"
    own, notes = credit("grpo", AHEAD, "credit+=tis(cap=5)")
    assert own.credit == (TIS(5),) and "importance weights of its own" in notes[0]
    plain, notes = credit("grpo", replace(AHEAD, correction="none"))
    assert plain.credit == () and "nothing corrects" in notes[0]
    assert corrected(policy_opt.get("grpo"), AheadConfig())[0] is policy_opt.get("grpo")
    with pytest.raises(RecipeError, match=r"takes no importance weights.*--ahead\.correction none"):
        credit("dpo")


def test_options_that_do_not_go_together(model_folder):  # noqa: F811
    from agents.session import build

    world = World()
    world.sharding = object()
    config = small(model_folder, ahead=AHEAD)
    session = build(config, World())
    from agents import ahead

    with pytest.raises(UsageError, match=r"--ahead\.on with FSDP"):
        ahead.build(config, world, session.player, session.model)
    assert train.default_processes(replace(config, model="bundled")) == 1, "what plays ahead is the second process"


@pytest.mark.parametrize("tied", [True, False])
def test_weights_travel_through_a_file(tied):
    one, two = qwen3(40, seed=0, tie_word_embeddings=tied), qwen3(40, seed=1, tie_word_embeddings=tied)
    frozen = one.model.norm.weight.requires_grad_(False)
    two.model.norm.weight.requires_grad_(False)
    ours = SharedWeights(one)
    theirs = SharedWeights(two, ours.path)
    os.unlink(ours.path)
    assert ours.write() is True
    theirs.read(True)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    with torch.no_grad():
        one.model.embed_tokens.weight.add_(1)
        kept = frozen.clone()
        frozen.add_(1)
    assert ours.write() is False, "frozen weights travel once"
    theirs.read(False)
    assert torch.equal(one.model.embed_tokens.weight, two.model.embed_tokens.weight)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert torch.equal(two.model.norm.weight, kept)


# ---------------------------------------------------------------------- in a process, as the command does it


def playing(pid: int) -> list[int]:
    """Processes that play ahead for a run."""
    found = []
    for member in family(pid)[1:]:
        try:
            line = Path(f"/proc/{member}/cmdline").read_bytes()
        except OSError:
            continue
        if b"player_process" in line:
            found.append(member)
    return found


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.full
@pytest.mark.parametrize("changes", [{}, T_PPO], ids=["grpo", "t_ppo"])
def test_a_process_plays_what_the_run_would_play(model_folder, tmp_path, changes):  # noqa: F811
    """The same run, bit for bit, whether a process or a thread with weights of its own plays ahead."""
    config = small(model_folder, steps=6, ahead=replace(AHEAD, staleness=9), **changes)
    trainer = start(config, tmp_path / "process")
    trainer.run() if changes else checked(trainer)
    in_thread(start(config, tmp_path / "thread")).run()
    a, b = (final(tmp_path / run) for run in ("process", "thread"))
    for name, value in a["learner"]["members"]["policy"]["model"].items():
        assert torch.equal(value, b["learner"]["members"]["policy"]["model"][name]), name
    assert max(m["logp_gap"] for m in trainer.history) <= 1e-4
    assert all(math.isfinite(m["wait_seconds"]) for m in trainer.history)


@pytest.mark.full
def test_kill_9_resume_and_a_player_that_is_killed(model_folder, tmp_path):  # noqa: F811
    """Whatever is killed, the run goes on from its checkpoint and ends as the one that nobody killed."""
    log, more = tmp_path / "log", ("--ahead.on", "--processes", "1")
    assert finish(forked(arguments(model_folder, tmp_path / "whole", *more), log), log) == 0, log.read_text()

    run = tmp_path / "killed"
    pid = forked(arguments(model_folder, run, *more), log)
    assert wait_for_step(pid, run, 2, log) is None, log.read_text()
    players = playing(pid)
    os.kill(pid, signal.SIGKILL)
    finish(pid, log)
    assert players and all(map(gone, players)), "it ends with the run"

    pid = forked(["--resume", str(run)], log)
    while not playing(pid):
        assert ended(pid) is None, log.read_text()
    os.kill(playing(pid)[0], signal.SIGKILL)
    assert finish(pid, log) == 1, log.read_text()
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "plays ahead was ended by signal SIGKILL" in said[0]
    assert f"go on with: python -m agents.train --resume {run}" in log.read_text()
    assert "Traceback" not in log.read_text()

    assert finish(forked(["--resume", str(run)], log), log) == 0, log.read_text()
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.full
def test_ctrl_c_ends_both(model_folder, tmp_path):  # noqa: F811
    log, run = tmp_path / "log", tmp_path / "run"
    pid = forked(arguments(model_folder, run, "--ahead.on", "--processes", "1", "--steps", "100000"), log)
    assert wait_for_step(pid, run, 2, log) is None, log.read_text()
    players = playing(pid)
    os.kill(pid, signal.SIGINT)
    assert finish(pid, log) == 130, log.read_text()
    assert f"python -m agents.train --resume {run}" in log.read_text() and "error" not in log.read_text()
    assert players and all(map(gone, players))


@pytest.mark.full
def test_two_processes_each_with_a_player(model_folder, tmp_path):  # noqa: F811
    """Collective calls stay in the main thread, while both play: the run of one process, up to rounding."""
    log, common = tmp_path / "log", ("--ahead.on", "--dtype", "float64", "--steps", "4")
    for n in (1, 2):
        argv = arguments(model_folder, tmp_path / str(n), *common, "--processes", str(n))
        assert finish(forked(argv, log), log, 300) == 0, log.read_text()
    a, b = (final(tmp_path / run)["learner"]["members"]["policy"]["model"] for run in ("1", "2"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-6, atol=1e-9)


