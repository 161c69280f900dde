"""Who acts and who trains: engines, chat formats, the token ledger, rollouts, train / eval / view.

`agents` is also the import name of the openai-agents wheel, and `envs` and `tools` are names that others use too:
a clash is named here, at import, instead of failing oddly later.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent


def _verify(needed: tuple[str, ...]) -> None:
    """ImportError where a package beside this one would be imported from somewhere else."""
    for name in needed:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is None or Path(origin).resolve().parent != _HOME / name:
            raise ImportError(
                f"Palaestra's `agents` at {_HOME} needs its own package `{name}`, but `import {name}` finds {origin}: "
                f"another distribution uses that name. Start with `palaestra ...`, or `import palaestra` first (it "
                f"puts its own packages first on the path), or use a separate environment"
            )


_verify(("envs", "policy_opt", "scenarios", "tools"))
