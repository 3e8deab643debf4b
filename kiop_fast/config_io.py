"""Settings from and to the outside: nested values, ``key=value`` overrides, TOML."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kiop_fast.config import RunConfig, to_dict
from kiop_fast.errors import ConfigError, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def from_dict(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a frozen dataclass from nested values; unknown keys and wrong types are errors."""
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name("setting", path + key, [path + k for k in known], ConfigError)
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}{key} is a group of settings", got=repr(value),
                                  expected=f"{path}{key}.NAME = value")  # fmt: skip
            made[key] = from_dict(typing.cast(type, hint), value, f"{path}{key}.")
        else:
            made[key] = _convert(value, hint, path + key)
    return kind(**made)


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        inner = typing.get_args(hint)
        items = value if isinstance(value, (list, tuple)) else [value]
        if Ellipsis not in inner and len(items) != len(inner):
            raise ConfigError(f"{name} has the wrong length", got=value, expected=f"{len(inner)}")
        return tuple(_convert(v, inner[0], name) for v in items)
    if isinstance(hint, types.UnionType):  # pragma: no cover - no such field today
        raise TypeError(hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} has the wrong type", got=f"{value!r} ({type(value).__name__})",
                          expected=hint.__name__, fix="change that setting")  # fmt: skip
    return value


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the nested values of ``change`` put over it."""
    merged = dict(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A new config with nested ``changes`` applied and everything validated again."""
    return from_dict(RunConfig, merge(to_dict(config), changes))


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """``["storing.lr=0.5", "prompt.rings=[20, 32]"]`` as nested values (TOML on the right)."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError("an override is not of the form key=value", got=pair,
                              expected="storing.lr=0.5", fix="write key=value")  # fmt: skip
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        changes = merge(changes, value)
    return changes


def load_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, nested."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError("no such config file", got=path, fix="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the config file is no valid TOML", got=f"{path}: {error}",
                          fix="mend that line") from None  # fmt: skip


def dump_toml(config: RunConfig) -> str:
    """The config as TOML text; ``from_dict(RunConfig, tomllib.loads(text))`` gives it back."""
    import tomli_w  # steps, kernels and banks need none

    return tomli_w.dumps(to_dict(config))
