"""Episodes: engine + chat format + environments -> trajectories, in the order of the jobs.

All running episodes share the engine's batch; as one ends the next job begins. What goes wrong in an episode
is its outcome: an environment that raises gives a trajectory with stop reason `error:<type>` and no verdict,
and costs no other episode anything.

Turns that are cut:
- A turn cut by its own token limit is given to the environment like any other, which decides what it is
  worth. If play goes on, the turn is closed with tokens that are not the policy's.
- Where the context is full, what was said is given to the environment; if that does not end the episode, it
  is ended with `context` and graded as it stands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

from agents.chat import ChatFormat, Messages, text_of
from agents.engines.base import Engine, Key, Sampled, Speaker
from agents.episode import EnvPool, Episode, Limits, MakeEnv, key_of
from agents.ledger import Ledger, common_prefix
from agents.trajectory import Trajectory
from policy_opt.protocols import Job


@dataclass(frozen=True)
class Progress:
    """How far a rollout is."""

    done: int
    """Episodes that are over."""
    total: int
    """Episodes in all."""
    tokens: int
    """Tokens sampled so far."""


OnProgress = Callable[[Progress], None]


class Playing:
    """An episode between chat format and engine: its tokens."""

    def __init__(self, episode: Episode, chat: ChatFormat, engine: Engine, limits: Limits, version: int) -> None:
        self.episode, self.chat, self.engine, self.limits = episode, chat, engine, limits
        self.key = key_of(episode.job)
        self.ledger = Ledger()
        self.room = min(limits.max_context, engine.max_context)
        self.turn = Sampled((), (), "stop")
        result = episode.result
        result.ledger, result.version = self.ledger, version
        result.sampler = getattr(engine, "params", result.sampler)

    def open(self) -> None:
        """Feed the opening and ask for the first turn."""
        episode = self.episode
        if episode.over:
            return
        ids = self.chat.opening(episode.messages, episode.tools)
        if episode.job.hint is None:
            self._feed(ids)
        else:
            hinted = self.chat.opening(with_hint(episode.messages, episode.job.hint), episode.tools)
            self._feed(hinted, privileged=_added(ids, hinted))

    def hear(self, turn: Sampled) -> None:
        """Record a sampled turn."""
        self.turn = turn
        self.ledger.act(turn.ids, turn.logps, len(self.episode.result.turns), self.episode.result.version)

    def speak(self) -> None:
        """Give the turn to the environment. Touches nothing shared, so that threads may do it."""
        if self.turn.ids:
            self.episode.say(self.chat.decode(self.turn.ids), self.turn.stop)

    def follow(self) -> None:
        """Feed what the environment answered and ask for the next turn, or end for want of room."""
        episode, stop = self.episode, self.turn.stop
        if episode.over:
            return
        if stop == "context":
            episode.finish("context")
            return
        new = len(episode.obs["messages"])
        history, messages = episode.messages[: len(episode.messages) - new], episode.obs["messages"]
        if self.chat.rewrites(history, messages, episode.tools):
            self.engine.close(self.key)
            self._feed(self.chat.opening(episode.messages, episode.tools), branch=True)
        else:
            self._feed(self.chat.continuation(
                messages, history=history, tools=episode.tools, stopped=stop == "stop"
            ))  # fmt: skip

    def _feed(self, ids: Sequence[int], *, branch: bool = False, privileged: range = range(0)) -> None:
        held = 0 if branch else len(self.ledger.segments[-1])
        if held + len(ids) >= self.room:
            self.episode.finish("context")
            return
        turn, cut = len(self.episode.result.turns), (privileged.start, privileged.stop)
        if branch:
            self.ledger.branch(ids, turn)
        else:
            self.ledger.observe(ids[: cut[0]], turn)
            self.ledger.observe(ids[cut[0] : cut[1]], turn, privileged=True)
            self.ledger.observe(ids[cut[1] :], turn)
        job = self.episode.job
        stream = (self.episode.result.seed, job.group, job.member, turn)
        budget = min(self.limits.max_new_tokens, self.room - held - len(ids))
        self.engine.turn(self.key, ids, stream, budget)


def play(
    jobs: Sequence[Job],
    make_env: MakeEnv,
    chat: ChatFormat,
    engine: Engine | Sequence[Engine],
    limits: Limits,
    seed: int,
    version: int | None = None,
    on_progress: OnProgress | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
    pool: EnvPool | None = None,
) -> list[Trajectory]:
    """Play all jobs; the trajectories stand in the order of the jobs.

    Args:
        jobs: which tasks; (group, member) names the episode and, with the run's seed, its random streams.
        make_env: builds an environment; called at most once per concurrent episode.
        chat: messages to tokens.
        engine: samples; it is reset first, because what it keeps may be of older weights. Several engines
            over one model play their shares of the groups in threads of their own, for small models on idle
            cores.
        limits: what an episode may use up.
        seed: the run's seed.
        version: policy version for the record; None takes the engine's.
        on_progress: told whenever episodes end.
        options: further reset options (`level`, ...).
        workers: threads that step environments; 0 steps them in turn, which is faster below ~1 ms a step.
        pool: environments kept between calls; None makes them anew and closes them at the end.

    Raises:
        ValueError: two jobs of one name, or a job that asks for more than a fresh episode.
        ChatFormatError: the chat template cannot render this environment's messages.
    """
    _check(jobs)
    engines = list(engine) if isinstance(engine, Sequence) else [engine]
    own = EnvPool(make_env) if pool is None else pool
    tally = _Tally(len(jobs), on_progress)
    run = partial(
        _play_share, chat=chat, limits=limits, seed=seed, version=version, options=options or {},
        workers=workers, pool=own, tally=tally,
    )  # fmt: skip
    shares = _shares(jobs, len(engines))
    if len(engines) == 1:
        played = [run(shares[0], engines[0])]
    else:
        with ThreadPoolExecutor(len(engines), thread_name_prefix="engine") as threads:
            played = list(threads.map(run, shares, engines))
    if pool is None:
        own.close()
    by_key = {key: trajectory for share in played for key, trajectory in share.items()}
    return [by_key[key_of(job)] for job in jobs]


def _shares(jobs: Sequence[Job], n: int) -> list[list[Job]]:
    """Whole groups dealt out in turn, in the order of their first job."""
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    return [[job for group in list(groups.values())[i::n] for job in group] for i in range(n)]


def _play_share(
    jobs: Sequence[Job],
    engine: Engine,
    *,
    chat: ChatFormat,
    limits: Limits,
    seed: int,
    version: int | None,
    options: Mapping[str, Any],
    workers: int,
    pool: EnvPool,
    tally: _Tally,
) -> dict[Key, Trajectory]:
    """Play jobs on one engine: admit, sample, step, until all are over."""
    engine.reset()
    version = engine.version if version is None else version
    waiting, running, finished = deque(jobs), dict[Key, Playing](), dict[Key, Trajectory]()
    with _each(workers) as each:
        while waiting or running:
            fresh = [
                Playing(Episode(waiting.popleft(), pool.take(), seed, limits), chat, engine, limits, version)
                for _ in range(min(len(waiting), engine.rows - len(running)))
            ]
            running |= {p.key: p for p in fresh}
            each(lambda p: p.episode.reset(options), fresh)
            for p in fresh:
                p.open()
            heard = []
            for key, turn in engine.run():
                running[key].hear(turn)
                heard.append(running[key])
            each(Playing.speak, heard)
            for p in heard:
                p.follow()
            over = {p.key: p for p in (*fresh, *heard) if p.episode.over}
            for p in over.values():
                engine.close(p.key)
                finished[p.key] = running.pop(p.key).episode.result
                pool.give(p.episode.env, broken=p.episode.broken)
            tally.add(len(over), sum(len(p.turn.ids) for p in heard))
    return finished


class _Tally:
    """Counts episodes and tokens of all threads and tells whoever wants to know."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done = self._tokens = 0
        self._total, self._tell, self._lock = total, on_progress, Lock()

    def add(self, done: int, tokens: int) -> None:
        """So many more episodes are over, so many more tokens sampled."""
        with self._lock:
            self._done, self._tokens = self._done + done, self._tokens + tokens
            if done and self._tell is not None:
                self._tell(Progress(self._done, self._total, self._tokens))


def play_text(
    jobs: Sequence[Job],
    make_env: MakeEnv,
    speaker: Speaker,
    limits: Limits,
    seed: int,
    on_progress: OnProgress | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
    pool: EnvPool | None = None,
) -> list[Trajectory]:
    """`play` for speakers without tokens; `ledger` is None. `workers` episodes run at once (0: one by one).

    A speaker that fails (`Said.stop` is `error:...`) ends its episode with that stop reason; it is graded as
    it stands.
    """
    _check(jobs)
    own = EnvPool(make_env) if pool is None else pool
    tally = _Tally(len(jobs), on_progress)

    def one(job: Job) -> Trajectory:
        env = own.take()
        episode = Episode(job, env, seed, limits)
        episode.reset(options or {})
        tokens = 0 if episode.over else _converse(episode, speaker, limits)
        own.give(env, broken=episode.broken)
        tally.add(1, tokens)
        return episode.result

    with _each(workers) as each:
        results = each(one, jobs)
    if pool is None:
        own.close()
    return results


def _converse(episode: Episode, speaker: Speaker, limits: Limits) -> int:
    """Play one episode in text; the tokens that the speaker counted."""
    job, tokens = episode.job, 0
    voice = speaker.begin(episode.env, (episode.result.seed, job.group, job.member))
    while not episode.over:
        said = voice(episode.messages, episode.obs, limits.max_new_tokens)
        tokens += said.tokens
        if said.stop.startswith("error:"):
            episode.finish(said.stop)
        else:
            episode.say(said.text, said.stop)
    return tokens


def with_hint(messages: Messages, hint: str) -> list[dict[str, Any]]:
    """The conversation with privileged text after its last user message (as a message of its own if none)."""
    out = [dict(m) for m in messages]
    for message in reversed(out):
        if message["role"] == "user":
            message["content"] = f"{text_of(message['content'])}\n\n{hint}"
            return out
    return [*out, {"role": "user", "content": hint}]


def _added(plain: Sequence[int], hinted: Sequence[int]) -> range:
    """Which of `hinted`'s tokens are not in `plain`: what lies between their common beginning and common end."""
    start = common_prefix(plain, hinted)
    return range(start, len(hinted) - common_prefix(plain[start:][::-1], hinted[start:][::-1]))


def _check(jobs: Sequence[Job]) -> None:
    seen: set[Key] = set()
    for job in jobs:
        if key_of(job) in seen:
            raise ValueError(f"two jobs are called (group, member) = {key_of(job)}")
        seen.add(key_of(job))
        for what in ("edit", "resume", "demo", "rescore"):
            if getattr(job, what):
                raise ValueError(f"job {key_of(job)} asks for `{what}`; a rollout plays fresh episodes")


@contextmanager
def _each(workers: int) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]]:
    """A `map` that runs in threads, or in turn where `workers` is 0; results in order."""
    if workers <= 0:
        yield lambda fn, items: [fn(item) for item in items]
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="env") as threads:
        yield lambda fn, items: list(threads.map(fn, items))
