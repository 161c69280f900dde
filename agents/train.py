"""`python -m agents.train --env tool_qa`: train an agent, from warm start to report."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents import cli
from agents.cli import UsageError
from agents.config import TrainConfig
from agents.launcher import again, launched, refuse_second

if TYPE_CHECKING:  # the command line answers before torch and transformers are loaded
    from agents.display import Display
    from agents.dist import World
    from agents.runfolder import RunFolder
    from agents.session import Session
    from agents.trainer import Interrupted, Trainer

MODULE = "agents.train"
MAY_CHANGE = frozenset(
    {"steps", "eval", "save", "resume", "from_step", "dry_run", "json", "plain", "processes", "peer_timeout_s",
     "micro_tokens", "packing", "recompute", "workers", "worker"}
)
"""What a resumed run takes from the command line; anything else would make it another run."""


def resolve(argv: Sequence[str]) -> TrainConfig:
    """The configuration of a command line; with --resume, that of the run, and a refusal to change it."""
    run = _value_of("--resume", argv)
    if run is None:
        config = cli.parse(TrainConfig, argv, f"python -m {MODULE}")
        if config.from_step is not None:
            raise UsageError("--from-step names a checkpoint of a run to go on with: give --resume RUN as well")
        refuse_second(config.processes)
        return dataclasses.replace(config, processes=config.processes or default_processes(config))
    from agents.runfolder import read_json

    saved = cli.from_mapping(read_json(Path(run) / "config.json"), TrainConfig, where=f"{run}/config.json")
    config = cli.parse(TrainConfig, argv, f"python -m {MODULE}", default=saved)
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(saved, field.name), getattr(config, field.name)
        if old != new and field.name not in MAY_CHANGE:
            raise UsageError(
                f"a resumed run keeps its configuration: `{field.name}` was {old!r} and cannot become {new!r}. "
                f"Start a new run, or leave the option out"
            )
    refuse_second(config.processes if config.processes != saved.processes else None)
    return config


def default_processes(config: TrainConfig) -> int:
    """Two where each can have a core and the model is small enough to gain by it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # An engine of its own per process would not be faster, and what plays ahead is a process already.
    alone = config.engine != "hf" or config.ahead.on or "RANK" in os.environ
    return 2 if config.model == "bundled" and cores >= 2 and not alone else 1


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    for i, item in enumerate(argv):
        if item == option and i + 1 < len(argv):
            return argv[i + 1]
        if item.startswith(f"{option}="):
            return item.partition("=")[2]
    return None


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    config = resolve(argv)
    from agents.dist import World, lost

    with launched(MODULE, argv, config.processes or 1):
        world = None
        try:
            world = World.start(config.dtype == "bfloat16", config.peer_timeout_s)
            return _run(config, world)
        except RuntimeError as error:
            if (gone := lost(error, world)) is None:
                raise
            if world is None or world.speaks:
                print(f"error: {gone}{world.advice if world else ''}", file=sys.stderr)
            raise SystemExit(1) from None  # not a return: those that may hang are ended at once
        finally:
            if world is not None:
                world.close()


def _run(config: TrainConfig, world: World) -> int:
    from safetensors import SafetensorError

    from agents.display import choose
    from agents.engines.base import EngineFailure
    from agents.environment import close
    from agents.memory import NoRoom
    from agents.session import build
    from agents.trainer import Interrupted, Trainer
    from agents.workers.errors import WorkersBroken

    with choose(config.steps, plain=config.plain, silent=not world.main) as display:
        display.phase("setup", f"{config.model} on {config.env} with {config.algo}")
        session = build(config, world)
        for note in session.notes:
            display.note(note)
        if config.dry_run:
            from agents.estimate import estimate

            text = estimate(session)
            print(text) if world.main else None
            return 0
        folder, path = _folder_of(config, session, world)
        world.advice = f"; go on from the last checkpoint with: {again(MODULE, path)}"
        trainer = Trainer(session, folder, display)
        try:
            if config.resume:
                trainer.restore(world.on_main(lambda: _checkpoint_of(config, display)))
            summary = trainer.run()
        except Interrupted as stop:
            return _interrupted(stop, folder, display)
        except EngineFailure as error:
            if world.main or not error.everywhere:
                print(f"error: {error}\ngo on with: {again(MODULE, path)}", file=sys.stderr)
            return 1
        except (NoRoom, WorkersBroken) as error:
            print(f"error: {error}\ngo on with: {again(MODULE, path)}", file=sys.stderr)
            return 1
        except (OSError, SafetensorError) as error:  # a full disk, most likely; checkpoints are whole or absent
            if folder is None:
                raise
            print(f"error: {error}\nwhen there is room again: {again(MODULE, path)}", file=sys.stderr)
            return 1
        finally:
            close(session.make_env)
            if folder is not None:
                folder.close()
    if world.main:
        _report(summary, trainer, config)
    return 0


def _folder_of(config: TrainConfig, session: Session, world: World) -> tuple[RunFolder | None, Path]:
    """The run's folder on the process that writes, and its path on all."""
    opened: list[RunFolder] = []

    def open_it() -> Path:
        opened.append(open_folder(config, session))
        return opened[0].path

    path = world.on_main(open_it)
    return (opened[0] if opened else None), path


def open_folder(config: TrainConfig, session: Session) -> RunFolder:
    """The run's folder, its configuration written."""
    from agents.runfolder import RunFolder
    from agents.trainer import save_config

    if config.resume:
        folder = RunFolder.open(Path(config.resume))
    else:
        name = f"{config.env.split('/')[-1].split(':')[-1]}-{session.recipe.slug}-s{config.seed}"
        folder = RunFolder.create(Path(config.run) if config.run else None, Path(config.runs), name)
    save_config(folder, config)
    return folder


def _checkpoint_of(config: TrainConfig, display: Display) -> Path | None:
    """The checkpoint to go on from; None where the run was stopped before its first one."""
    from agents import checkpoint

    assert config.resume is not None
    folder = Path(config.resume) / "checkpoints"
    if config.from_step is not None:
        path = folder / f"step-{config.from_step:08d}"
        if not path.is_dir():
            known = ", ".join(map(str, checkpoint.steps(folder))) or "none"
            raise UsageError(f"{config.resume} has no checkpoint of step {config.from_step}; there are: {known}")
        return path
    if not checkpoint.steps(folder):
        display.note("the run was stopped before its first checkpoint: starting from the beginning")
        return None
    return checkpoint.latest(folder)


def _interrupted(stop: Interrupted, folder: RunFolder | None, display: Display) -> int:
    if folder is None:  # a helper process: its end is no failure
        return 0
    display.note(f"stopped by {stop}; go on with:\n  {again(MODULE, folder.path)}")
    return 128 + stop.number


def _report(summary: dict[str, Any], trainer: Trainer, config: TrainConfig) -> None:
    """The final table, and with --json one last line."""
    from agents.display import results_table

    results_table(summary, trainer.evals)
    if config.json:
        keys = ("success_before", "success_after", "success_harder", "run", "report", "seconds")
        print(json.dumps({k: summary[k] for k in keys if k in summary}), flush=True)


def user_errors() -> tuple[type[BaseException], ...]:
    """What the user got wrong: one line and exit code 2."""
    from agents.chat import ChatFormatError
    from agents.checkpoint import CheckpointError
    from envs import UnknownEnv
    from policy_opt.errors import RecipeError

    return (RecipeError, ChatFormatError, UnknownEnv, CheckpointError)


if __name__ == "__main__":
    cli.run(main, user_errors)
