"""The engine that a run asks for, and how it gets the policy's weights."""

from __future__ import annotations

from typing import Any

import torch

from agents.chat import ChatFormat
from agents.cli import UsageError
from agents.config import TrainConfig, VllmConfig
from agents.dist import World
from agents.engines.base import Engine, SampleParams
from agents.engines.vllm import MOST_RANK, VllmEngine
from agents.engines.vllm_server import ServerEngine, carries, refuse_options, refuse_server_options
from agents.sync import COARSE, GAPS, WeightSync, probe_of


def build_engine(
    config: TrainConfig, world: World, model: Any, chat: ChatFormat, params: SampleParams, max_context: int
) -> tuple[Engine, WeightSync | None]:
    """The engine, and what brings it the policy's weights; None where it samples from the trained model itself.

    Raises UsageError where options do not go together.
    """
    rows = max(1, -(-config.rollout.rows // world.size))
    how: dict[str, Any] = {
        "stop_ids": chat.stop_ids, "banned_ids": chat.banned_ids, "params": params, "rows": rows,
        "max_context": max_context, "pictures": chat.pictures,
    }  # fmt: skip
    if config.engine == "hf":
        from agents.engines.hf import HFEngine

        if config.vllm != VllmConfig():
            raise UsageError("--vllm.* says how the engine vllm works: give --engine vllm, too, or leave it out")
        return HFEngine(model, **how), None
    if config.vllm.merge and not config.lora.rank:
        raise UsageError("--vllm.merge merges adapters, and there are none: give --lora.rank, too, or leave it out")
    if config.vllm.servers:
        return _servers(config, world, model, how)
    refuse_server_options(config.vllm)
    if world.size > 1 and config.vllm.tensor_parallel > 1:
        raise UsageError(
            f"--vllm.tensor-parallel {config.vllm.tensor_parallel} with {world.size} processes: each process has an "
            f"engine on its own GPU. Give --processes 1, or run servers and name them with --vllm.servers"
        )
    if config.lora.rank > MOST_RANK and not config.vllm.merge:
        raise UsageError(f"vLLM takes adapters up to rank {MOST_RANK}: give --vllm.merge, or a smaller --lora.rank")
    return colocated(config.vllm, precision(config), world, model, tokenizer=chat.tokenizer, **how)


def colocated(
    settings: VllmConfig, dtype: torch.dtype, world: World, model: Any, **how: Any
) -> tuple[Engine, WeightSync]:
    """vLLM beside this process; `how` as `VllmEngine` takes it."""
    engine = VllmEngine(settings, dtype=dtype, device=world.device, **how)
    return engine, _verified(engine, model, world, limit(settings, dtype))


def _servers(config: TrainConfig, world: World, model: Any, how: dict[str, Any]) -> tuple[Engine, WeightSync]:
    """An engine over servers that run already."""
    refuse_options(config.vllm)
    dtype = precision(config)
    engine = ServerEngine(config.vllm, carries=carries(config.vllm, model), dtype=dtype, world=world, **how)
    return engine, _verified(engine, model, world, limit(config.vllm, dtype))


def _verified(engine: VllmEngine | ServerEngine, model: Any, world: World, gap: float) -> WeightSync:
    """Brings the engine weights; the probe leaves room for the token that the engine adds."""
    probe, pictures = probe_of(model, engine.max_context - 1, engine.pictures)
    return WeightSync(engine, model, world, probe, gap, pictures)


def precision(config: TrainConfig) -> torch.dtype:
    """What the engine computes in; UsageError where it cannot."""
    if config.dtype == "float64":
        raise UsageError("--engine vllm computes in float32 or bfloat16: leave out --dtype float64, or --engine vllm")
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def limit(settings: VllmConfig, dtype: torch.dtype) -> float:
    """Largest difference of log-probs that the check after a sync accepts."""
    return settings.gap if settings.gap is not None else GAPS.get(dtype, COARSE)
