"""`python -m agents.eval`: success of any policy on any environment, with intervals.

python -m agents.eval --env tool_qa --model bundled
python -m agents.eval --model runs/NAME --level hard --k 1,4
python -m agents.eval --env tool_qa --model http://localhost:8000/v1#NAME
python -m agents.eval --env tool_qa --model scripted:oracle --json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from agents import cli, environment
from agents.cli import Count, Fraction, Natural, NonNegative, Positive, UsageError
from agents.config import VllmConfig, WorkerConfig
from agents.engines.base import EngineFailure, SampleParams
from agents.evaluate import EvalResult, Player, TextPlayer, evaluate
from agents.rollout import Limits, MakeEnv
from agents.runfolder import plain, read_json
from agents.stats import Interval


@dataclass(frozen=True)
class EvalCommand:
    """Success of a policy on an environment, with 95 % intervals."""

    env: str | None = None
    """Environment: a name (python -m envs), package.module:Class, or jsonl:FILE; none: that of the run."""
    model: str = "bundled"
    """bundled, a run or model folder, a Hugging Face id, URL#MODEL of an OpenAI-compatible server, or
    scripted:NAME for a script of the environment."""
    against: str | None = None
    """A second policy, played on the same tasks; the paired difference (model less this one) is printed."""
    env_args: tuple[str, ...] = ()
    """Arguments of the environment, NAME=VALUE; may be given several times."""
    reward: str | None = None
    """Reward function of a jsonl environment, module:function."""
    episodes: Natural = 400
    """Episodes, rounded up to whole tasks."""
    k: str = "1"
    """The pass@k that are wanted, separated by commas; the largest is the number of episodes per task."""
    level: str | None = None
    """Difficulty level or mix of levels; none: the run's, or the environment's default mix."""
    split: str = "eval"
    """Split of the tasks."""
    seed: Count = 0
    """Seed of the sampling; the tasks are always the first ones of the split."""
    temperature: NonNegative = 1.0
    """Softmax temperature; 0 takes the likeliest token."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: Fraction = 1.0
    """Sample among the likeliest tokens of this total probability."""
    max_new_tokens: Natural | None = None
    """Sampled tokens per turn at most; none: the run's, or 128."""
    max_context: Natural | None = None
    """Tokens per episode at most; none: the run's, or 2048, within what the model holds."""
    max_turns: Natural = 64
    """Turns per episode at most; the environment may end it earlier."""
    rows: Natural = 128
    """Episodes played at the same time by a local model."""
    concurrency: Natural = 8
    """Episodes played at the same time by a server."""
    workers: Count = 0
    """Processes that step environments; 0: environments live in this process, which is faster below a millisecond a
    step."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    """Each of them."""
    timeout_s: Positive = 120.0
    """Seconds that a server may take for one turn."""
    retries: Count = 2
    """Further attempts after a server's time-out, lost connection or refusal for load."""
    tokenizer: str | None = None
    """Of a vLLM server: play with token ids instead of text, made with the tokenizer of this model (bundled, a run or
    model folder, or a Hugging Face id), exactly as in training and with a local model; none: text, which every
    server understands."""
    engine: Literal["hf", "vllm"] = "hf"
    """What samples from a local model: hf, the model itself; vllm, an engine of its own, which is verified against
    the model."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """The engine vllm."""
    native_tools: bool = True
    """Offer tools in the server's own form; off: describe them in the system message."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Weights of a local model."""
    device: str | None = None
    """Where a local model runs; none: the first accelerator, else the CPU."""
    threads: int | None = None
    """Threads of a local model; none: 1 below 20 million parameters, else torch's choice."""
    record: bool = True
    """Append the result to the run's eval.jsonl where the model is a run; `agents.view` shows it."""
    label: str = "eval"
    """Name of the evaluation in the report."""
    json: bool = False
    """Print one line of JSON instead of tables."""


def main(argv: Sequence[str]) -> int:
    """The command; 0, 3 where so many episodes lack a verdict that the score says little, 1 where a server is gone."""
    command = cli.parse(EvalCommand, argv, "python -m agents.eval")
    run = run_config(command.model)
    command = from_run(command, run)
    k = parse_k(command.k)
    make_env = env_maker(command)
    console = Console(stderr=command.json)
    specs = [command.model, *([command.against] if command.against else [])]
    try:
        results = [play_one(command, spec, make_env, k, console) for spec in specs]
    except EngineFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for line in environment.news(make_env):
            console.print(f"[yellow]{_safe(line)}[/]")
        environment.close(make_env)
    if command.record and run is not None:
        record(Path(command.model), results[0])
    if command.json:
        print(json.dumps(plain(as_json(results)), allow_nan=False))
    else:
        for result in results:
            show(result, console)
        if len(results) == 2:
            show_pair(results[0], results[1], console)
    return 3 if any(r.marked for r in results) else 0


def run_config(model: str) -> Mapping[str, Any] | None:
    """The configuration of the run that `model` is the folder of; None if it is none."""
    folder = Path(model)
    if not (folder / "metrics.jsonl").is_file() and not (folder / "checkpoints").is_dir():
        return None
    return read_json(folder / "config.json")


def from_run(command: EvalCommand, run: Mapping[str, Any] | None) -> EvalCommand:
    """Options left open, as in the run that the model comes from, or by default."""
    run = run or {}
    rollout = run.get("rollout") or {}
    env = command.env or run.get("env")
    if env is None:
        raise UsageError("name an environment: --env NAME (python -m envs lists them)")
    same = env == run.get("env")
    return replace(
        command,
        env=env,
        level=command.level if command.level is not None or not same else run.get("level"),
        env_args=command.env_args or (tuple(run.get("env_args") or ()) if same else ()),
        reward=command.reward or (run.get("reward") if same else None),
        max_new_tokens=command.max_new_tokens or rollout.get("max_new_tokens") or 128,
        max_context=command.max_context or rollout.get("max_context") or 2048,
    )


def parse_k(text: str) -> tuple[int, ...]:
    """`1,4` as (1, 4)."""
    try:
        ks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"--k takes whole numbers separated by commas, such as 1,4; not {text!r}") from None
    if ks[0] < 1 or ks[-1] > 10_000:
        raise UsageError(f"--k must lie between 1 and 10000, not {text!r}")
    return ks


def env_maker(command: EvalCommand) -> MakeEnv:
    """A function that makes the environment, in workers if asked for; mistakes show at once."""
    from envs import EnvConflict, UnknownEnv

    spec = str(command.env)
    arguments = cli.assignments(command.env_args, "--env-args") | {"split": command.split}
    if command.level is not None:
        arguments["level"] = int(command.level) if command.level.isdigit() else command.level
    if command.reward is not None:
        arguments["reward"] = command.reward

    try:
        return environment.env_maker(spec, arguments, command.workers, command.worker)
    except (UnknownEnv, EnvConflict) as error:
        raise UsageError(str(error)) from error


def play_one(
    command: EvalCommand, spec: str, make_env: MakeEnv, k: tuple[int, ...], console: Console
) -> EvalResult:
    """Build the policy that `spec` names and evaluate it, with a progress bar."""
    player = build_player(command, spec, make_env)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(spec, total=command.episodes)
        return evaluate(
            player, str(command.env), episodes=command.episodes, k=k, split=command.split, seed=command.seed,
            env_kwargs={"level": command.level}, label=command.label, name=spec,
            on_progress=lambda p: bar.update(task, completed=p.done, total=p.total),
        )  # fmt: skip


def build_player(command: EvalCommand, spec: str, make_env: MakeEnv) -> Player:
    """The policy that `spec` names: a script, a server, or a local model."""
    assert command.max_new_tokens is not None and command.max_context is not None
    params = SampleParams(command.temperature, command.top_k, command.top_p, command.max_new_tokens)
    limits = Limits(command.max_turns, command.max_new_tokens, command.max_context)
    if spec.startswith("scripted:"):
        return _scripted(spec.partition(":")[2], make_env, limits)
    if spec.startswith(("http://", "https://")) and command.tokenizer is not None:
        return _tokens_of_server(command, spec, make_env, params, limits)
    if spec.startswith(("http://", "https://")):
        from agents.engines.endpoint import Endpoint, EndpointConfig

        config = EndpointConfig.from_spec(
            spec, params=params, timeout_s=command.timeout_s, retries=command.retries,
            native_tools=command.native_tools,
        )  # fmt: skip
        return TextPlayer(make_env, Endpoint(config), limits, command.concurrency)
    return _local(command, spec, make_env, params, limits)


def _scripted(name: str, make_env: MakeEnv, limits: Limits) -> Player:
    from agents.engines.scripted import Scripted, UnknownScript

    env = make_env()
    try:
        Scripted(name).begin(env, (0, 0, 0))  # only looks the script up: a script runs from its first turn on
    except UnknownScript as error:
        raise UsageError(str(error)) from None
    finally:
        env.close()
    return TextPlayer(make_env, Scripted(name), limits)


def _tokens_of_server(
    command: EvalCommand, spec: str, make_env: MakeEnv, params: SampleParams, limits: Limits
) -> Player:
    """A server's model, fed with token ids as a local model is."""
    from agents.actor import Player as TokenPlayer
    from agents.engines.vllm_server import ServerEngine
    from agents.models import load_chat

    chat = load_chat(str(command.tokenizer))
    settings = VllmConfig(servers=(spec,), timeout_s=command.timeout_s, retries=command.retries)
    engine = ServerEngine(
        settings, carries="nothing", stop_ids=chat.stop_ids, banned_ids=chat.banned_ids, params=params,
        rows=command.rows, pictures=chat.pictures,
    )  # fmt: skip
    engine.max_context = min(limits.max_context, engine.max_context)
    return TokenPlayer(make_env, chat, engine, limits, command.seed)


def _local(
    command: EvalCommand, spec: str, make_env: MakeEnv, params: SampleParams, limits: Limits
) -> Player:
    import torch

    from agents.actor import Player as TokenPlayer
    from agents.dist import World
    from agents.engines.build import colocated
    from agents.engines.hf import HFEngine
    from agents.models import DTYPES, chat_of, is_tiny, load_model

    model: Any
    model, tokenizer = load_model(spec, DTYPES[command.dtype])
    device = command.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    torch.set_num_threads(command.threads or (1 if is_tiny(model) else torch.get_num_threads()))
    chat = chat_of(model, tokenizer)
    holds = getattr(model.config.get_text_config(), "max_position_embeddings", limits.max_context)
    how: dict[str, Any] = {
        "stop_ids": chat.stop_ids, "banned_ids": chat.banned_ids, "params": params, "rows": command.rows,
        "max_context": min(limits.max_context, holds), "pictures": chat.pictures,
    }  # fmt: skip
    if command.engine == "hf":
        if command.vllm != VllmConfig():
            raise UsageError("--vllm.* says how the engine vllm works: give --engine vllm, too, or leave it out")
        return TokenPlayer(make_env, chat, HFEngine(model, **how), limits, command.seed)
    if command.vllm.servers:
        raise UsageError("an evaluation of a server names it with --model URL --tokenizer MODEL, not --vllm.servers")
    world = World()
    world.device = torch.device(device)
    dtype = DTYPES[command.dtype]
    engine, sync = colocated(command.vllm, dtype, world, model, tokenizer=tokenizer, **how)
    return TokenPlayer(make_env, chat, engine, limits, command.seed, sync=sync)


def record(run: Path, result: EvalResult) -> None:
    """Append to the run's eval.jsonl."""
    with (run / "eval.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(plain(result.as_dict()), allow_nan=False) + "\n")


def as_json(results: Sequence[EvalResult]) -> dict[str, Any]:
    """The first result, and where there is a second one the paired difference."""
    first = results[0].as_dict()
    if len(results) == 2:
        first["against"] = results[1].as_dict()
        first["paired_difference"] = list(results[0].paired(results[1]))
        if results[1].tool_calls.mean > 0:
            first["paired_calls_ratio"] = list(results[0].paired_calls(results[1]))
    return first


def show(result: EvalResult, console: Console) -> None:
    """One evaluation as tables."""
    level = "" if result.level is None else f", level {result.level}"
    console.print(f"\n[bold]{_safe(result.player)}[/] on {_safe(result.env)} ({result.split}{level})")
    console.print(
        f"{result.episodes} episodes, {len(result.correct)} tasks, seed {result.seed}, {result.seconds:.1f} s"
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("success", f"[bold]{result.success}[/]")
    for k, interval in result.pass_at.items():
        if k > 1:
            table.add_row(f"pass@{k}", str(interval))
    table.add_row("reward", str(result.reward))
    table.add_row("tool calls per episode", str(result.tool_calls))
    table.add_row("productivity (correct / call)", _number(result.productivity))
    tokens = f"{result.length:.0f}" if result.length else "–"
    table.add_row("turns, sampled tokens", f"{result.turns:.2f}, {tokens}")
    table.add_row("ended by", _counts(result.stop_reasons))
    table.add_row("failed tool calls", _counts(result.tool_errors))
    table.add_row("no verdict", _counts(result.failures))
    console.print(table)
    if len(result.levels) > 1:
        console.print(level_table(result))
    if result.note:
        console.print(f"[yellow]{_safe(result.note)}[/]")
    if result.marked:
        console.print(
            f"[bold red]{result.failure_share:.1%} of the episodes have no verdict of the policy (more than "
            f"1 %): the score says little.[/]"
        )


def level_table(result: EvalResult) -> Table:
    """One row per difficulty level."""
    table = Table("level", "episodes", "success", "calls", "needed", "productivity", box=None, pad_edge=False)
    for row in result.levels:
        table.add_row(
            str(row.level), str(row.episodes), str(row.success), f"{row.tool_calls:.2f}",
            _number(row.minimal_calls, 2), _number(row.productivity),
        )  # fmt: skip
    return table


def show_pair(after: EvalResult, before: EvalResult, console: Console) -> None:
    """The paired comparison of two policies over the same tasks."""
    console.print(
        f"\npaired over {len(after.correct)} tasks: {_safe(after.player)} less {_safe(before.player)}"
    )
    console.print(f"success difference  [bold]{_signed(after.paired(before))}[/]")
    if before.tool_calls.mean > 0:
        console.print(f"tool calls ratio    {after.paired_calls(before)}")


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{_safe(name)} {count}" for name, count in list(counts.items())[:8]) or "none"


def _safe(text: str) -> str:
    """Text of a run inside rich markup."""
    from rich.markup import escape

    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def user_errors() -> tuple[type[BaseException], ...]:
    """What the user got wrong: one line and exit code 2."""
    from agents.skeleton import ChatFormatError

    return (ChatFormatError,)


if __name__ == "__main__":
    cli.run(main, user_errors)
