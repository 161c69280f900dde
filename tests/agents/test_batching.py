"""Trajectories as batches: nothing lost, nothing invented, segments as rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.batching import answer_number, batch_of
from agents.ledger import Ledger
from agents.trajectory import Trajectory, TurnInfo
from envs import Verdict
from policy_opt.batch import concat


@st.composite
def trajectories(draw: Any) -> list[Trajectory]:
    """Up to five trajectories with up to three segments and three turns each, some of them empty or failed."""
    out = []
    for number in range(draw(st.integers(1, 5))):
        ledger, turns = Ledger(), draw(st.integers(0, 3))
        for turn in range(turns):
            seen = draw(st.lists(st.integers(0, 90_000), min_size=1, max_size=4))
            if turn and draw(st.booleans()):
                ledger.branch(seen, turn)
            else:
                ledger.observe(seen, turn)
            ids = draw(st.lists(st.integers(0, 90_000), min_size=1, max_size=4))
            ledger.act(ids, [-draw(st.floats(0, 9, width=32)) for _ in ids], turn, version=draw(st.integers(0, 7)))
        failed = draw(st.booleans())
        facts = {"tool_calls": turns, "late": True, "name": "x", "turns": 9}
        scores = {"correct": 1.0} | ({"format": 0.5} if number % 2 else {})
        out.append(
            Trajectory(
                task_id=f"t{number}",
                task_index=number + 10,
                split="train",
                level=1,
                group=number // 2,
                member=number % 2,
                ledger=ledger,
                reward=-1.0 if failed else 0.5,
                verdict=None if failed else Verdict(0.5, scores, facts),
                turns=[TurnInfo("a", stop="length" if number == 1 else "stop")] * turns,
            )
        )
    return out


@settings(max_examples=80, deadline=None)
@given(trajectories())
def test_every_token_stands_where_it_belongs(played: list[Trajectory]) -> None:
    b = batch_of(played)
    rows = [(t, j, s) for t in played for j, s in enumerate(t.ledger.segments)]
    assert b.B == len(rows)
    for row, (t, j, s) in enumerate(rows):
        n = len(s)
        assert b.tokens_BT[row, :n].tolist() == s.ids and not b.tokens_BT[row, n:].any()
        assert b.real_BT[row].tolist() == [True] * n + [False] * (b.T - n)
        assert b.mask_BT[row, :n].tolist() == [bool(m) for m in s.mask] and not b.mask_BT[row, n:].any()
        assert b.logp_sampler_BT[row, :n].tolist() == s.logp
        assert b["turn_BT"][row, :n].tolist() == s.turn
        assert b.version_BT[row][b.mask_BT[row]].tolist() == [v for v, m in zip(s.version, s.mask, strict=True) if m]
        assert set(b["segment_BT"][row, :n].tolist()) <= {j}
        ids = ("group_B", "task_B", "member_B", "seat_B")
        assert [int(b[name][row]) for name in ids] == [t.group, t.task_index, t.member, 0]
        parent = int(b["parent_B"][row])
        assert parent == -1 if s.parent is None else rows[parent][:2] == (t, s.parent)
        assert float(b["reward_B"][row]) == t.reward and float(b["failed_B"][row]) == (t.verdict is None)
        assert int(b["length_B"][row]) == t.length and int(b["turns_B"][row]) == len(t.turns)
        assert float(b["truncated_B"][row]) == t.cut
    assert not b.logp_sampler_BT[~b.mask_BT].any()


@settings(max_examples=30, deadline=None)
@given(trajectories())
def test_verdicts_become_columns(played: list[Trajectory]) -> None:
    b = batch_of(played, scores=("correct", "format"), facts=("tool_calls",))
    assert b.names["scores_BK"] == ("correct", "format")
    rows = [t for t in played for _ in t.ledger.segments]
    for row, t in enumerate(rows):
        scores = t.verdict.scores if t.verdict else {}
        assert b["scores_BK"][row].tolist() == [scores.get("correct", 0.0), scores.get("format", 0.0)]
        assert float(b["correct_B"][row]) == scores.get("correct", 0.0)
        assert float(b["tool_calls_B"][row]) == (t.verdict.facts["tool_calls"] if t.verdict else 0)
    assert "late_B" not in b and "name_B" not in b
    if any(t.verdict for t in played):
        everything = batch_of(played)
        assert {"tool_calls_B", "late_B"} <= everything.columns and "name_B" not in everything


def test_answers_calls_and_levels() -> None:
    """Numbers of answers mean the same in every batch; what there is none of is -1."""

    def episode(key: Any, call: int | None, **changes: Any) -> Trajectory:
        ledger = Ledger()
        ledger.observe([1], 0)
        ledger.act([2, 3], [-1.0, -1.0], 0, 0)
        verdict = Verdict(1.0, {"correct": 1.0}, {"answer_key": key, "level": 3})
        t = Trajectory("a", 0, "train", 3, 0, 0, ledger=ledger, verdict=verdict, first_call=call)
        return replace(t, **changes)

    one = batch_of([episode("7", 1), episode("Toruna", None), episode("7", 0), episode(None, None)])
    two = batch_of([episode("Toruna", None), episode("7", 1)])
    answer = one["answer_B"]
    assert answer[0] == answer[2] == two["answer_B"][1] and answer[1] == two["answer_B"][0] != answer[0]
    assert answer[3] == -1 and min(answer[:3]) >= 0 and answer.double().long().equal(answer)
    assert answer_number("7") == int(answer[0])
    assert one["first_call_B"].tolist() == [1, -1, 0, -1]
    assert one["level_B"].tolist() == [3] * 4
    assert {one[name].dtype for name in ("answer_B", "first_call_B", "level_B")} == {torch.int64}
    assert one["finished_B"].tolist() == [1] * 4
    [cut] = batch_of([episode(None, None, verdict=None, unfinished=True)])["finished_B"].tolist()
    assert cut == 0


def test_batches_of_a_run_can_stand_under_each_other() -> None:
    """With the names given, a batch in which every episode failed has the same columns as any other."""
    ledger = Ledger()
    ledger.observe([1], 0)
    ledger.act([2], [-1.0], 0, 0)
    good = Trajectory("a", 0, "train", 1, 0, 0, ledger=ledger, verdict=Verdict(1.0, {"correct": 1.0}, {"calls": 2}))
    bad = replace(good, verdict=None, group=1)
    parts = [batch_of([t], scores=("correct",), facts=("calls",)) for t in (good, bad)]
    both = concat(parts)
    assert both["calls_B"].tolist() == [2, 0] and both["failed_B"].tolist() == [0, 1]


def test_what_has_no_tokens_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="no trajectories"):
        batch_of([])
    with pytest.raises(ValueError, match="task q/3 has no token record"):
        batch_of([Trajectory("q/3", 3, "train", 1, 0, 0)])
