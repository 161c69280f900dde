"""A tiny random model, an environment that says what it is told to, and an engine that notes what it is fed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.chat import ChatFormat
from agents.engines.base import Key, Sampled, SampleParams
from agents.engines.hf import HFEngine
from agents.pictures import Picture
from envs import ChatEnv, Reply, Task, Verdict, fingerprint
from policy_opt.protocols import Sampler

torch.set_num_threads(1)


def qwen3(vocab_size: int, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A random Qwen3 of a few thousand parameters, with logits that spread."""
    options = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    }  # fmt: skip
    return spread(Qwen3ForCausalLM, Qwen3Config(vocab_size=vocab_size, **{**options, **changes}), dtype, seed)


def spread(
    model_class: Any, config: Any, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 4.0
) -> Any:
    """A model with random weights large enough that a misplaced token shows in every log-prob."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).to(dtype).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    weight.mul_(scale)
                else:
                    weight.add_(0.3 * torch.randn_like(weight))
    return model


def engine_for(chat: ChatFormat, model: Any, **options: Any) -> HFEngine:
    """An engine with the chat format's stop and banned ids."""
    options = {"params": SampleParams(), "rows": 8, "max_context": 512, **options}
    return HFEngine(model, stop_ids=chat.stop_ids, banned_ids=chat.banned_ids, **options)


class Noting:
    """An engine that remembers, per row, every id that went in or came out, in order."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine, self.params = engine, engine.params
        self.rows, self.max_context, self.version = engine.rows, engine.max_context, engine.version
        self.open: dict[Key, list[int]] = {}
        self.closed: dict[Key, list[list[int]]] = {}

    def turn(
        self,
        key: Key,
        ids: Sequence[int],
        seed: Key,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        self.open.setdefault(key, []).extend(ids)
        self.engine.turn(key, ids, seed, max_new_tokens, sampler, pictures)

    def run(self) -> list[tuple[Key, Sampled]]:
        finished = self.engine.run()
        for key, turn in finished:
            self.open[key].extend(turn.ids)
        return finished

    def close(self, key: Key) -> None:
        if key in self.open:
            self.closed.setdefault(key, []).append(self.open.pop(key))
        self.engine.close(key)

    def reset(self) -> None:
        self.engine.reset()


class Chatter(ChatEnv):
    """Says the messages of `script`, turn by turn, whatever the agent does; correct if the agent said `win`."""

    name: ClassVar[str] = "chatter"

    def __init__(
        self, *, script: Sequence[Sequence[dict[str, Any]]] = (), start: Sequence[dict[str, Any]] = (), **options: Any
    ) -> None:
        super().__init__(**options)
        self.script, self.start = script, start

    def task(self, split: str, index: int, level: int | str | None = None) -> Task:
        name = f"chatter/{split}/{index}"
        return Task(name, split, index, 1, {"index": index}, {}, fingerprint(name))

    def opening(self, task: Task) -> list[dict[str, Any]]:
        return [dict(m) for m in self.start] or [{"role": "user", "content": f"number {task.index}"}]

    def reply(self, turn: Any) -> Reply:
        number = self.episode.turns - 1
        if number >= len(self.script):
            return Reply(done=True)
        return Reply(tuple(dict(m) for m in self.script[number]))

    def judge(self, task: Task, final: str | None) -> Verdict:
        won = any("win" in str(m["content"]) for m in self.episode.messages if m["role"] == "assistant")
        return Verdict(float(won), {"correct": float(won)}, {"answered": final is not None})


class Broken(Chatter):
    """Raises where it is told to: `reset`, `step`, `judge`."""

    name: ClassVar[str] = "broken"

    def __init__(self, *, where: str, on: Sequence[int] = (0,), **options: Any) -> None:
        super().__init__(**options)
        self.where, self.on = where, on

    def _break(self, where: str) -> None:
        if where == self.where and self._episode is not None and self.episode.task.index in self.on:
            raise RuntimeError(f"broken in {where}")

    def opening(self, task: Task) -> list[dict[str, Any]]:
        self._break("reset")
        return super().opening(task)

    def reply(self, turn: Any) -> Reply:
        self._break("step")
        return super().reply(turn)

    def judge(self, task: Task, final: str | None) -> Verdict:
        self._break("judge")
        return super().judge(task, final)
