"""`python -m agents.train --env tool_qa`: train an agent, from warm start to report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from agents import checkpoint, cli
from agents.chat import ChatFormatError
from agents.config import TrainConfig
from agents.dist import World
from agents.display import Plain
from agents.runfolder import RunFolder
from agents.session import build
from agents.trainer import Interrupted, Trainer, save_config
from policy_opt.errors import RecipeError


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    config = cli.parse(TrainConfig, argv, "python -m agents.train")
    world = World()
    display = Plain(config.steps)
    session = build(config, world)
    for note in session.notes:
        display.note(note)
    folder = RunFolder.create(Path(config.run) if config.run else None, Path(config.runs),
                              f"{session.make_env().unwrapped.__class__.__name__}-{session.recipe.slug}-s{config.seed}")
    save_config(folder, config)
    trainer = Trainer(session, folder, display)
    try:
        summary = trainer.run()
    except Interrupted as stop:
        print(f"python -m agents.train --resume {folder.path}", file=sys.stderr)
        return 128 + stop.number
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    cli.run(main, (RecipeError, ChatFormatError, checkpoint.CheckpointError))
