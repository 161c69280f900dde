"""One training step of a Qwen3-0.6B-shaped model on a GPU: the update, the rollout, the weights between them.

    python -m tests.benchmarks.gpu [--lengths 2048,16384] [--engines hf,vllm] [--tokens 65536] [--recompute]
    python -m tests.benchmarks.gpu --tiny --device cpu       # the same path with a toy, to see that it runs

The model is random, its weights float32, computed with in bfloat16. For each length: as many rows of so many tokens
as `--tokens` holds. The rollout samples the last tokens of every row (256, or an eighth of shorter rows) after the
rest of it as prompt, with each engine; the update is one forward, backward and AdamW step over all rows, trained on
all but their first eighth. Micro-batches that do not fit into memory are made smaller beforehand; where one row alone
does not fit, activations are computed again, as with --recompute. Then

    trainer tok/s   tokens of the rows / seconds of the update
    MFU             model FLOPs / (seconds of the update x peak of the GPU)
                    model FLOPs = 6 tokens x (parameters without embeddings) + 6 trained tokens x vocabulary x width
                    + 6 layers x heads x head size x sum of squared lengths (causal attention); activations that are
                    computed again do not count
    rollout tok/s   sampled tokens / seconds of the rollout, reading the prompts included
    rollout share   of rollout + sync + update
    sync s          seconds to deliver updated weights to an engine that has its own

Writes the numbers into docs/benchmarks.md, in the place of older ones of the same machine, length and engine. Without
a GPU it says so and writes nothing; nor does it for a toy.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.config import OptimConfig, VllmConfig
from agents.dist import World
from agents.engines.base import Engine, SampleParams
from agents.engines.hf import HFEngine
from agents.learner import LMLearner
from agents.memory import NoRoom
from agents.sync import COARSE, WeightSync, probe_ids
from policy_opt.batch import Batch
from policy_opt.need import ENTROPY, LOGP

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu: rows below are written by tests.benchmarks.gpu -->", "<!-- gpu: end -->"
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bfloat16 FLOP/s by what the GPU's name contains; NVIDIA's data sheets."""
SAMPLED = 256
STOP = 0  # banned as well as a stop id: every turn has its full length


@dataclass(frozen=True)
class Shape:
    """A Qwen3."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    mlp: int
    vocabulary: int

    def model(self, longest: int, device: torch.device) -> Qwen3ForCausalLM:
        """With random weights."""
        config = Qwen3Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.mlp, head_dim=self.head,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=longest, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Qwen3ForCausalLM(config).to(device).eval()

    def flops(self, lengths: Sequence[int], trained: int) -> float:
        """Of one forward and backward pass over rows of these lengths, `trained` tokens of which reach the head."""
        attention = self.heads * self.head
        linear = self.width * (2 * attention + 2 * self.kv_heads * self.head) + 3 * self.width * self.mlp
        body = 6.0 * sum(lengths) * self.layers * linear
        return body + 6.0 * trained * self.vocabulary * self.width + 6.0 * self.layers * attention * sum(
            n * n for n in lengths
        )


QWEN3_06B = Shape(28, 1024, 16, 8, 128, 3072, 151_936)
TOY = Shape(2, 64, 2, 1, 32, 128, 512)


def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,16384")
    parser.add_argument("--engines", default="hf,vllm", help="those that are not installed are left out")
    parser.add_argument("--tokens", type=int, default=65_536, help="of all rows together")
    parser.add_argument("--micro-tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3, help="updates that are timed, after one that is not")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--packing", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a toy, to see that everything runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU here: nothing was measured, {args.page.name} stays as it is (--tiny --device cpu runs a toy)")
        return 0
    if args.device == "cpu" and not args.tiny:
        print("error: --device cpu is for --tiny only", file=sys.stderr)
        return 2
    if args.tiny:
        args.lengths, args.tokens, args.micro_tokens, args.repeats = "64,128", 256, 128, 1
    shape = TOY if args.tiny else QWEN3_06B
    world = World.start(bfloat16=True)
    found = [
        {**about(world, argv), **line} for length in map(int, args.lengths.split(","))
        for line in measure(shape, length, world, args)
    ]  # fmt: skip
    print("\n".join(as_table(found)))
    print(json.dumps({"benchmark": "gpu", "toy": args.tiny, "rows": found}))
    if not args.tiny:
        update_page(args.page, found)
        print(f"written to {args.page}")
    world.close()
    return 0


def about(world: World, argv: Sequence[str]) -> dict[str, str]:
    """Machine, versions, date, command."""
    cuda = world.device.type == "cuda"
    names = ["torch", "transformers", *(n for n in ("flash_attn", "vllm") if find_spec(n))]
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:  # a wheel of another name
            versions.append(name)
    machine = torch.cuda.get_device_name(world.device) if cuda else platform.machine()
    return {
        "machine": f"1 x {machine}", "versions": ", ".join(versions),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python -m tests.benchmarks.gpu", *argv]),
    }  # fmt: skip


def measure(shape: Shape, length: int, world: World, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per engine."""
    rows, sampled = max(1, args.tokens // length), min(SAMPLED, length // 8)
    model = shape.model(max(length, 64), world.device)
    b = batch(shape.vocabulary, rows, length)
    learner = fitting(model, b, world, args)
    notes = learner.settle()
    update, peak = updates(learner, b, args.repeats)
    trained = int(b.mask_BT.sum())
    top = next((flops for name, flops in PEAKS.items() if name in about(world, ())["machine"]), None)
    numbers = {
        "length": length, "rows": rows, "trainer_tokens_per_s": rows * length / update,
        "mfu": shape.flops([length] * rows, trained) / update / top if top else None,
        "peak_gib": None if peak is None else peak / 2**30, "update_s": update,
        "micro_tokens": learner.micro_tokens, "recompute": learner.recompute, "notes": "; ".join(notes),
    }  # fmt: skip
    found = []
    for name in args.engines.split(","):
        if name != "hf" and not find_spec(name):
            print(f"{name} is not installed: left out", file=sys.stderr)
            continue
        _free(world)
        rollout, sync = rollouts(name, model, b, sampled, world, update=lambda: updates(learner, b, 0))
        found.append({
            **numbers, "engine": name, "rollout_tokens_per_s": rows * sampled / rollout, "rollout_s": rollout,
            "sync_s": sync, "rollout_share": rollout / (rollout + sync + update),
        })  # fmt: skip
    return found


# ---------------------------------------------------------------------- the update


def fitting(model: Any, b: Batch, world: World, args: argparse.Namespace) -> LMLearner:
    """A learner whose micro-batches fit into memory: smaller ones, or with recomputation, where they would not."""
    tokens, recompute = args.micro_tokens, args.recompute
    while True:
        learner = LMLearner(
            model, OptimConfig(lr=1e-6), world=world, micro_tokens=tokens, packing=args.packing, recompute=recompute
        )
        try:
            updates(learner, b, 0)
        except NoRoom:
            if recompute:
                raise
            recompute = True
        else:
            if not learner.count_splits():
                return learner
            tokens //= 2
        print(f"does not fit: next with {tokens} tokens, recompute {recompute}", file=sys.stderr)
        for p in model.parameters():
            p.grad = None
        del learner
        _free(world)


def batch(vocabulary: int, rows: int, length: int) -> Batch:
    """Rows that share nothing, trained on all but their first eighth."""
    draw = torch.Generator().manual_seed(1)
    mask_BT = (torch.arange(length) >= length // 8).expand(rows, -1)
    return Batch.build(
        tokens_BT=torch.randint(1, vocabulary, (rows, length), generator=draw), mask_BT=mask_BT.clone(),
        real_BT=torch.ones_like(mask_BT), group_B=torch.arange(rows), logp_sampler_BT=-torch.ones(rows, length),
    )  # fmt: skip


def updates(learner: LMLearner, b: Batch, repeats: int) -> tuple[float, int | None]:
    """Seconds of an update, the best of the repeats after one that warms up, and the peak of the GPU's memory."""
    weight_B1 = torch.linspace(-1, 1, b.B)[:, None]

    def pull(rows: Tensor, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logp_BT": -(weight_B1 * b.mask_BT)[rows] / b.mask_BT.sum()}

    def once() -> None:
        learner.backward(b, (LOGP, ENTROPY), pull)
        learner.step()

    cuda = learner.device.type == "cuda"
    once()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = min((timed(once, cuda) for _ in range(repeats)), default=0.0)
    return seconds, torch.cuda.max_memory_allocated() if cuda else None


def timed(work: Callable[[], object], cuda: bool) -> float:
    """Seconds, the GPU's work included."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


# ---------------------------------------------------------------------- the rollout


def rollouts(
    name: str, model: Any, b: Batch, sampled: int, world: World, update: Callable[[], object]
) -> tuple[float, float]:
    """Seconds of a rollout of all rows and of a sync after an update; each is done once before it is timed."""
    engine, sync = engine_of(name, model, b, sampled, world)
    seconds = synced = 0.0
    try:
        for _ in range(2):
            if sync is not None:
                sync(0 if sync.delivered is None else sync.delivered + 1)
                synced = sync.metrics()["sync_seconds"]
            seconds = timed(lambda: play(engine, b, sampled, world), world.device.type == "cuda")
            update()
    finally:
        if hasattr(engine, "shutdown"):
            engine.shutdown()
    return seconds, synced


def engine_of(name: str, model: Any, b: Batch, sampled: int, world: World) -> tuple[Engine, WeightSync | None]:
    """An engine with room for all rows, and what brings it weights."""
    how: dict[str, Any] = {
        "stop_ids": [STOP], "banned_ids": [STOP], "params": SampleParams(max_new_tokens=sampled), "rows": b.B,
        "max_context": b.T,
    }  # fmt: skip
    if name == "hf":
        return HFEngine(model, **how), None
    from agents.engines.vllm import VllmEngine

    engine = VllmEngine(VllmConfig(), dtype=torch.bfloat16, device=world.device, **how)
    probe = probe_ids(model.get_output_embeddings().weight.shape[0], b.T - 1)
    return engine, WeightSync(engine, model, world, probe, COARSE)


def play(engine: Engine, b: Batch, sampled: int, world: World) -> None:
    """Sample the last tokens of every row, the rest being its prompt."""
    engine.reset()
    with world.autocast():
        for row, ids in enumerate(b.tokens_BT[:, : b.T - sampled].tolist()):
            engine.turn((row,), ids, (0, row, 0), sampled)
        count = 0
        while finished := engine.run():
            count += sum(len(turn.ids) for _, turn in finished)
            for key, _ in finished:
                engine.close(key)
    assert count == b.B * sampled, f"{count} tokens were sampled, not {b.B * sampled}"
    engine.reset()


def _free(world: World) -> None:
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- the page

HEADER = (
    "| machine | tokens a row | rows | trainer tok/s | MFU | peak GiB | engine | rollout tok/s | rollout share "
    "| sync s | versions | date | command |"
)


def as_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    return [HEADER, "|" + " --- |" * (HEADER.count("|") - 1), *map(_line, found)]


def _line(r: Mapping[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = (
        r["machine"],
        r["length"],
        f"{r['rows']}{', recomputed' * r['recompute']}",
        f"{r['trainer_tokens_per_s']:,.0f}",
        number(r["mfu"], ".1%"),
        number(r["peak_gib"], ".1f"),
        r["engine"],
        f"{r['rollout_tokens_per_s']:,.0f}",
        f"{r['rollout_share']:.0%}",
        f"{r['sync_s']:.2f}",
        r["versions"],
        r["date"],
        f"`{r['command']}`",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def update_page(page: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into the page's table, in the place of those of the same machine, length and engine."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    if not rest:
        raise SystemExit(f"error: {page} has no line {BEGIN}")
    inside, _, after = rest.partition(END)
    lines = {_key(line): line for line in inside.splitlines() if line.startswith("| ") and line not in as_table([])}
    lines |= {_key(line): line for line in map(_line, found)}
    table = "\n".join([*as_table([]), *(lines[key] for key in sorted(lines))])
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def _key(line: str) -> tuple[str, int, str]:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[0], int(cells[1]), cells[6]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
