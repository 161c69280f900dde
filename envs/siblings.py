"""Whether the packages beside this one are ours: short names may clash with another distribution's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

NEEDED = ("scenarios", "tools")


def verify(needed: tuple[str, ...] = NEEDED) -> None:
    """Raise ImportError where `import tools` (say) would find a package that is not Palaestra's.

    The message names the file and, where it can be found out, the distribution that it belongs to.
    """
    home = Path(__file__).resolve().parent.parent
    for name in needed:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is not None and Path(origin).resolve().parent == home / name:
            continue
        if spec is None:
            raise ImportError(f"Palaestra's package `{name}` is missing beside {home}; reinstall `palaestra`")
        owners = importlib.metadata.packages_distributions().get(name, [])
        whose = f" of {', '.join(sorted(set(owners) - {'palaestra'}))}" if set(owners) - {"palaestra"} else ""
        raise ImportError(
            f"`import {name}` finds the package{whose} at {origin}, not Palaestra's at {home / name}; "
            f"import `palaestra` first (it puts its own packages first), or use a separate environment"
        )
