"""Command lines over frozen dataclasses: TOML files, did-you-mean, exit code 2 for what the user got wrong."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

C = TypeVar("C")
Errors = tuple[type[BaseException], ...]


class UsageError(ValueError):
    """Something in the command or its configuration is wrong; the message says what, and what to do."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers an option takes; stands in its type as Annotated[int, Range(1)]."""

    low: float
    high: float = math.inf
    open: bool = False
    """Without the two ends themselves."""

    def refuses(self, value: float) -> bool:
        """Whether a number is outside; NaN and infinities always are."""
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        return not (inside and math.isfinite(value))

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"above {self.low:g}" if self.open else f"{self.low:g} or more"
        return f"between {self.low:g} and {self.high:g}"


Natural = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


def check_ranges(config: Any, path: str = "") -> None:
    """UsageError naming the first number of a config (and the configs in it) that is outside its Range."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{path}{f.name}.")
        elif isinstance(value, int | float):
            for part in (hints[f.name], *typing.get_args(hints[f.name])):
                for bound in getattr(part, "__metadata__", ()):
                    if isinstance(bound, Range) and bound.refuses(value):
                        option = f"--{path}{f.name}".replace("_", "-")
                        raise UsageError(f"{option} is {bound}, not {value}")


def nearest(name: str, known: Iterable[str]) -> str:
    """"; did you mean `x`?" for the nearest known name, or the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def parse(config_type: type[C], argv: Sequence[str], prog: str, default: C | None = None) -> C:
    """`argv` as a `config_type`, over `--config FILE.toml` if given, over the defaults.

    Later sources win: defaults, then the file, then the command line. Exits 2 with a message (and a did-you-mean)
    on an unknown option or key.
    """
    files, rest = _take_config(list(argv))
    base = default if default is not None else _default(config_type)
    for file in files:
        base = from_toml(file, config_type, base)
    config = tyro.cli(
        config_type,
        prog=prog,
        description=(config_type.__doc__ or "").strip() + "\n\n--config FILE.toml reads options from a file; "
        "options on the command line win.",
        args=rest,
        default=base,
        config=(tyro.conf.UseAppendAction,),
    )
    check_ranges(config)
    return config  # type: ignore[return-value]


def _default(config_type: type[C]) -> C | None:
    required = [
        f for f in dataclasses.fields(config_type)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return None if required else config_type()


def _take_config(argv: list[str]) -> tuple[list[str], list[str]]:
    """The values of `--config FILE` / `--config=FILE`, and the other arguments."""
    files: list[str] = []
    rest: list[str] = []
    items = iter(argv)
    for item in items:
        if item == "--config":
            value = next(items, None)
            if value is None:
                raise UsageError("--config needs a file name")
            files.append(value)
        elif item.startswith("--config="):
            files.append(item.partition("=")[2])
        else:
            rest.append(item)
    return files, rest


def from_toml(file: str | Path, config_type: type[C], base: C | None) -> C:
    """`base` with the keys of a TOML file; raises UsageError naming an unknown key or a wrong value."""
    try:
        data = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid TOML: {error}") from error
    return from_mapping(data, config_type, base, where=str(file))


def from_mapping(data: Mapping[str, Any], config_type: type[C], base: C | None = None, where: str = "") -> C:
    """A config from nested plain data (TOML, JSON); dashes in keys are underscores."""
    hints = typing.get_type_hints(config_type)
    fields = {f.name for f in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for raw_key, value in data.items():
        key = raw_key.replace("-", "_")
        if key not in fields:
            raise UsageError(f"{where or config_type.__name__}: unknown key `{raw_key}`{nearest(key, fields)}")
        values[key] = _coerce(value, hints[key], getattr(base, key, None), f"{where}: {raw_key}")
    try:
        return dataclasses.replace(base, **values) if base is not None else config_type(**values)  # type: ignore
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from error


def _coerce(value: Any, hint: Any, base: Any, where: str) -> Any:
    """`value` from TOML or JSON as the annotated type, or UsageError."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(value, hint, base, where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        hint = next(a for a in args if a is not type(None))
        return _coerce(value, hint, base, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = args[0] if args else Any
        return tuple(_coerce(v, inner, None, where) for v in value)
    if origin is typing.Literal:
        if value in args:
            return value
        known = ", ".join(map(str, args))
        raise UsageError(f"{where} must be one of {known}, not {value!r}{nearest(str(value), args)}")
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and hint in (int, float, str, bool) and type(value) is not hint:
        raise UsageError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value


def assignments(items: Sequence[str], option: str) -> dict[str, Any]:
    """`("level=2", "name=x")` as a dict; values are Python literals, anything else is text."""
    out: dict[str, Any] = {}
    for item in items:
        key, sep, text = item.partition("=")
        if not sep or not key.isidentifier():
            raise UsageError(f"{option} takes NAME=VALUE, not {item!r}")
        if key in out:
            raise UsageError(f"{option} names `{key}` twice")
        try:
            out[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            out[key] = text
    return out


def as_json(config: Any) -> dict[str, Any]:
    """A config as plain data that `from_mapping` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def run(
    main: Callable[[Sequence[str]], int | None],
    user_errors: Errors | Callable[[], Errors] = (),
) -> None:
    """Call `main(argv)` and exit: 2 with one line for a user's mistake, otherwise main's code.

    `user_errors` may be a function, called only after something was raised: types that live in slow modules.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = main(sys.argv[1:])
    except UsageError as error:
        _refuse(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        if not isinstance(error, user_errors() if callable(user_errors) else user_errors):
            raise
        _refuse(error)
    raise SystemExit(code or 0)


def _refuse(error: Exception) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # every process of a run finds the same mistake; one says so
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
