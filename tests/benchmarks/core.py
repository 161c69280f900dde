"""What the core costs: advantages and credits, the chunked head, the import. A table, then JSON; exit 1 on a miss.

    python -m tests.benchmarks.core [--only advantage,head,import] [--tokens 2048] [--repeats 30]

    advantage   every recipe's advantage and credit parts on 1024 x 256 tokens in groups of 8, one thread, best of
                the repeats by CPU time. grpo at most 0.3 ms, every recipe at most 50 ms.
    head        loss with entropy and KL (k3, to a reference) of 2 x 1024 tokens, vocabulary 151,936, width 896,
                forward and backward: the chunked head beside materialised log-softmaxes, each in a process of its
                own; equal losses first. Peak memory at most 0.25 x, CPU time at most 1.35 x. The exact KL over the
                whole vocabulary stands beside it without a bound: its backward pass computes the reference again.
    import      `import policy_opt`, and the same with a recipe looked up (which loads torch), at most 1.5 x
                `import torch`; median of five processes, CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import policy_opt
from policy_opt import Batch, Recipe
from policy_opt.need import SHAPE, Need, TopKIds
from policy_opt.part import Ctx
from policy_opt.recipe import STAGES
from policy_opt.registry import shipped

ROWS, TOKENS, GROUP = 1024, 256, 8
VOCABULARY, WIDTH = 151_936, 896
GRPO_MS, RECIPE_MS, MEMORY, TIME, IMPORT = 0.3, 50.0, 0.25, 1.35, 1.5


class Bound(NamedTuple):
    """A measured number and what it may be at most."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


# -- advantages and credits -----------------------------------------------------------------------------


def rollout() -> Batch:
    """A rollout with every standard column and fact: rows of random length, a tool's output in the middle."""
    draw = torch.Generator().manual_seed(0)
    length_B = torch.randint(TOKENS // 4, TOKENS + 1, (ROWS,), generator=draw)
    place_T = torch.arange(TOKENS)
    real_BT = place_T < length_B[:, None]
    mask_BT = real_BT & ~((place_T >= 32) & (place_T < 48))
    correct_B = (torch.rand(ROWS, generator=draw) < 0.5).float()
    index_B = torch.arange(ROWS)

    def whole(high: int) -> Tensor:
        return torch.randint(0, high, (ROWS,), generator=draw)

    scores_BK = torch.stack([correct_B, torch.rand(ROWS, generator=draw)], 1)
    return Batch.build(
        mask_BT=mask_BT, real_BT=real_BT, group_B=index_B // GROUP, task_B=index_B // GROUP, member_B=index_B % GROUP,
        tokens_BT=torch.randint(0, 1000, (ROWS, TOKENS), generator=draw),
        turn_BT=(place_T >= 48).long().expand(ROWS, -1),
        reward_B=correct_B + 0.1 * torch.rand(ROWS, generator=draw), correct_B=correct_B, length_B=mask_BT.sum(1),
        truncated_B=(whole(20) == 0).float(), scores_BK=scores_BK, names={"scores_BK": ("correct", "format")},
        logp_sampler_BT=-torch.rand(ROWS, TOKENS, generator=draw), tool_calls_B=whole(4), answer_B=whole(5),
        first_call_B=whole(40) - 1, finished_B=torch.ones(ROWS), level_B=whole(3), proximity_B=scores_BK[:, 1],
        hint_B=torch.zeros(ROWS),
    )  # fmt: skip


def answered(b: Batch, need: Need) -> Tensor:
    """Random numbers in a need's shape."""
    draw = torch.Generator().manual_seed(len(need.name))
    sizes = {"B": b.B, "T": b.T, "K": getattr(need.what, "k", 8), "D": 16}
    shape = [sizes[letter] for letter in SHAPE[type(need.what)]]
    if isinstance(need.what, TopKIds):
        return torch.randint(0, 1000, shape, generator=draw)
    return torch.rand(shape, generator=draw) - 1.5


def stages(recipe: Recipe) -> Callable[[], Batch] | None:
    """Runs advantage and credit on a rollout whose other columns are there; None where the recipe has neither."""
    chosen = [p for stage in ("advantage", "credit") for p in getattr(recipe, stage)]
    if not chosen:
        return None
    b = rollout()
    for need in recipe.needs:
        if need.when != "loss":
            b = b.put(**{need.name: answered(b, need)})
    ctx = Ctx(recipe=recipe.slug, tasks=ROWS // GROUP, states={}, paths={id(p): path for path, p in recipe.parts})
    for stage in STAGES[1:3]:
        for part in getattr(recipe, stage):
            b = part(b, ctx)

    def run() -> Batch:
        found = b._like(cache={})  # group indices are part of the cost
        for part in chosen:
            found = part(found, ctx)
        return found

    return run


def best(run: Callable[[], Any], repeats: int, most_s: float = 3.0) -> float:
    """Milliseconds of CPU time, best of the repeats."""
    found, began = float("inf"), time.process_time()
    run()
    for _ in range(repeats):
        start = time.process_time()
        run()
        found = min(found, time.process_time() - start)
        if time.process_time() - began > most_s:
            break
    return found * 1e3


def advantages(repeats: int) -> tuple[list[Bound], dict[str, float]]:
    """Every recipe and variant that has such parts."""
    torch.set_num_threads(1)
    reward_B = rollout()["reward_B"]
    times = {"floor: one pass over [B, T]": best(lambda: reward_B[:, None] + torch.zeros(ROWS, TOKENS), repeats)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for slug in shipped():
            recipe = policy_opt.get(slug)
            for variant in (None, *recipe.variants):
                form = recipe.set(f"variant={variant}") if variant else recipe
                for phase in [p.recipe for p in form.phases] or [form]:
                    run = stages(phase)
                    name = slug if variant is None else f"{slug} ({variant})"
                    if run is not None:
                        times[name] = max(times.get(name, 0.0), best(run, repeats * (8 if name == "grpo" else 1)))
    slowest = max((name for name in times if not name.startswith("floor")), key=times.__getitem__)
    bounds = [
        Bound("advantage: grpo", times["grpo"], GRPO_MS, "ms"),
        Bound(f"advantage and credit: slowest ({slowest})", times[slowest], RECIPE_MS, "ms"),
    ]
    return bounds, times


# -- the head -------------------------------------------------------------------------------------------


def child(side: str, tokens: int, exact: bool) -> None:
    """One side in this process: prints loss, norm of the gradients, CPU seconds, peak MiB over what stood before."""
    from agents.head import ExactKL, FullEntropy, Head, TargetLogProb, evaluate

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    weight_VH = (0.05 * torch.randn(VOCABULARY, WIDTH, generator=draw)).requires_grad_()
    hidden_NH = torch.randn(tokens, WIDTH, generator=draw).requires_grad_()
    other_NH = hidden_NH.detach() + 0.1 * torch.randn(tokens, WIDTH, generator=draw)
    target_N, adv_N = torch.randint(0, VOCABULARY, (tokens,), generator=draw), torch.randn(tokens, generator=draw)
    reference = Head(weight_VH.detach())

    def chunked() -> tuple[Tensor, Tensor, Tensor]:
        if exact:
            asked = [TargetLogProb(target_N), FullEntropy(), ExactKL(other_NH, reference)]
            logp_N, entropy_N, kl_N = evaluate(Head(weight_VH), hidden_NH, asked)
            return logp_N, entropy_N, kl_N
        with torch.no_grad():
            ref_N = evaluate(reference, other_NH, [TargetLogProb(target_N)])[0]
        logp_N, entropy_N = evaluate(Head(weight_VH), hidden_NH, [TargetLogProb(target_N), FullEntropy()])
        return logp_N, entropy_N, k3(logp_N, ref_N)

    def materialised() -> tuple[Tensor, Tensor, Tensor]:
        logp_NV = (hidden_NH @ weight_VH.T).log_softmax(1)
        logp_N, entropy_N = logp_NV.gather(1, target_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(1)
        with torch.no_grad():
            ref_NV = (other_NH @ weight_VH.T).log_softmax(1)
            ref_N = ref_NV.gather(1, target_N[:, None])[:, 0]
            if not exact:
                del ref_NV
        if exact:
            return logp_N, entropy_N, (logp_NV.exp() * (logp_NV - ref_NV)).sum(1)
        return logp_N, entropy_N, k3(logp_N, ref_N)

    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # the peak starts anew from here
    before, start = memory("VmRSS"), time.process_time()
    logp_N, entropy_N, kl_N = chunked() if side == "chunked" else materialised()
    policy_N = -adv_N * (logp_N - logp_N.detach()).exp()
    loss = (policy_N + 0.04 * kl_N - 0.01 * entropy_N).mean()
    loss.backward()
    seconds, peak = time.process_time() - start, memory("VmHWM") - before
    assert weight_VH.grad is not None and hidden_NH.grad is not None
    norms = float(weight_VH.grad.norm()), float(hidden_NH.grad.norm())
    print(json.dumps({"loss": float(loss), "norms": norms, "seconds": seconds, "mib": peak}))


def k3(logp_N: Tensor, ref_N: Tensor) -> Tensor:
    """exp(x) - x - 1, x = logp_ref - logp."""
    x_N = ref_N - logp_N
    return x_N.exp() - x_N - 1


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) / 1024 for line in handle if line.startswith(field))


def head(tokens: int) -> tuple[list[Bound], dict[str, Any]]:
    """Both sides, with either KL."""
    bounds, rows = [], {}
    for exact in (False, True):
        sides = {}
        for side in ("materialised", "chunked"):
            command = [sys.executable, "-m", "tests.benchmarks.core", "--child", side, "--tokens", str(tokens)]
            command += ["--exact"] if exact else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            sides[side] = json.loads(done.stdout.splitlines()[-1])
        ours, plain = sides["chunked"], sides["materialised"]
        for mine, its in ((ours["loss"], plain["loss"]), *zip(ours["norms"], plain["norms"], strict=True)):
            assert abs(mine - its) <= 1e-4 * max(abs(its), 1e-3), f"the two sides do not agree: {ours}, {plain}"
        what = "exact KL" if exact else "entropy and KL"
        limits = (float("inf"), float("inf")) if exact else (MEMORY, TIME)
        bounds += [
            Bound(f"head, {what}: peak memory over materialised", ours["mib"] / plain["mib"], limits[0], "x"),
            Bound(f"head, {what}: time over materialised", ours["seconds"] / plain["seconds"], limits[1], "x"),
        ]
        rows[what] = sides
    return bounds, rows


# -- the import -----------------------------------------------------------------------------------------


def imports() -> list[Bound]:
    """CPU time of the imports in processes of their own, in turn."""
    programs = ("import torch", "import policy_opt", "import policy_opt; policy_opt.get('grpo')")
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    for _ in range(5):
        for program, found in seconds.items():
            timed = f"{program}; import time; print(time.process_time())"
            done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
    torch_s, *ours = (statistics.median(seconds[program]) for program in programs)
    pairs = zip(programs[1:], ours, strict=True)
    return [Bound(f"`{program}` over `import torch`", own_s / torch_s, IMPORT, "x") for program, own_s in pairs]


# -- all ------------------------------------------------------------------------------------------------


def show(bounds: Sequence[Bound], times: dict[str, float]) -> None:
    """Tables."""
    console = Console()
    if times:
        table = Table("recipe", "ms", title=f"advantage and credit, {ROWS} x {TOKENS} in groups of {GROUP}, 1 thread")
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            table.add_row(name, f"{value:.3f}")
        console.print(table)
    table = Table("what", "measured", "bound", "", title="the core")
    for bound in bounds:
        limit = "" if bound.limit == float("inf") else f"≤ {bound.limit:g} {bound.unit}"
        mark = "" if not limit else "ok" if bound.holds else "MISSED"
        table.add_row(bound.name, f"{bound.value:.3f} {bound.unit}", limit, mark)
    console.print(table)


def main() -> int:
    """Measure what was asked for; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="advantage,head,import", help="which, separated by commas")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--child", choices=("chunked", "materialised"), help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.tokens, given.exact)
        return 0
    only = given.only.split(",")
    if unknown := set(only) - {"advantage", "head", "import"}:
        parser.error(f"--only names advantage, head and import, not {', '.join(sorted(unknown))}")
    bounds: list[Bound] = []
    times: dict[str, float] = {}
    sides: dict[str, Any] = {}
    if "advantage" in only:
        found, times = advantages(given.repeats)
        bounds += found
    if "head" in only:
        found, sides = head(given.tokens)
        bounds += found
    if "import" in only:
        bounds += imports()
    show(bounds, times)
    print(json.dumps({
        "benchmark": "core", "bounds": {
            b.name: [round(b.value, 4), None if b.limit == float("inf") else b.limit, b.holds] for b in bounds
        },
        "advantage_ms": {name: round(value, 3) for name, value in times.items()}, "head": sides, "threads": 1,
        "torch": torch.__version__, "machine": platform.machine(), "load": round(os.getloadavg()[0], 2),
    }))  # fmt: skip
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
