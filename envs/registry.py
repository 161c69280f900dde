"""Names of environments: built in, from plugins (entry points), `package.module:Class`, Gymnasium ids."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import gymnasium

from envs.core import ChatEnv

GROUP = "palaestra.envs"
BUILT_IN: Mapping[str, str] = {"tool_qa": "envs.tool_qa:ToolQA"}
GYMNASIUM_IDS: Mapping[str, str] = {"palaestra/ToolQA-v0": "tool_qa"}


class UnknownEnv(LookupError):
    """No environment of that name; the message names the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])


class EnvConflict(ValueError):
    """Two distributions claim one environment name; the message names both."""


def make(spec: str | type[ChatEnv] | ChatEnv, **options: Any) -> ChatEnv:
    """An environment from its spec.

    Args:
        spec: a name (``tool_qa``, a plugin's), a Gymnasium id (``palaestra/ToolQA-v0``),
        ``package.module:Class``,
            ``jsonl:FILE``, a class, or an environment (returned as it is).
        options: keywords of the environment's constructor.

    Raises:
        UnknownEnv: no such environment. EnvConflict: two plugins of that name. TypeError: unknown option.
    """
    if isinstance(spec, ChatEnv):
        return spec
    if isinstance(spec, str) and spec.startswith("jsonl:"):
        options = {"file": spec.removeprefix("jsonl:"), **options}
    cls = resolve(spec)
    _check_options(cls, options)
    return cls(**options)


def resolve(spec: str | type[ChatEnv]) -> type[ChatEnv]:
    """The class behind a spec; works the same in every process, so only specs need to travel."""
    if not isinstance(spec, str):
        return _verified(spec, spec.__name__)
    spec = spec.removeprefix("envs:")
    if spec.startswith("jsonl:"):
        return _load("envs.jsonl:JsonlEnv", spec)
    spec = GYMNASIUM_IDS.get(spec, spec)
    names = known()
    if spec in names:
        return _load(names[spec], spec)
    if ":" in spec:
        return _load(spec, spec)
    if spec in gymnasium.registry:
        return _verified(type(gymnasium.make(spec, disable_env_checker=True).unwrapped), spec)
    near = difflib.get_close_matches(spec, [*names, *GYMNASIUM_IDS], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownEnv(
        f"no environment {spec!r}{hint} (known: {', '.join(sorted(names))}; also module:Class and jsonl:FILE)"
    )


def list_envs() -> list[str]:
    """Names of all environments, built in and from plugins."""
    return sorted(known())


def known() -> Mapping[str, str]:
    """Name -> ``module:Class`` of every built-in and installed environment."""
    return _known(tuple(sys.path))


@lru_cache(maxsize=16)
def _known(_path: tuple[str, ...]) -> Mapping[str, str]:
    """Scans the installed distributions; once per content of `sys.path`."""
    owners: dict[str, str] = dict.fromkeys(BUILT_IN, "palaestra")
    names = dict(BUILT_IN)
    for entry in importlib.metadata.entry_points(group=GROUP):
        owner = entry.dist.name if entry.dist is not None else "an unnamed distribution"
        if entry.name in names and (owners[entry.name], names[entry.name]) != (owner, entry.value):
            raise EnvConflict(
                f"two distributions define the environment {entry.name!r}: {owners[entry.name]} "
                f"({names[entry.name]}) and {owner} ({entry.value}); uninstall one, or name the class you "
                f"mean as module:Class"
            )
        names[entry.name], owners[entry.name] = entry.value, owner
    return names


def register_with_gymnasium() -> None:
    """Make the built-in environments known to `gymnasium.make`."""
    for gym_id, name in GYMNASIUM_IDS.items():
        if gym_id not in gymnasium.registry:
            gymnasium.register(gym_id, entry_point=BUILT_IN[name])


def _load(target: str, spec: str) -> type[ChatEnv]:
    module_name, _, class_name = target.partition(":")
    try:
        module = _import(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there and itself fails to import something
        raise UnknownEnv(f"environment {spec!r}: no module {module_name!r} on the path") from None
    cls = getattr(module, class_name, None)
    if cls is None:
        near = difflib.get_close_matches(class_name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownEnv(f"environment {spec!r}: module {module_name!r} has no {class_name!r}{hint}")
    return _verified(cls, spec)


def _import(name: str) -> Any:
    """Import a module; also from the current folder, which a console script does not have on its path."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def _verified(cls: Any, spec: str) -> type[ChatEnv]:
    if not (inspect.isclass(cls) and issubclass(cls, ChatEnv)):
        raise UnknownEnv(f"environment {spec!r}: {cls!r} is not a subclass of envs.ChatEnv")
    return cls


def _check_options(cls: type[ChatEnv], options: Mapping[str, Any]) -> None:
    """Options of the constructor, own and inherited; an unknown one is named with the nearest known."""
    accepted: set[str] = set()
    for base in cls.__mro__:  # as far up as keywords are passed on
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            accepted |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.kind is p.POSITIONAL_OR_KEYWORD}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    accepted -= {"self"}
    for key in options:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{cls.__name__} has no option {key!r}{hint} (options: {', '.join(sorted(accepted))})")
