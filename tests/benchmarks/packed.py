"""One update: rows end to end against rows that are padded. Prints two tables, then JSON; exit 1 on a miss.

    python -m tests.benchmarks.packed [--rows 64] [--groups 8] [--repeats 3] [--tokens 4096]

Scoring's forward aside, an update is one forward and one backward pass over the rows. The same learner does it in
every layout, on the same random Qwen3 of 1.05 million parameters, on one thread; best of the repeats by CPU time,
layouts taking turns. First, in float64, losses and gradients must be the same to 1e-9, in float32 the losses to 1e-6.

    rows     log-normal lengths, a fifth of the padded rectangle is real. One padded batch stands against rows end to
             end, and beside them micro-batches of rows of similar length, padded. Aim: 4 times faster than padded.
             The bound is 1 / fill, the ratio of tokens: what does not depend on padding (the head, which looks at
             trained tokens only, and the optimizer) keeps a layout below it; attention, which grows faster than
             tokens do, can lift one above it.
    groups   8 members each that read the same opening of 64 to 320 tokens and go on for a log-normal while: the
             opening computed once for all, end to end, and padded with its keys and values kept; or with every row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.learner import LMLearner
from policy_opt.batch import Batch
from policy_opt.need import ENTROPY, LOGP

VOCABULARY = 268
AIM = 4.0
NEEDS = (LOGP, ENTROPY)


def model(dtype: torch.dtype) -> Qwen3ForCausalLM:
    """A random Qwen3 of 1.05 million parameters."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).to(dtype).eval()


def lengths(n: int, median: float, spread: float, longest: int, draw: torch.Generator) -> list[int]:
    """Log-normal."""
    drawn = (torch.randn(n, generator=draw) * spread + torch.tensor(median).log()).exp()
    return drawn.round().long().clamp(4, longest).tolist()


def batch(rows: list[tuple[int, int, int]], dtype: torch.dtype) -> Batch:
    """Rows of (group, tokens of its opening, further tokens), of which the further ones are trained on."""
    draw = torch.Generator().manual_seed(1)
    width = max(opening + own for _, opening, own in rows)
    tokens_BT = torch.randint(0, VOCABULARY, (len(rows), width), generator=draw)
    first = {group: i for i, (group, _, _) in reversed(list(enumerate(rows)))}
    for i, (group, opening, _) in enumerate(rows):
        tokens_BT[i, :opening] = tokens_BT[first[group], :opening]
    opening_B1 = torch.tensor([opening for _, opening, _ in rows])[:, None]
    length_B1 = opening_B1 + torch.tensor([own for _, _, own in rows])[:, None]
    real_BT = torch.arange(width) < length_B1
    mask_BT = real_BT & (torch.arange(width) >= opening_B1)
    logp_BT = -torch.ones(len(rows), width, dtype=dtype)
    group_B = torch.tensor([group for group, _, _ in rows])
    return Batch.build(
        tokens_BT=tokens_BT * real_BT, real_BT=real_BT, mask_BT=mask_BT, group_B=group_B, logp_sampler_BT=logp_BT
    )


def update(learner: LMLearner, b: Batch) -> tuple[float, list[Tensor]]:
    """The loss and its gradient: weighted log-probs less a little entropy."""
    weight_BT = torch.linspace(-1, 1, b.B, dtype=b.logp_sampler_BT.dtype)[:, None] * b.mask_BT / b.mask_BT.sum()

    def pull(rows: Tensor, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logp_BT": -weight_BT[rows], "entropy_BT": -0.01 * b.mask_BT[rows] / b.mask_BT.sum()}

    streams = learner.backward(b, NEEDS, pull)
    loss = -(streams["logp_BT"] * weight_BT).sum() - 0.01 * streams["entropy_BT"].sum() / b.mask_BT.sum()
    grads = [p.grad for p in learner.model.parameters() if p.grad is not None]
    for p in learner.model.parameters():
        p.grad = None
    return float(loss), grads


def check_equal(make: Callable[[torch.dtype], dict[str, LMLearner]], rows: list[tuple[int, int, int]]) -> float:
    """The largest relative error of losses and gradients in float64; the losses in float32 are held to 1e-6."""
    worst = 0.0
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        b = batch(rows, dtype)
        found = [update(learner, b) for learner in make(dtype).values()]
        (loss, grads), *others = found
        for other, theirs in others:
            errors = [abs(other - loss) / abs(loss)]
            if dtype == torch.float64:
                # shared openings sum over rows before float32 norms, which Qwen3 has whatever the weights
                errors += [float((g - t).norm() / g.norm()) for g, t in zip(grads, theirs, strict=True)]
                worst = max(worst, *errors)
            assert errors[0] <= bound, f"losses differ by {errors[0]:.1e} in {dtype}"
    return worst


def measure(learners: Mapping[str, LMLearner], b: Batch, repeats: int) -> dict[str, float]:
    """CPU seconds of an update, best of the repeats, layouts taking turns."""
    best = dict.fromkeys(learners, float("inf"))
    for name in (*learners, *(name for _ in range(repeats) for name in learners)):  # the first round warms up
        began = time.process_time()
        update(learners[name], b)
        best[name] = min(best[name], time.process_time() - began)
    return best


def fed(learner: LMLearner, b: Batch) -> int:
    """Tokens that go through the model."""
    chunks = learner._plan(b, NEEDS, torch.ones(b.B, dtype=torch.bool))
    return sum(chunk.fed(b.real_BT.sum(1).tolist()) for chunk in chunks)


def table(title: str, learners: Mapping[str, LMLearner], b: Batch, repeats: int) -> dict[str, Any]:
    """Prints and returns seconds, tokens and ratios to the first layout."""
    seconds = measure(learners, b, repeats)
    tokens = {name: fed(learner, b) for name, learner in learners.items()}
    base = next(iter(learners))
    print(f"\n{title}\n{'layout':<34}{'CPU seconds':>12}{'tokens':>10}{'faster':>9}{'token ratio':>13}")
    for name in learners:
        ratio, bound = seconds[base] / seconds[name], tokens[base] / tokens[name]
        print(f"{name:<34}{seconds[name]:>12.3f}{tokens[name]:>10,}{ratio:>8.2f}x{bound:>12.2f}x")
    return {"seconds": seconds, "tokens": tokens}


def rows_of(args: argparse.Namespace) -> dict[str, Any]:
    """Rows that share nothing."""
    draw = torch.Generator().manual_seed(9)
    rows = [(i, 1, n) for i, n in enumerate(lengths(args.rows, 60, 0.9, 500, draw))]

    def make(dtype: torch.dtype) -> dict[str, LMLearner]:
        return {
            "one padded batch": LMLearner(model(dtype), packing="never", micro_tokens=1 << 30),
            "end to end": LMLearner(model(dtype), packing="always", micro_tokens=args.tokens),
            "padded, sorted by length": LMLearner(model(dtype), packing="never", micro_tokens=args.tokens),
        }

    error = check_equal(make, rows)
    assert error <= 1e-9, f"gradients differ by {error:.1e}"
    b = batch(rows, torch.float32)
    fill = float(b.real_BT.float().mean())
    print(f"losses and gradients agree to {error:.1e} (float64)")
    print(f"{args.rows} rows, longest {b.T}, fill {fill:.3f}, 1 / fill {1 / fill:.2f}")
    return {"fill": fill, "error": error, **table("Rows of log-normal length", make(torch.float32), b, args.repeats)}


def groups_of(args: argparse.Namespace) -> dict[str, Any]:
    """Groups of 8 that share openings."""
    draw = torch.Generator().manual_seed(8)
    openings = torch.randint(64, 321, (args.groups,), generator=draw).tolist()
    own = lengths(8 * args.groups, 55, 0.6, 320, draw)
    rows = [(i // 8, openings[i // 8], n) for i, n in enumerate(own)]

    def make(dtype: torch.dtype) -> dict[str, LMLearner]:
        size = {"micro_tokens": args.tokens}
        return {
            "padded, opening with every row": LMLearner(model(dtype), packing="never", share=False, **size),
            "padded, opening once": LMLearner(model(dtype), packing="never", **size),
            "end to end, opening with every row": LMLearner(model(dtype), packing="always", share=False, **size),
            "end to end, opening once": LMLearner(model(dtype), packing="always", **size),
        }

    error = check_equal(make, rows)
    assert error <= 1e-6, f"gradients differ by {error:.1e}"
    print(f"\nlosses and gradients agree to {error:.1e} (float64; norms are float32); {args.groups} groups of 8")
    b = batch(rows, torch.float32)
    return {"error": error, **table("Groups with a common opening", make(torch.float32), b, args.repeats)}


def main() -> int:
    """The command; 1 where the aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch, but for the one padded batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, groups = rows_of(args), groups_of(args)
    seconds = list(rows["seconds"].values())
    print(f"\npadded / end to end: {seconds[0] / seconds[1]:.2f}x, aim {AIM:.0f}x, bound {1 / rows['fill']:.2f}x")
    machine = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    line = {"benchmark": "packed", "threads": 1, "load": os.getloadavg()[0], **machine, "rows": rows, "groups": groups}
    print(json.dumps(line))
    return int(seconds[0] / seconds[1] < AIM)


if __name__ == "__main__":
    raise SystemExit(main())
