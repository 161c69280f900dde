"""Episodes cut off by a token budget and gone on with: nothing lost, nothing done twice, exact across checkpoints."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

from agents import checkpoint
from agents.actor import LMActor, Player
from agents.chat import ChatFormat
from agents.checkpoint import pack, unpack
from agents.config import SaveConfig
from agents.dist import World
from agents.engines.hf import HFEngine
from agents.engines.reference import plain_log_probs
from agents.rollout import Limits, play, play_text
from agents.trainer import Trainer
from policy_opt.protocols import Job, Sampler
from tests.agents.letters import SHAPED
from tests.agents.small import Broken, Chatter, Noting, engine_for, qwen3
from tests.agents.test_resume import assert_same_run, final, resume
from tests.agents.test_train import model_folder, own_cache, small, start  # noqa: F401  (fixtures)
from tests.agents.tokenizers import CHATML, QWEN3, byte_bpe

SCRIPT = [[{"role": "tool", "content": f"result {i}"}] for i in range(2)]
LIMITS = Limits(max_new_tokens=7, max_context=300)


@cache
def setup(template: str = CHATML) -> tuple[ChatFormat, HFEngine]:
    chat = ChatFormat(byte_bpe(template))
    return chat, engine_for(chat, qwen3(len(chat.tokenizer)), rows=3)


def chatter() -> Chatter:
    return Chatter(script=SCRIPT)


def in_windows(window: int, make: Any = chatter, engine: Any = None, n: int = 4, template: str = CHATML) -> Any:
    """Play n episodes in stretches of so many tokens; how many tokens each stretch sampled, and the episodes."""
    chat, plain = setup(template)
    kept: dict[Any, Any] = {}
    jobs = [Job(i, i, 0, budget=window) for i in range(n)]
    found, stretches, before = {}, [], dict.fromkeys(range(n), 0)
    for version in range(200):
        for t in play(jobs, make, chat, engine or plain, LIMITS, 5, version, kept=kept):
            found[t.group] = t
            stretches.append(t.length - before[t.group])
            before[t.group] = t.length
        jobs = [Job(g, g, 0, resume=True, budget=window) for g, t in sorted(found.items()) if t.unfinished]
        assert set(kept) == {(j.group, 0) for j in jobs}
        if not jobs:
            return stretches, [found[g] for g in range(n)]
    raise AssertionError("never ends")


@pytest.mark.parametrize("window, template", [(1, CHATML), (7, CHATML), (1000, CHATML), (4, QWEN3)])
@pytest.mark.filterwarnings("ignore:.*rewrites history")
def test_an_episode_in_stretches_is_a_whole_one(window: int, template: str) -> None:
    """Every stretch within its budget; tokens keep version and log-prob; the engine saw what the ledger says."""
    chat, plain = setup(template)
    engine = Noting(plain)
    stretches, episodes = in_windows(window, engine=engine, template=template)
    assert max(stretches) <= window and (window < 1000) == (len(stretches) > len(episodes))
    for t in episodes:
        assert t.stop_reason == "answered" and not t.unfinished and t.verdict is not None and len(t.turns) == 3
        assert t.verdict.facts["turns"] == 3
        turns: dict[int, list[int]] = {}
        for s in t.ledger.segments:
            logp = plain_log_probs(plain.model, s.ids, chat.banned_ids).tolist()
            assert max(abs(logp[i - 1] - s.logp[i]) for i, m in enumerate(s.mask) if m) <= 1e-9
            versions = [v for v, m in zip(s.version, s.mask, strict=True) if m]
            assert versions == sorted(versions)
            for i, m in enumerate(s.mask):
                if m:
                    turns.setdefault(s.turn[i], []).append(s.ids[i])
        assert [chat.decode(ids) for ids in turns.values()] == [turn.text for turn in t.turns]
        assert max(map(len, turns.values())) <= LIMITS.max_new_tokens
        sampled = [v for s in t.ledger.segments for v, m in zip(s.version, s.mask, strict=True) if m]
        assert all(sampled.count(v) <= window for v in set(sampled))
        fed = engine.closed[t.group, 0]
        assert fed[-1] == t.ledger.concat()


def test_what_follows_does_not_depend_on_neighbours_or_on_where_else_it_was_cut() -> None:
    """A stretch is a function of the tokens so far, the policy and the name of the episode."""
    whole = [t.ledger.concat() for t in in_windows(4)[1]]
    assert [t.ledger.concat() for t in in_windows(4, n=2)[1]] == whole[:2]
    assert [t.ledger.concat() for t in in_windows(1000)[1]] != whole


def test_an_environment_that_fails_later_is_an_outcome() -> None:
    _, episodes = in_windows(3, make=lambda: Broken(where="step", on=(1,), script=SCRIPT))
    assert [t.stop_reason for t in episodes] == ["answered", "error:RuntimeError", "answered", "answered"]


def test_jobs_that_cannot_be_played_are_named() -> None:
    chat, engine = setup()
    with pytest.raises(ValueError, match=r"\(0, 0\) is to go on .* no unfinished one"):
        play([Job(0, 0, 0, resume=True)], chatter, chat, engine, LIMITS, 5)
    with pytest.raises(ValueError, match="at least 1"):
        play([Job(0, 0, 0, budget=0)], chatter, chat, engine, LIMITS, 5)
    with pytest.raises(ValueError, match="`budget`, which a rollout in text cannot do"):
        play_text([Job(0, 0, 0, budget=3)], chatter, None, LIMITS, 5)


# ---------------------------------------------------------------------------------------- across checkpoints


def actor_of(make: Any = chatter) -> LMActor:
    chat, engine = setup()
    return LMActor(Player(make, chat, engine, LIMITS, 5, version=lambda: 1), torch.float64)


def onwards(actor: LMActor) -> Any:
    """Play on until all are finished; the batches."""
    waiting = sorted(actor.player.carried.waiting)
    while waiting:
        actor.begin()
        b = actor.play([Job(g, g, m, resume=True, budget=4, sampler=Sampler(0.8)) for g, m in waiting])
        yield b
        waiting = sorted(actor.player.carried.waiting)


def test_a_checkpoint_holds_unfinished_episodes() -> None:
    """Tensors and plain values only; the environment is made again from its turns."""
    one, two = actor_of(), actor_of()
    one.begin()
    first = one.play([Job(g, g, 0, budget=5, sampler=Sampler(0.8)) for g in range(4)])
    assert first["finished_B"].tolist() == [0] * 4 and first["failed_B"].tolist() == [0] * 4
    assert first["temperature_B"].tolist() == [0.8] * 4 and first["answer_B"].tolist() == [-1] * 4
    tensors: dict[str, torch.Tensor] = {}
    state = pack(one.state_dict(), tensors)
    two.load_state_dict(unpack(copy.deepcopy(state), tensors))
    batches = list(onwards(one))
    assert len(batches) > 2
    for a, b in zip(batches, onwards(two), strict=True):
        assert a.columns == b.columns == first.columns
        for name in a.columns:
            assert torch.equal(a[name], b[name]), name
    assert int(batches[-1]["finished_B"].min()) == 1 and not one.player.carried.live


def test_an_environment_that_does_not_repeat_itself_is_an_outcome() -> None:
    one, two = actor_of(), actor_of(lambda: Chatter(script=[[{"role": "tool", "content": "another"}]] * 2))
    one.play([Job(g, g, 0, budget=9) for g in range(3)])
    two.load_state_dict(one.state_dict())
    [b] = [two.play([Job(g, g, 0, resume=True) for g in range(3)])]
    assert [t.stop_reason for t in two.played] == ["error:ReplayError"] * 3
    assert b["failed_B"].tolist() == [1] * 3 and not two.player.carried.waiting


def test_what_nobody_goes_on_with_is_dropped_an_iteration_later() -> None:
    actor = actor_of()
    actor.begin()
    actor.play([Job(g, g, 0, budget=5) for g in range(2)])
    actor.begin()
    actor.play([Job(0, 0, 0, resume=True, budget=2)])
    assert sorted(actor.player.carried.waiting) == [(0, 0), (1, 0)]
    actor.begin()
    assert sorted(actor.player.carried.waiting) == sorted(actor.player.carried.live) == [(0, 0)]


class Side(World):
    """One of two processes, played by threads: values are handed over as pickles, as between processes."""

    def __init__(self, rank: int, table: list[Any], meet: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self.table, self.meet = rank, 2, table, meet

    def gather(self, value: Any) -> list[Any]:
        if self.size == 1:  # it is being made
            return [value]
        self.table[self.rank] = pickle.dumps(value)
        self.meet.wait(60)
        found = [pickle.loads(entry) for entry in self.table]
        self.meet.wait(60)
        return found


def test_two_processes_go_on_as_one_does() -> None:
    """Each holds the environments of the episodes that it played, wherever those stand among the jobs."""
    chat, engine = setup()
    table, meet = [b"", b""], threading.Barrier(2)

    engines = [engine_for(chat, copy.deepcopy(engine.model), rows=3) for _ in range(2)]

    def run(world: World) -> list[Any]:
        actor = LMActor(Player(chatter, chat, engines[world.rank], LIMITS, 5, world), torch.float64)
        actor.begin()
        return [actor.play([Job(g, g, 0, budget=5, sampler=Sampler(0.8)) for g in range(5)]), *onwards(actor)]

    alone = run(World())
    with ThreadPoolExecutor(2) as threads:
        sides = list(threads.map(run, [Side(0, table, meet), Side(1, table, meet)]))
    for batches in sides:
        for a, b in zip(alone, batches, strict=True):
            for name in a.columns:
                torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-12)


T_PPO = {"algo": "t_ppo", "set": ("curriculum.window=1",)}


def test_resume_of_a_run_with_unfinished_episodes_is_exact(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, env=SHAPED, steps=4, save=SaveConfig(every=1, keep=9), **T_PPO)
    start(config, tmp_path / "whole").run()
    begun = start(config, tmp_path / "halved")
    iterate = begun.iterate

    def stopping() -> None:
        if begun.session.loop.step == 2:
            raise KeyboardInterrupt
        iterate()

    begun.iterate = stopping
    with pytest.raises(KeyboardInterrupt):
        begun.run()
    begun.folder.close()
    assert final(tmp_path / "halved")["actor"]["carried"], "nothing was unfinished, so nothing was tested"
    again: Trainer = resume(config, tmp_path / "halved")
    again.run()
    assert_same_run(tmp_path / "whole", tmp_path / "halved")
    assert max(m["logp_gap"] for m in again.history) <= 1e-4, "of the tokens that the present policy sampled"
    assert any(m.get("unfinished", 0) > 0 for m in again.history) and checkpoint.steps(
        tmp_path / "whole" / "checkpoints"
    ) == [0, 1, 2, 3, 4]
