"""Palaestra under one name: `palaestra.envs`, `palaestra.agents`, ... are the very modules `envs`, `agents`, ...

The suite's import packages have short names, and `agents` is also the import name of another wheel
(openai-agents). Importing through this package always finds ours: it puts the folder that holds them first on
the path, and says so plainly where a foreign package of the same name is already loaded.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACKAGES = ("agents", "envs", "policy_opt", "scenarios", "tools")

_HERE = Path(__file__).resolve().parent
HOME = _HERE / "_packages" if (_HERE / "_packages").is_dir() else _HERE.parent
"""The folder that holds the import packages: inside the wheel, or the checkout of an editable install."""


def _claim() -> None:
    """Put HOME first on the path and refuse to go on beside an already imported foreign namesake."""
    for name in PACKAGES:
        module = sys.modules.get(name)
        origin = getattr(module, "__file__", None)
        if module is not None and (origin is None or Path(origin).resolve().parent != HOME / name):
            raise ImportError(
                f"a package `{name}` that is not Palaestra's is already imported (from {origin}); "
                f"import `palaestra` before it, or run the two in separate processes"
            )
    home = str(HOME)
    if not sys.path or sys.path[0] != home:
        sys.path.insert(0, home)
        importlib.invalidate_caches()


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds `palaestra.X` as the module object `X`."""

    def find_spec(self, fullname, path=None, target=None):
        head, _, rest = fullname.partition(".")
        if head != "palaestra" or rest.split(".")[0] not in PACKAGES:
            return None
        real = importlib.util.find_spec(rest)
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, origin=real.origin, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        # The import system hands out whatever stands in sys.modules after this call.
        sys.modules[module.__name__] = importlib.import_module(module.__name__.partition(".")[2])

    def get_source(self, fullname: str) -> str | None:
        """Source of the aliased module, for `python -m palaestra.agents.train`."""
        spec = importlib.util.find_spec(fullname.partition(".")[2])
        loader = None if spec is None else spec.loader
        return loader.get_source(spec.name) if isinstance(loader, importlib.abc.InspectLoader) and spec else None


_claim()
sys.meta_path.insert(0, _Alias())
