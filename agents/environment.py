"""The environments of a run: made in this process, or in workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agents.cli import UsageError
from agents.config import WorkerConfig
from agents.episode import MakeEnv


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
