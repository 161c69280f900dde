"""Episodes: engine + chat format + environments -> trajectories, in the order of the jobs.

All running episodes share the engine's batch; as one ends the next job begins. What goes wrong in an episode
is its outcome: an environment that raises gives a trajectory with stop reason `error:<type>` and no verdict,
and costs no other episode anything.

Turns that are cut:
- A turn cut by its own token limit is given to the environment like any other, which decides what it is
  worth. If play goes on, the turn is closed with tokens that are not the policy's.
- Where the context is full, what was said is given to the environment; if that does not end the episode, it
  is ended with `context` and graded as it stands.
- Where a job's own token budget is used up, the episode is left as it stands, perhaps in the middle of a turn:
  unfinished, without a verdict. A later job may go on with it, under the policy of then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

from agents.chat import ChatFormat
from agents.engines.base import Engine, Key, Speaker
from agents.episode import EnvPool, Episode, Limits, MakeEnv, key_of
from agents.playing import Playing
from agents.trajectory import Trajectory
from agents.workers.errors import WorkerError
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


Kept = dict[Key, Episode]
"""Unfinished episodes by name, their environments in mid-episode."""


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
    threads: int | None = None,
    pool: EnvPool | None = None,
    kept: Kept | None = None,
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
        threads: that step environments; 0 steps them in turn, which is faster below ~1 ms a step. None: one for each
            worker that `make_env` has, if it has any.
        pool: environments kept between calls; None makes them anew and closes them at the end.
        kept: unfinished episodes; jobs with `resume` take theirs from here, those whose budget is used up are put
            here. None: nobody will go on with them.

    Raises:
        ValueError: two jobs of one name, or a job that asks for what a rollout cannot do.
        ChatFormatError: the chat template cannot render this environment's messages.
    """
    kept = {} if kept is None else kept
    _check(jobs, kept)
    engines = list(engine) if isinstance(engine, Sequence) else [engine]
    own = EnvPool(make_env) if pool is None else pool
    tally = _Tally(len(jobs), on_progress)
    run = partial(
        _play_share, chat=chat, limits=limits, seed=seed, version=version, options=options or {},
        threads=threads_for(make_env, threads), pool=own, tally=tally, kept=kept,
    )  # fmt: skip
    shares = _shares(jobs, len(engines))
    if len(engines) == 1:
        played = [run(shares[0], engines[0])]
    else:
        with ThreadPoolExecutor(len(engines), thread_name_prefix="engine") as every:
            played = list(every.map(run, shares, engines))
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
    threads: int,
    pool: EnvPool,
    tally: _Tally,
    kept: Kept,
) -> dict[Key, Trajectory]:
    """Play jobs on one engine: admit, sample, step, until all are over or cut off."""
    engine.reset()
    version = engine.version if version is None else version
    waiting, running, finished = deque(jobs), dict[Key, Playing](), dict[Key, Trajectory]()
    with _each(threads, lambda p: p.episode.env) as each:
        while waiting or running:
            admitted = [waiting.popleft() for _ in range(min(len(waiting), engine.rows - len(running)))]
            fresh = [
                Playing(
                    kept.pop(key_of(job)) if job.resume else Episode(job, pool.take(), seed, limits),
                    job, chat, engine, limits, version,
                )
                for job in admitted
            ]  # fmt: skip
            running |= {p.key: p for p in fresh}
            each(lambda p: p.episode.reset(options), [p for p in fresh if not p.job.resume])
            for p in fresh:
                p.open()
            heard = []
            for key, turn in engine.run():
                running[key].hear(turn)
                heard.append(running[key])
            each(Playing.speak, heard)
            for p in heard:
                p.follow()
            over = {p.key: p for p in (*fresh, *heard) if p.episode.over or p.cut}
            for p in over.values():
                engine.close(p.key)
                finished[p.key] = running.pop(p.key).episode.result
                if p.episode.over:
                    pool.give(p.episode.env, broken=p.episode.broken)
                else:
                    p.leave()
                    kept[p.key] = p.episode
            tally.add(len(over), sum(p.heard for p in heard))
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
    threads: int | None = None,
    pool: EnvPool | None = None,
) -> list[Trajectory]:
    """`play` for speakers without tokens; `ledger` is None. `threads` episodes run at once (0: one by one).

    A speaker that fails (`Said.stop` is `error:...`) ends its episode with that stop reason; it is graded as
    it stands.
    """
    _check(jobs, {}, text=True)
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

    with _each(threads_for(make_env, threads)) as each:
        results = each(one, jobs)
    if pool is None:
        own.close()
    return results


def _converse(episode: Episode, speaker: Speaker, limits: Limits) -> int:
    """Play one episode in text; the tokens that the speaker counted."""
    job, tokens = episode.job, 0
    voice = speaker.begin(episode.env, (episode.result.seed, job.group, job.member))
    while not episode.over:
        try:
            said = voice(episode.messages, episode.obs, limits.max_new_tokens)
        except WorkerError as error:  # a script speaks beside its environment
            episode.fail(error)
            break
        tokens += said.tokens
        if said.stop.startswith("error:"):
            episode.finish(said.stop)
        else:
            episode.say(said.text, said.stop)
    return tokens


def _check(jobs: Sequence[Job], kept: Kept, text: bool = False) -> None:
    seen: set[Key] = set()
    for job in jobs:
        if key_of(job) in seen:
            raise ValueError(f"two jobs are called (group, member) = {key_of(job)}")
        seen.add(key_of(job))
        for what in ("edit", "rescore", *(("resume", "budget") if text else ("demo",))):
            if getattr(job, what):
                raise ValueError(f"job {key_of(job)} asks for `{what}`, which a rollout{' in text' * text} cannot do")
        if job.resume and key_of(job) not in kept:
            raise ValueError(f"job {key_of(job)} is to go on with an episode, but no unfinished one has that name")
        if job.budget is not None and job.budget < 1:
            raise ValueError(f"job {key_of(job)} has a budget of {job.budget} tokens; it must be at least 1")


def threads_for(make_env: MakeEnv, threads: int | None) -> int:
    """Threads to step environments in: as many as asked for, else one for each worker of `make_env`."""
    if threads is not None:
        return threads
    return len(make_env) if isinstance(make_env, Sized) else 0


Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


@contextmanager
def _each(threads: int, env_of: Callable[[Any], Any] = lambda item: None) -> Iterator[Map]:
    """A `map` that runs in threads, or in turn where `threads` is 0; results in order.

    Items whose environments share a worker run one after the other in one thread: no thread waits for another's.
    """
    if threads <= 0:
        yield lambda fn, items: [fn(item) for item in items]
        return

    def spread(fn: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        lanes: dict[Any, list[int]] = {}
        for i, item in enumerate(items):
            lanes.setdefault(getattr(env_of(item), "worker", i), []).append(i)
        parts = pool.map(lambda lane: [(i, fn(items[i])) for i in lane], lanes.values())
        done = dict(pair for part in parts for pair in part)
        return [done[i] for i in range(len(items))]

    with ThreadPoolExecutor(threads, thread_name_prefix="env") as pool:
        yield spread
