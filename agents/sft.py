"""`python -m agents.sft`: imitation on an environment's demonstrators, a run's stored episodes, or a JSONL file.

Only what the policy would have sampled is trained on: every assistant turn with its stop token. The tokens are those
of the ledger, so a model trained here continues in `agents.train` without a seam.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from agents import cli, demonstrate, warm
from agents.chat import ChatFormat
from agents.cli import Count, Fraction, Natural, UsageError
from agents.config import OptimConfig
from agents.display import Display, choose
from agents.forward import Convention
from agents.imitate import Conversation, imitate, likelihood, record
from agents.learner import LMLearner
from agents.ledger import Ledger
from agents.models import DTYPES, chat_of, export, is_tiny, load_model
from agents.optim import seeded
from agents.png import ImageFileError, opened
from agents.trajectory import Trajectory


@dataclass(frozen=True)
class SftConfig:
    """Imitate demonstrations: of an environment (--env) or from a file or run (--data)."""

    out: str | None = None
    """Folder of the resulting model (save_pretrained), new or empty; none: a new one under `runs`."""
    model: str = "bundled"
    """Model to start from: bundled, a run or model folder, or a Hugging Face id."""
    env: str | None = None
    """Environment whose demonstrators are imitated."""
    env_args: tuple[str, ...] = ()
    """Arguments of the environment, NAME=VALUE; may be given several times."""
    data: str | None = None
    """A run folder, or JSON lines with `messages` (OpenAI chat shape) and optionally `tools`."""
    only_correct: bool = True
    """From a run: successful episodes only."""
    episodes: Natural = 400
    """Demonstrations at most."""
    epochs: Natural = 2
    """Passes over them."""
    batch: Natural = 16
    """Conversations per optimizer step."""
    held_out: Fraction = 0.1
    """Share of the demonstrations that is kept aside to measure on."""
    max_context: Natural = 2048
    """Longer conversations are left out, and counted."""
    micro_tokens: Natural = 1024
    """Tokens of a training micro-batch, padding included."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, beta2=0.98, weight_decay=0.01))
    """The optimizer; its rate rises over a tenth of the steps and falls linearly to a tenth."""
    seed: Count = 0
    """Order, choice of demonstrations, what is held out."""
    dtype: Literal["float32", "float64"] = "float32"
    """Weights."""
    threads: Natural | None = None
    """Threads; none: 1 for models below 20 million parameters, else torch's choice."""
    json: bool = False
    """End with one line of JSON."""
    plain: bool = False
    """Plain lines instead of the live display."""


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    config = cli.parse(SftConfig, argv, "python -m agents.sft")
    if (config.env is None) == (config.data is None):
        raise UsageError("name what to imitate: either --env (its demonstrators) or --data (a run or a JSONL file)")
    with choose(0, plain=config.plain, silent=False) as display:
        result = train(config, display, out_folder(config))
    print(f"held-out: {result['nll_before']:.4f} -> {result['nll_after']:.4f} nats per token")
    print(f"model: {result['model']}")
    if config.json:
        print(json.dumps(result), flush=True)
    return 0


def out_folder(config: SftConfig) -> Path:
    """Where the model goes; UsageError where something is there already."""
    if config.out is not None:
        path = Path(config.out)
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            raise UsageError(f"{path} exists and is not empty")
        return path
    source = config.env or Path(config.data or "data").stem
    return Path("runs") / f"sft-{source.split(':')[-1].split('/')[-1]}-{time.strftime('%Y%m%d-%H%M%S')}"


def train(config: SftConfig, display: Display, out: Path) -> dict[str, Any]:
    """Imitate and export; returns likelihoods and counts."""
    model, tokenizer = load_model(config.model, DTYPES[config.dtype])
    torch.set_num_threads(config.threads or (1 if is_tiny(model) else torch.get_num_threads()))
    chat = chat_of(model, tokenizer)
    ledgers, dropped = demonstrations(config, chat)
    kept, aside = split(ledgers, config.held_out, config.seed)
    learner = LMLearner(
        model, seeded(config.optim, config.seed), convention=Convention(1.0, tuple(chat.banned_ids)),
        micro_tokens=config.micro_tokens,
    )  # fmt: skip
    before = likelihood(learner, aside)
    display.phase("imitation", f"{len(kept)} conversations, {len(aside)} held out, {dropped} too long")
    losses = imitate(
        learner, kept, epochs=config.epochs, batch=config.batch, seed=config.seed,
        progress=lambda step, steps, nll: display.progress("imitation", step, steps, f"{nll:.3f} nats/token"),
    )  # fmt: skip
    after = likelihood(learner, aside)
    card = [f"# {config.model} after imitation of {config.env or config.data}"]
    export(model, tokenizer, out, card, chat.pictures)
    return {
        "nll_before": before, "nll_after": after, "nll_last": losses[-1], "conversations": len(kept),
        "held_out": len(aside), "too_long": dropped, "steps": len(losses), "model": str(out),
    }  # fmt: skip


def demonstrations(config: SftConfig, chat: ChatFormat) -> tuple[list[Ledger], int]:
    """Ledgers to imitate, and how many conversations were too long. UsageError where there are too few."""
    if config.env is not None:
        from agents.environment import env_maker

        make_env = env_maker(config.env, cli.assignments(config.env_args, "--env-args"))
        weights = demonstrate.demonstrator_weights(make_env)
        if not weights:
            raise UsageError(f"{config.env} has no demonstrators; give --data")
        demos = demonstrate.demonstrations(make_env, weights, range(config.episodes), config.seed, max_turns=64)
        ledgers = [record(chat, demo) for demo in demos]
    elif Path(config.data or "").is_dir():
        ledgers = of_run(Path(config.data or ""), chat, config.only_correct)[: config.episodes]
    else:
        ledgers = [record(chat, c) for c in read(Path(config.data or ""))[: config.episodes]]
    fitting, dropped = warm.fitting(ledgers, config.max_context)
    if len(fitting) < 2:
        raise UsageError(f"{len(fitting)} usable conversations ({dropped} too long); imitation needs at least 2")
    return fitting, dropped


def of_run(run: Path, chat: ChatFormat, only_correct: bool) -> list[Ledger]:
    """Token records of a run's stored episodes, as they were sampled. UsageError where the tokenizer is another."""
    from agents.evaluate import is_correct
    from agents.store import StoreError, TrajectoryReader

    if (run / "model").is_dir():
        _, tokenizer = load_model(str(run))
        if tokenizer.get_vocab() != chat.tokenizer.get_vocab():
            raise UsageError(f"the episodes of {run} are tokens of another tokenizer than the model's")
    try:
        stored = list(TrajectoryReader(run / "trajectories"))
    except (StoreError, OSError) as error:
        raise UsageError(str(error)) from error
    good = [t for t in stored if is_correct(t) or not only_correct]
    return [shown_again(t.ledger, t, chat) for t in good if t.ledger is not None and t.ledger.sampled]


def shown_again(ledger: Ledger, t: Trajectory, chat: ChatFormat) -> Ledger:
    """A stored token record with its pictures, read anew from the images of its messages.

    UsageError where they are not the ones that its tokens speak of: another image processor.
    """
    ledger.pictures = {picture.key: picture for picture in chat.pictures_of(t.messages)}
    wanted = {span.ref for segment in ledger.segments for span in segment.spans if span.kind == "image"}
    if not wanted <= ledger.pictures.keys():
        raise UsageError(f"{t.task_id}: its images do not give the pictures that its tokens stand for")
    return ledger


def split(ledgers: Sequence[Ledger], share: float, seed: int) -> tuple[list[Ledger], list[Ledger]]:
    """Demonstrations to learn from and to measure on, at least one of each; a function of the seed."""
    order = torch.randperm(len(ledgers), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = min(len(ledgers) - 1, max(1, round(share * len(ledgers))))
    return [ledgers[i] for i in order[aside:]], [ledgers[i] for i in order[:aside]]


def read(path: Path) -> list[Conversation]:
    """Conversations of a JSONL file. UsageError names a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    return [_conversation(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def _conversation(line: str, where: str) -> Conversation:
    try:
        record = json.loads(line)
        messages = tuple(_message(m, Path(where).parent) for m in record["messages"])
        return Conversation(messages, tuple(record.get("tools") or ()))
    except ImageFileError as error:
        raise UsageError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{where} is no conversation ({error!r}); a line is {{\"messages\": [...]}}") from error


def _message(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A message whose structured tool calls, if any, are written into its text in the default call format.

    Images are `data:` URIs, or files named from `folder` on.
    """
    from tools.calls import HERMES, ToolCall

    content = message.get("content") or ""
    if not isinstance(content, str):
        content = [_part(part, folder) for part in content]
    out = {"role": str(message["role"]), "content": content}
    if "name" in message:
        out["name"] = str(message["name"])
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append(ToolCall(function["name"], arguments, ""))
    if calls:
        out["content"] = HERMES.render(str(out["content"]), calls)
    return out


def _part(part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A content part; images in OpenAI's shape (`image_url`), or under `image`."""
    if part["type"] == "text":
        return {"type": "text", "text": str(part["text"])}
    if part["type"] == "image_url":
        return {"type": "image", "image": opened(str(part["image_url"]["url"]), folder)}
    return {"type": "image", "image": opened(str(part["image"]), folder)}


if __name__ == "__main__":
    from agents.train import user_errors

    cli.run(main, user_errors)
