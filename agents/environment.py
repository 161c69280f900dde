"""The environments of a run: made in this process, or in workers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from agents.cli import UsageError
from agents.config import WorkerConfig
from agents.episode import MakeEnv


def lived(config: WorkerConfig, workers: int, processes: int) -> list[str]:
    """Where environments live, as a note for the display, if not in this process.

    Args:
        workers: how many serve this process.
        processes: of the run.
    """
    if not workers:
        return []
    each = f" for each of {processes} processes" if processes > 1 else ""
    where = "on this machine" if config.ray is None else f"in the Ray cluster {config.ray}"
    watched = sys.platform == "linux" or config.ray is not None
    held = f"{config.memory_gib:g} GiB" if watched else "memory not watched on this system"
    return [f"environments: {workers} workers{each} {where}, {held}, {config.timeout_s:g} s a step"]


def losses(make_env: MakeEnv) -> int:
    """How many workers were lost so far; 0 where there are none."""
    return sum(getattr(make_env, "losses", {}).values())


def news(make_env: MakeEnv) -> list[str]:
    """What became of workers since this was last asked, in words."""
    tell = getattr(make_env, "news", None)
    return tell() if tell is not None else []


def close(make_env: MakeEnv) -> None:
    """End workers, which close their environments first."""
    end = getattr(make_env, "close", None)
    if end is not None:
        end()


def env_maker(
    spec: str, arguments: Mapping[str, Any], workers: int = 0, worker: WorkerConfig | None = None
) -> MakeEnv:
    """A function that makes the environment, in worker processes if asked for; mistakes show at once.

    Raises UnknownEnv with a did-you-mean, UsageError on a wrong argument or option, or where no worker stays up.
    """
    import envs

    if workers:
        from agents.workers.pool import start_workers

        return start_workers(spec, arguments, workers, worker or WorkerConfig())
    if worker is not None and worker.ray is not None:
        raise UsageError("--worker.ray names a cluster, but there are no workers to run on it: give --workers N")

    def make() -> Any:
        return envs.make(spec, **arguments)

    try:
        make().close()
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(f"{spec}: {error}") from error
    return make
