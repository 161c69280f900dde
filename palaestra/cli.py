"""The console script: `palaestra train --env tool_qa` is `python -m agents.train --env tool_qa`."""

from __future__ import annotations

import difflib
import runpy
import sys

import palaestra  # puts our packages first on the path  # noqa: F401

COMMANDS = {
    "train": ("agents.train", "train a policy on an environment"),
    "eval": ("agents.eval", "success of any policy on any environment, with intervals"),
    "compare": ("agents.compare", "recipes against each other: same tasks and budget, paired intervals, a picture"),
    "sft": ("agents.sft", "imitation on demonstrations or stored trajectories"),
    "view": ("agents.view", "one self-contained HTML report of a run"),
    "serve": ("agents.serve", "a vLLM server that training and evaluation can use"),
    "export": ("agents.export", "a run's trajectories as JSON lines"),
    "envs": ("envs", "every environment with its card; `envs check SPEC`"),
    "recipes": ("policy_opt", "every recipe with its row"),
    "conformance": ("policy_opt.conformance", "recipes against golden numbers"),
    "bundled": ("agents.bundled", "build the bundled tiny model, or print its card"),
}


def usage() -> str:
    """The list of commands, a line each."""
    lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: palaestra COMMAND [options]", "", *lines])


def main() -> None:
    """Run the module behind the named command with the remaining arguments; exit 2 on an unknown one."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage())
        return
    name = sys.argv[1]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        print(f"palaestra: unknown command `{name}`{hint}\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    module = COMMANDS[name][0]
    sys.argv = [f"palaestra {name}", *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
