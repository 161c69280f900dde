"""An episode between chat format and engine: what is fed, what is sampled, and where a token budget cuts it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agents.chat import ChatFormat, Messages
from agents.engines.base import Engine, Sampled, SampleParams
from agents.episode import Episode, Limits, key_of
from agents.ledger import Ledger, common_prefix
from agents.pictures import Picture
from policy_opt.protocols import Job, Sampler


class Playing:
    """One running episode: its tokens, and what the engine still owes it."""

    def __init__(
        self, episode: Episode, job: Job, chat: ChatFormat, engine: Engine, limits: Limits, version: int
    ) -> None:
        self.episode, self.chat, self.engine, self.limits, self.version = episode, chat, engine, limits, version
        self.key, self.job = key_of(job), job
        self.room = min(limits.max_context, engine.max_context)
        self.left = job.budget
        self.said = Sampled((), (), "stop")
        self.heard = 0
        self.cut = False
        result, params = episode.result, getattr(engine, "params", episode.result.sampler)
        self.sampler = job.sampler if job.sampler is not None and not is_plain(job.sampler, params) else None
        if result.ledger is None:
            result.ledger, result.version = Ledger(), version
            result.sampler = replace(params, temperature=self.sampler.temperature) if self.sampler else params
        if self.sampler is not None and self.sampler.hook is not None:
            result.facts["temperature_rule"] = self.sampler.hook
        self.ledger = result.ledger

    def open(self) -> None:
        """Feed the opening, or all there is of an episode that goes on, and ask for a turn."""
        episode = self.episode
        if episode.over:
            return
        if episode.result.unfinished:
            episode.result.unfinished, episode.result.stop_reason = False, ""
            self._ask(self.ledger.concat(), self.ledger.shown())
            return
        ids = self.chat.opening(episode.messages, episode.tools)
        if episode.job.hint is None:
            self._feed(ids, episode.messages)
        else:
            messages = with_hint(episode.messages, episode.job.hint)
            hinted = self.chat.opening(messages, episode.tools)
            self._feed(hinted, messages, privileged=_added(ids, hinted))

    def hear(self, more: Sampled) -> None:
        """Record what was sampled of a turn: all of it, unless the job's budget cut it or had cut it before."""
        before = self._begun()
        self.ledger.act(more.ids, more.logps, len(self.episode.result.turns), self.version)
        self.said, self.heard = Sampled((*before, *more.ids), (), more.stop), len(more.ids)
        if self.left is not None:
            self.left -= len(more.ids)
            full = len(self.said.ids) >= self.limits.max_new_tokens or len(self.ledger.segments[-1]) >= self.room
            self.cut = self.left == 0 and more.stop == "length" and not full

    def speak(self) -> None:
        """Give the turn to the environment. Touches nothing shared, so that threads may do it."""
        if not self.said.ids or self.cut:
            return
        text, result = self.chat.decode(self.said.ids), self.episode.result
        self.episode.say(text, self.said.stop)
        if result.first_call is None and result.turns[-1].calls:
            result.first_call = self.ledger.sampled - len(self.said.ids) + self._call_at(self.said.ids)

    def _call_at(self, ids: Sequence[int]) -> int:
        """How many of a turn's tokens stand before the one that makes the text a call."""
        form = getattr(getattr(self.episode.env, "unwrapped", self.episode.env), "call_format", None)
        if form is None:
            return 0
        return bisect_left(range(len(ids)), True, key=lambda n: bool(form.parse(self.chat.decode(ids[: n + 1])).calls))

    def follow(self) -> None:
        """Feed what the environment answered and ask for the next turn, or end for want of room."""
        episode, stop = self.episode, self.said.stop
        if episode.over or self.cut:
            return
        if stop == "context" or stop.startswith("error:"):
            episode.finish(stop)
            return
        new = len(episode.obs["messages"])
        history, messages = episode.messages[: len(episode.messages) - new], episode.obs["messages"]
        if self.chat.rewrites(history, messages, episode.tools):
            self.engine.close(self.key)
            self._feed(self.chat.opening(episode.messages, episode.tools), episode.messages, branch=True)
        else:
            ids = self.chat.continuation(messages, history=history, tools=episode.tools, stopped=stop == "stop")
            self._feed(ids, messages)

    def _feed(
        self, ids: Sequence[int], messages: Messages, *, branch: bool = False, privileged: range = range(0)
    ) -> None:
        """Record the tokens of some messages and ask for a turn, or end the episode for want of room."""
        held = 0 if branch else len(self.ledger.segments[-1])
        if held + len(ids) >= self.room:
            self.episode.finish("context")
            return
        turn, pictures = len(self.episode.result.turns), self.chat.shown(ids, messages)
        if branch:
            self.ledger.branch(ids, turn, pictures=pictures)
        else:
            self.ledger.observe(ids, turn, privileged=privileged, pictures=pictures)
        self._ask(ids, [picture for _, picture in pictures])

    def _ask(self, ids: Sequence[int], pictures: Sequence[Picture]) -> None:
        """Feed ids that the ledger holds already and ask for the (rest of the) turn, if the budget allows one."""
        self.cut = self.left == 0
        if self.cut:
            return
        begun, result = len(self._begun()), self.episode.result
        stream = (result.seed, self.job.group, self.job.member, len(result.turns), *([begun] if begun else []))
        budget = min(self.limits.max_new_tokens - begun, self.room - len(self.ledger.segments[-1]))
        budget = budget if self.left is None else min(budget, self.left)
        self.engine.turn(self.key, ids, stream, budget, self.sampler, pictures)

    def _begun(self) -> tuple[int, ...]:
        """What has been sampled of the turn that is under way."""
        segment, turn = self.ledger.segments[-1], len(self.episode.result.turns)
        start = len(segment)
        while start and segment.mask[start - 1] and segment.turn[start - 1] == turn:
            start -= 1
        return tuple(segment.ids[start:])

    def leave(self) -> None:
        """Leave the episode unfinished."""
        self.episode.result.unfinished, self.episode.result.stop_reason = True, "budget"


def is_plain(sampler: Sampler, params: SampleParams) -> bool:
    """Whether a job's sampler asks for nothing but what the engine does anyway."""
    return sampler.hook is None and sampler.temperature == params.temperature


def with_hint(messages: Messages, hint: str) -> list[dict[str, Any]]:
    """The conversation with privileged text after its last user message (as a message of its own if none)."""
    out = [dict(m) for m in messages]
    for message in reversed(out):
        if message["role"] == "user":
            message["content"] = _with(message["content"], f"\n\n{hint}")
            return out
    return [*out, {"role": "user", "content": hint}]


def _with(content: Any, text: str) -> Any:
    """A message's content with a text after it."""
    return content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]


def _added(plain: Sequence[int], hinted: Sequence[int]) -> range:
    """Which of `hinted`'s tokens are not in `plain`: what lies between their common beginning and common end."""
    start = common_prefix(plain, hinted)
    return range(start, len(hinted) - common_prefix(plain[start:][::-1], hinted[start:][::-1]))
