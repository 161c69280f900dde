"""`check(env)`: an environment against the contract; our own environments are tested with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from envs.contract import RULES, CheckError, CountTokens, Subject
from envs.core import ChatEnv
from envs.registry import make


@dataclass(frozen=True)
class Report:
    """What `check` found, all rules being kept."""

    env: str
    """Name of the environment."""
    rules: Mapping[str, str]
    """Rule -> what was looked at."""
    rewards: Mapping[str, float]
    """Script or hack -> mean reward over the same tasks."""


def check(
    env: str | type[ChatEnv] | ChatEnv,
    *,
    tasks: int = 24,
    pool: int = 400,
    count_tokens: CountTokens | None = None,
    **options: Any,
) -> Report:
    """Hold an environment against the contract.

    Args:
        env: a spec, a class, or an environment.
        tasks: episodes per script.
        pool: tasks per split whose fingerprints are compared.
        count_tokens: tokens of (messages, tools), for the tiny profile; characters are counted without it. It is
            given the words only: an image counts as one token per 28 x 28 pixels (see `contract.image_tokens`).
        options: keywords of the environment's constructor.

    Raises:
        CheckError: names the first broken rule and what was seen.
        UnknownEnv, TypeError, ValueError: the environment cannot even be made as asked.
    """
    subject = _subject(env, options, tasks, pool, count_tokens)
    name = subject.make().name
    kept: dict[str, str] = {}
    for rule, holds in RULES.items():
        try:
            kept[rule] = holds(subject)
        except CheckError as error:
            raise CheckError(rule, error.problem) from None
        except Exception as error:
            raise CheckError(rule, f"{type(error).__name__}: {error}") from error
    return Report(name, kept, subject.rewards)


def _subject(
    env: str | type[ChatEnv] | ChatEnv,
    options: Mapping[str, Any],
    tasks: int,
    pool: int,
    count_tokens: CountTokens | None,
) -> Subject:
    if isinstance(env, ChatEnv):
        pristine = copy.deepcopy(env)

        def varied(**changed: Any) -> ChatEnv:
            fresh = copy.deepcopy(pristine)
            for key, value in {**options, **changed}.items():
                setattr(fresh, key, value)
            return fresh

        return Subject(varied, None, options, tasks, pool, count_tokens)

    def fresh(**changed: Any) -> ChatEnv:
        return make(env, **{**options, **changed})

    spec = env if isinstance(env, str) else f"{env.__module__}:{env.__qualname__}"
    importable = "<locals>" not in spec and not spec.startswith("__main__")
    return Subject(fresh, spec if importable else None, options, tasks, pool, count_tokens)
