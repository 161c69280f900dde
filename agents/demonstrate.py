"""An environment's demonstrators at play: conversations to imitate, and token records as a rollout leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agents.chat import ChatFormat
from agents.cli import UsageError, assignments, nearest
from agents.engines.base import Key, Said, Voice
from agents.engines.scripted import Scripted
from agents.imitate import Conversation, record
from agents.ledger import Ledger
from agents.rollout import Limits, MakeEnv, play_text
from agents.trajectory import Trajectory
from policy_opt.protocols import Job


class _Listening:
    """A speaker that plays scripts and notes which tools each episode was offered."""

    def __init__(self, weights: Mapping[str, float]):
        self.scripts = Scripted(weights)
        self.tools: dict[Key, Sequence[Mapping[str, Any]]] = {}

    def begin(self, env: Any, seed: Key) -> Voice:
        voice = self.scripts.begin(env, seed)

        def listen(messages: Sequence[Mapping[str, Any]], obs: Mapping[str, Any], max_new_tokens: int) -> Said:
            self.tools.setdefault(seed, obs.get("tools", ()))
            return voice(messages, obs, max_new_tokens)

        return listen


def demonstrator_weights(make_env: MakeEnv, chosen: Sequence[str] = ()) -> dict[str, float]:
    """Shares of the scripts to imitate: those chosen (NAME=SHARE), or the environment's own; empty where it has none.

    Raises UsageError for a script that the environment does not have, and for a share that is no number above zero.
    """
    env = make_env()
    core: Any = getattr(env, "unwrapped", env)
    env.close()
    if not chosen:
        return dict(getattr(core, "demonstrators", {}))
    shares = assignments(chosen, "--warm.scripts")
    for name, share in shares.items():
        if name not in core.scripts:
            raise UsageError(f"--warm.scripts: no script `{name}`{nearest(name, core.scripts)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
            raise UsageError(f"--warm.scripts {name}={share}: a share is a number above zero")
    return {name: float(share) for name, share in shares.items()}


def conversations(
    make_env: MakeEnv, weights: Mapping[str, float], jobs: Sequence[Job], seed: int, limits: Limits
) -> list[tuple[Trajectory, Conversation]]:
    """One episode per job by scripts drawn with these weights, and what was said in it."""
    speaker = _Listening(weights)
    played = play_text(jobs, make_env, speaker, limits, seed)
    tools = [tuple(speaker.tools.get((seed, t.group, t.member), ())) for t in played]
    return [(t, Conversation(tuple(t.messages), own)) for t, own in zip(played, tools, strict=True)]


def demonstrations(
    make_env: MakeEnv, weights: Mapping[str, float], tasks: Sequence[int], seed: int, max_turns: int
) -> list[Conversation]:
    """One episode per training task; those that failed are left out."""
    jobs = [Job(task, group=i, member=0) for i, task in enumerate(tasks)]
    played = conversations(make_env, weights, jobs, seed, Limits(max_turns=max_turns))
    return [said for t, said in played if t.turns and not t.stop_reason.startswith("error:")]


def demonstrated(
    make_env: MakeEnv, chat: ChatFormat, jobs: Sequence[Job], seed: int, limits: Limits, version: int
) -> list[Trajectory]:
    """Demonstrations as a rollout would have left them, log-probs unknown (0), in the order of the jobs.

    One that failed or does not fit the context has no policy tokens, so that nothing is learned from it.

    Raises:
        UsageError: the environment has no demonstrators.
    """
    weights = demonstrator_weights(make_env)
    if not weights:
        raise UsageError("the recipe learns from demonstrations, and the environment has no demonstrators")
    found = []
    for t, said in conversations(make_env, weights, jobs, seed, limits):
        t.ledger, t.version = _ledger(chat, t, said, limits.max_context), version
        found.append(t)
    return found


def _ledger(chat: ChatFormat, t: Trajectory, said: Conversation, room: int) -> Ledger:
    if t.turns and not t.stop_reason.startswith("error:"):
        ledger = record(chat, said)
        if max(len(segment) for segment in ledger.segments) <= room:
            return ledger
    empty = Ledger()
    empty.observe(chat.stop_ids[:1], 0)
    return empty
