"""What the benchmarks' tables rest on: formulas against counted operations, rows that stay, silence without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import gpu

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", *arguments], capture_output=True, text=True, cwd=ROOT, env=env,
        timeout=300,
    )  # fmt: skip


def test_without_a_gpu_the_table_stays_as_it_is():
    before = PAGE.read_bytes()
    done = run()
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith("no GPU here")
    assert PAGE.read_bytes() == before


@pytest.mark.full
def test_the_toy_runs_through_and_writes_nothing():
    before = PAGE.read_bytes()
    done = run("--tiny", "--device", "cpu", "--engines", "hf", "--recompute")
    assert done.returncode == 0, done.stderr
    assert "| 64 | 4, recomputed |" in done.stdout and "| 128 | 2, recomputed |" in done.stdout
    assert PAGE.read_bytes() == before


def test_model_flops_are_those_that_torch_counts():
    """Matrix products of the trunk as counted; attention is counted whole, where causal attention needs half of it."""
    shape, rows, length = gpu.TOY, 3, 40
    model = shape.model(64, torch.device("cpu"))
    model.set_attn_implementation("eager")
    tokens_RT = torch.randint(0, shape.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model.model(input_ids=tokens_RT, use_cache=False).last_hidden_state.sum().backward()
    attention = 6 * shape.layers * shape.heads * shape.head * rows * length**2
    assert counter.get_total_flops() == shape.flops([length] * rows, 0) + attention
    with FlopCounterMode(display=False) as counter:
        (torch.ones(7, shape.width, requires_grad=True) @ model.lm_head.weight.T).sum().backward()
    assert counter.get_total_flops() == shape.flops([], 7)


def test_the_shape_is_that_of_qwen3_06b():
    with torch.device("meta"):
        model = gpu.QWEN3_06B.model(64, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 596_049_920


def found(**changes):
    return {
        "machine": "1 x H200", "length": 2048, "rows": 32, "recompute": False, "trainer_tokens_per_s": 1234.5,
        "mfu": 0.412, "peak_gib": 20.0, "engine": "hf", "rollout_tokens_per_s": 99.0, "rollout_share": 0.5,
        "sync_s": 0.0, "versions": "torch 2", "date": "2026-01-01", "command": "python -m tests.benchmarks.gpu",
        **changes,
    }  # fmt: skip


def test_rows_are_replaced_by_machine_length_and_engine(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu.BEGIN}\nnothing yet\n{gpu.END}\nafter\n")
    gpu.update_page(page, [found(), found(engine="vllm", sync_s=1.5), found(length=16384)])
    gpu.update_page(page, [found(mfu=0.5, date="2026-02-02"), found(machine="1 x H100", mfu=None)])
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 1 x")]
    assert text.startswith(f"before\n{gpu.BEGIN}\n| machine") and text.endswith(f"{gpu.END}\nafter\n")
    assert [gpu._key(line) for line in rows] == [
        ("1 x H100", 2048, "hf"), ("1 x H200", 2048, "hf"), ("1 x H200", 2048, "vllm"), ("1 x H200", 16384, "hf")
    ]  # fmt: skip
    assert "50.0%" in rows[1] and "2026-02-02" in rows[1] and "41.2%" not in rows[1]
    assert "|  |" in rows[0]
