"""Lists environments, shows a card, checks the contract.

python -m envs                what there is, with the rewards of the oracle and of a random agent
python -m envs card SPEC      one environment's card
python -m envs check SPEC     one environment against the whole contract
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import envs
from envs.checker import check
from envs.contract import CheckError
from envs.play import run_script


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 on success, 1 where a check fails, 2 on a wrong name or option."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m envs", description=__doc__, formatter_class=plain)
    parser.add_argument("command", nargs="?", choices=("list", "card", "check"), default="list")
    parser.add_argument("spec", nargs="?", help="name, Gymnasium id, module:Class, or jsonl:FILE")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the environment")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print the list for a README, without rewards")
    parser.add_argument("--episodes", type=int, default=40, help="episodes that measure the scripts' rewards")
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        return _markdown() if arguments.markdown else _list(arguments.episodes, arguments.json)
    if arguments.spec is None:
        parser.error(f"{arguments.command} needs a SPEC")
    try:
        options = dict(_option(a) for a in arguments.options)
        if arguments.command == "card":
            return _card(envs.make(arguments.spec, **options), arguments.episodes, arguments.json)
        return _check(arguments.spec, options, arguments.json)
    except (envs.UnknownEnv, envs.EnvConflict, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def card_of(env: envs.ChatEnv, episodes: int) -> dict[str, Any]:
    """An environment's card with the mean rewards of all its scripts over the first evaluation tasks."""
    split = "eval" if "eval" in env.splits else env.splits[0]
    rewards = {}
    for script in env.scripts if episodes else ():
        rngs = (np.random.default_rng([i]) for i in range(episodes))
        played = [run_script(env, script, rng, {"split": split}) for rng in rngs]
        rewards[script] = float(np.mean([p.reward for p in played]))
    return {**env.card(), "rewards": rewards}


def _list(episodes: int, as_json: bool) -> int:
    rows: list[dict[str, Any]] = []
    for name in envs.list_envs():
        try:
            rows.append({**card_of(envs.make(name), episodes), "name": name})
        except Exception as error:  # somebody's plugin; the others are shown all the same
            rows.append({"name": name, "error": f"{type(error).__name__}: {error}"})
    if as_json:
        print(json.dumps(rows))
        return 0
    table = Table(title="Environments")
    for column in ("name", "what the agent does", "levels", "tools", "oracle", "random"):
        table.add_column(column)
    for card in rows:
        if "error" in card:
            table.add_row(card["name"], card["error"], style="red")
            continue
        oracle, chance = (f"{card['rewards'].get(s, float('nan')):.2f}" for s in ("oracle", "random"))
        levels = f"{min(card['levels'])}-{max(card['levels'])}" if len(card["levels"]) > 1 else "1"
        table.add_row(card["name"], card["description"], levels, ", ".join(card["tools"]), oracle, chance)
    Console().print(table)
    return 0


def _markdown() -> int:
    print("| environment | what the agent does | levels | tools |\n| --- | --- | --- | --- |")
    for name in envs.list_envs():
        card = envs.make(name).card()
        levels = "; ".join(f"{level}: {text}" for level, text in card["levels"].items())
        print(f"| `{name}` | {card['description']} | {levels} | {', '.join(card['tools'])} |")
    return 0


def _card(env: envs.ChatEnv, episodes: int, as_json: bool) -> int:
    card = card_of(env, episodes)
    if as_json:
        print(json.dumps(card))
        return 0
    table = Table(title=card["name"], show_header=False)
    for key, value in card.items():
        text = "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key, ", ".join(text) if isinstance(text, list) else str(text))
    Console().print(table)
    return 0


def _check(spec: str, options: dict[str, Any], as_json: bool) -> int:
    try:
        report = check(spec, **options)
    except CheckError as error:
        broken = {"ok": False, "rule": error.rule, "problem": error.problem}
        print(json.dumps(broken) if as_json else f"FAILED {error}")
        return 1
    if as_json:
        kept = {"ok": True, "env": report.env, "rules": report.rules, "rewards": report.rewards}
        print(json.dumps(kept))
        return 0
    table = Table(title=f"{report.env}: the contract is kept")
    for column in ("rule", "what was looked at"):
        table.add_column(column)
    for rule, note in report.rules.items():
        table.add_row(rule, note)
    Console().print(table)
    Console().print("mean rewards: " + ", ".join(f"{k} {v:.3f}" for k, v in report.rewards.items()))
    return 0


def _option(assignment: str) -> tuple[str, Any]:
    key, equals, value = assignment.partition("=")
    if not equals:
        raise ValueError(f"{assignment!r} should be KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


if __name__ == "__main__":
    raise SystemExit(main())
