"""An environment as small as can be for whole training runs: say the letter; and a model to train on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from envs import ChatEnv, Task, Verdict, answers, fingerprint
from envs.random_agent import random_agent
from tests.agents.tokenizers import byte_bpe

SPEC, SHAPED = "tests.agents.letters:Letters", "tests.agents.letters:Shaped"
SPLITS = {"train": "abcd", "eval": "efgh"}


class Letters(ChatEnv):
    """Say the letter that was asked for."""

    name = "letters"

    def task(self, split, index, level=None):
        letter = SPLITS[split][index % 4]
        return Task(f"letters/{split}/{index}", split, index, 1, {"letter": letter}, {"letter": letter},
                    fingerprint(split, letter))

    def opening(self, task):
        return [{"role": "user", "content": f"say {task.prompt['letter']}"}]

    def judge(self, task, final):
        correct = float((final or "").strip() == task.truth["letter"])
        return Verdict(correct, {"correct": correct}, {"minimal_calls": 0, "answer_key": answers.key(final)})


def oracle(env, rng):
    """Says it."""
    yield env.episode.task.truth["letter"]


def babble(env, rng):
    """Says some letter."""
    yield "abcdefgh"[int(rng.integers(8))]


Letters.scripts = {"oracle": oracle, "babble": babble, "random": random_agent}
Letters.demonstrators = {"oracle": 0.5, "babble": 0.5}


def save_model(folder: Path, template: str | None = None) -> Path:
    """A random Qwen3 of 20,000 parameters with a byte-level tokenizer, as transformers saves them."""
    tokenizer = byte_bpe() if template is None else byte_bpe(template)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
            tie_word_embeddings=False,
        ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Shaped(Letters):
    """Letters with a little reward for any letter, so that a policy that knows nothing has something to learn."""

    def judge(self, task, final):
        verdict = super().judge(task, final)
        said = final or ""
        share = sum(c.isascii() and c.isalpha() for c in said) / max(1, len(said))
        return replace(verdict, reward=verdict.reward + 0.1 * share)

    def reward_bound(self, task):
        return 1.1


class OnlyEval(Letters):
    """Letters to be tested on, not trained."""

    splits = ("eval",)
