"""Multi-turn sampling: our engine against `model.generate` called once per turn. Prints a table, then JSON.

    python -m tests.benchmarks.rollout [--rows 16] [--turns 2,4,8,16] [--repeats 3]

Both sides play the same conversations with the same random Qwen3 of the bundled model's size, all rows in one
batch, on one thread: each turn brings 32 observed tokens and samples exactly 32. First, in float64, both must
choose the same ids greedily; then both are timed at temperature 1, alternating, best of the repeats.

The bound is the ratio of tokens that have to go through the model: calling `generate` per turn computes the
whole conversation anew each time. Where per-call overhead, not tokens, is what costs, our side can beat it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.engines.base import SampleParams
from agents.engines.hf import HFEngine

OBSERVED = SAMPLED = 32
STOP = 0  # never sampled: every turn has its full length


def tiny(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """A random Qwen3 of the bundled model's size, from a fixed seed."""
    config = Qwen3Config(
        vocab_size=1280, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).to(dtype).eval()


def observations(rows: int, turns: int) -> torch.Tensor:
    """Token ids that the environment says: [turns, rows, OBSERVED]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 1280, (turns, rows, OBSERVED), generator=generator)


@torch.inference_mode()
def with_generate(model: Qwen3ForCausalLM, observed: torch.Tensor, greedy: bool) -> torch.Tensor:
    """Sampled ids [turns, rows, SAMPLED] when every turn computes its whole conversation."""
    text, sampled = observed[0][:, :0], []
    for said in observed:
        text = torch.cat([text, said], 1)
        text = model.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=SAMPLED, do_sample=not greedy,
            temperature=1.0, top_k=0, top_p=1.0, bad_words_ids=[[STOP]], eos_token_id=None, pad_token_id=STOP,
        )  # fmt: skip
        sampled.append(text[:, -SAMPLED:])
    return torch.stack(sampled)


def with_engine(engine: HFEngine, observed: torch.Tensor) -> torch.Tensor:
    """The same with keys and values kept between turns."""
    engine.reset()
    turns, rows, _ = observed.shape
    told = observed.tolist()
    sampled = torch.zeros(turns, rows, SAMPLED, dtype=torch.long)
    at = [0] * rows
    for row in range(rows):
        engine.turn((row,), told[0][row], (0, row, 0), SAMPLED)
    while finished := engine.run():
        for (row,), turn in finished:
            sampled[at[row], row] = torch.tensor(turn.ids)
            at[row] += 1
            if at[row] < turns:
                engine.turn((row,), told[at[row]][row], (0, row, at[row]), SAMPLED)
    return sampled


def engine_of(model: Qwen3ForCausalLM, rows: int, turns: int, temperature: float) -> HFEngine:
    """An engine with room for the conversation."""
    params = SampleParams(temperature=temperature, max_new_tokens=SAMPLED)
    context = turns * (OBSERVED + SAMPLED) + 1
    return HFEngine(model, stop_ids=[STOP], banned_ids=[STOP], params=params, rows=rows, max_context=max(context, 128))


def check_equal_work(rows: int) -> None:
    """Greedy, float64, three turns: both sides must choose the very same ids."""
    model, observed = tiny(torch.float64), observations(rows, 3)
    ours = with_engine(engine_of(model, rows, 3, 0.0), observed)
    theirs = with_generate(model, observed, greedy=True)
    assert torch.equal(ours, theirs), "the two sides do not do the same work"


def bound(turns: int) -> float:
    """Tokens that `generate` per turn computes over those that are computed when nothing is computed twice."""
    anew = sum(t * (OBSERVED + SAMPLED) - SAMPLED + SAMPLED - 1 for t in range(1, turns + 1))
    return anew / (turns * (OBSERVED + SAMPLED) - 1)


def measure(model: Qwen3ForCausalLM, rows: int, turns: int, repeats: int) -> dict[str, float]:
    """Sampled tokens per second of both sides, by the clock and by the process's own time; best of the repeats."""
    observed, engine = observations(rows, turns), engine_of(model, rows, turns, 1.0)
    sides = {"ours": lambda: with_engine(engine, observed), "generate": lambda: with_generate(model, observed, False)}
    seconds = dict.fromkeys([f"{name}{clock}" for name in sides for clock in ("", "_cpu")], float("inf"))
    for _ in range(repeats):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            assert side().shape == (turns, rows, SAMPLED)
            seconds[name] = min(seconds[name], time.perf_counter() - wall)
            seconds[f"{name}_cpu"] = min(seconds[f"{name}_cpu"], time.process_time() - cpu)
    speed = {name: turns * rows * SAMPLED / best for name, best in seconds.items()}
    ratios = {"ratio": speed["ours"] / speed["generate"], "ratio_cpu": speed["ours_cpu"] / speed["generate_cpu"]}
    return {"turns": turns, "rows": rows, **speed, **ratios, "token_bound": bound(turns)}


def main() -> None:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--turns", default="2,4,8,16")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    check_equal_work(args.rows)
    print(f"equal work checked; {args.rows} rows, {OBSERVED} observed + {SAMPLED} sampled tokens a turn, 1 thread")
    print(
        f"{'turns':>5} {'generate tok/s':>15} {'ours tok/s':>11} {'ratio':>7} {'by CPU time':>12} {'token bound':>12}"
    )
    model, results = tiny(), []
    for turns in map(int, args.turns.split(",")):
        r = measure(model, args.rows, turns, args.repeats)
        results.append(r)
        print(
            f"{turns:>5} {r['generate']:>15,.0f} {r['ours']:>11,.0f} {r['ratio']:>6.2f}x {r['ratio_cpu']:>11.2f}x "
            f"{r['token_bound']:>11.2f}x"
        )
    machine = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    load = os.getloadavg()[0]
    print(json.dumps({"benchmark": "rollout", "seed": 0, "threads": 1, "load": load, **machine, "results": results}))


if __name__ == "__main__":
    main()
