"""The token record equals what the engine was fed, for any environment and a tokenizer that is not bijective."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from agents.chat import ChatFormat
from agents.ledger import Ledger, LedgerError, Segment, common_prefix
from agents.rollout import Limits, play
from agents.trajectory import Trajectory
from policy_opt.protocols import Job
from tests.agents.small import Chatter, Noting, engine_for, qwen3
from tests.agents.tokenizers import CHATML, QWEN3, QWEN25, byte_bpe, lossy


@cache
def fed_engine(template: str, bijective: bool) -> tuple[ChatFormat, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chat = ChatFormat(byte_bpe(template) if bijective else lossy(template))
    model = qwen3(len(chat.tokenizer))
    return chat, engine_for(chat, model, rows=3, max_context=400)


def check(trajectories: list[Trajectory], noted: Noting, chat: ChatFormat) -> None:
    """concat(ledger) == fed, sampled and only sampled ids carry mask, log-prob and version."""
    for t in trajectories:
        assert t.ledger is not None
        held = noted.closed.get((t.group, t.member), [])
        assert [t.ledger.concat(i) for i in range(len(t.ledger.segments))] == (held or [[]])
        for number, s in enumerate(t.ledger.segments):
            assert len({len(s.ids), len(s.mask), len(s.logp), len(s.version), len(s.turn)}) == 1
            assert s.parent == (number - 1 if number else None)
            assert all((lp <= 0 and v == t.version) if m else (lp == 0 and v == -1)
                       for lp, v, m in zip(s.logp, s.version, s.mask, strict=True))  # fmt: skip
            assert s.turn == sorted(s.turn)
            assert set(chat.banned_ids).isdisjoint(i for i, m in zip(s.ids, s.mask, strict=True) if m)
        sampled = [i for s in t.ledger.segments for i, m in zip(s.ids, s.mask, strict=True) if m]
        assert len(sampled) == t.length
        texts = [turn.text for turn in t.turns]
        assert texts == [m["content"] for m in t.messages if m["role"] == "assistant"]
        assert t.ledger.turns == len(texts)


said = st.text(alphabet="aAbZ <|im_start|>\n\ud800\x00é", max_size=12)
new = st.lists(
    st.builds(lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "tool"]), said), min_size=1, max_size=2
)


@settings(max_examples=25, deadline=None)
@given(
    script=st.lists(new, max_size=3), template=st.sampled_from([CHATML, QWEN25, QWEN3]),
    bijective=st.booleans(), tokens=st.integers(1, 12), context=st.integers(24, 400), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_record_is_what_the_engine_was_fed(
    script: list, template: str, bijective: bool, tokens: int, context: int, seed: int
) -> None:
    chat, engine = fed_engine(template, bijective)
    noted = Noting(engine)
    jobs = [Job(task_index=i // 2, group=i // 2, member=i % 2) for i in range(4)]
    limits = Limits(max_turns=3, max_new_tokens=tokens, max_context=context)
    trajectories = play(jobs, lambda: Chatter(script=script), chat, noted, limits, seed)
    check(trajectories, noted, chat)
    for t in trajectories:
        assert t.verdict is not None, t.facts
        assert t.stop_reason in ("answered", "max_turns", "context")
        assert all(len(s) <= context for s in t.ledger.segments)


@pytest.mark.parametrize("name", envs.list_envs())
def test_record_of_every_environment(name: str) -> None:
    chat, engine = fed_engine(CHATML, False)
    noted = Noting(engine)
    jobs = [Job(task_index=i, group=i, member=0) for i in range(4)]
    limits = Limits(max_turns=3, max_new_tokens=8, max_context=400)
    trajectories = play(jobs, lambda: envs.make(name, profile="tiny"), chat, noted, limits, 1)
    check(trajectories, noted, chat)


def test_rewritten_history_becomes_a_segment_that_names_its_parent() -> None:
    """A template that forgets what the assistant said: every further turn has a segment of its own."""
    from tests.agents.tokenizers import FORGETFUL

    chat, engine = fed_engine(FORGETFUL, True)
    noted = Noting(engine)
    script = [[{"role": "user", "content": "go on"}], [{"role": "tool", "content": "more"}]]
    [t] = play([Job(0, 0, 0)], lambda: Chatter(script=script), chat, noted, Limits(max_new_tokens=5), 3)
    check([t], noted, chat)
    assert [s.parent for s in t.ledger.segments] == [None, 0, 1]
    assert [s.sampled > 0 for s in t.ledger.segments] == [True] * 3
    assert "gone" in chat.tokenizer.decode(t.ledger.concat(1))
    assert [set(s.turn) for s in t.ledger.segments] == [{0}, {1}, {2}]


def test_privileged_text_is_marked() -> None:
    chat, engine = fed_engine(CHATML, True)
    plain, hinted = (
        play([Job(0, 0, 0, hint=hint)], Chatter, chat, engine, Limits(max_new_tokens=4), 3)[0]
        for hint in (None, "it is Toruna")
    )
    [span] = hinted.ledger.segments[0].spans
    ids = hinted.ledger.concat()
    assert span.kind == "privileged" and not plain.ledger.segments[0].spans
    assert chat.tokenizer.decode(ids[span.start : span.start + span.length]).strip() == "it is Toruna"
    opening = plain.ledger.concat()[: plain.ledger.segments[0].mask.index(1)]
    without = ids[: span.start] + ids[span.start + span.length :]
    assert without[: len(opening)] == opening
    assert hinted.messages[0]["content"] == plain.messages[0]["content"]


def test_records_that_would_lie_are_refused() -> None:
    ledger = Ledger()
    with pytest.raises(LedgerError, match="begin with sampled"):
        ledger.act([1], [0.0], 0, 0)
    ledger.observe([1, 2], 0)
    with pytest.raises(LedgerError, match="2 sampled ids but 1 log-probs"):
        ledger.act([1, 2], [0.0], 0, 0)
    assert ledger.concat() == [1, 2]


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_counts() -> None:
    ledger = Ledger([Segment(ids=[1, 2, 3], mask=[0, 1, 1], logp=[0, -1, -1], version=[-1, 0, 0], turn=[0, 0, 0])])
    ledger.branch([4, 5], 1)
    ledger.act([6], [-0.5], 1, 2)
    assert (ledger.sampled, ledger.turns, len(ledger)) == (3, 2, 6)
