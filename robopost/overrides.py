# SPDX-License-Identifier: Apache-2.0
"""`key=value` overrides: parsing, and setting typed values with errors that name key and nearest match."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robopost.errors import ConfigError, nearest

TARGET = "_target_"
NO_TARGET = "_target_ is not allowed, code is chosen by registry name (algo=, policy=, env=)"


@dataclass(frozen=True)
class Override:
    """One parsed `key=value`: `text` is what the user wrote."""

    key: str
    value: Any
    text: str


def parse(overrides: Iterable[str]) -> list[Override]:
    """Parse `key=value` words with Hydra's grammar (numbers, booleans, null, lists, dicts, quoted strings).

    Raises:
        ConfigError: a word is not `key=value`, is a sweep, or sets something of Hydra itself.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if text.startswith(("+", "~")):
            raise ConfigError(
                f"{text!r}: keys can't be added or removed, the schema is fixed. Fix: key=value"
            )
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r} is not key=value. Fix: write e.g. seed=1 or loop.steps=1000")
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            raise ConfigError(f"{text!r}: settings of Hydra itself have no effect here")
        if TARGET in key.split("."):
            raise ConfigError(f"{text!r}: {NO_TARGET}")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            # Paths with characters the grammar gives a meaning (spaces, parentheses) are plain strings.
            if any(mark in raw for mark in "[]{}'\"$"):
                raise ConfigError(f"{text!r} does not parse: {first_line(error)}") from error
            parsed.append(Override(key, raw, text))
            continue
        if override.is_sweep_override():
            raise ConfigError(
                f"{text!r} is a sweep, one run takes one value. Fix: key=[a,b] for a list; seeds=N for seeds"
            )
        if override.type != OverrideType.CHANGE:
            raise ConfigError(f"{text!r} is not key=value")
        parsed.append(Override(override.get_key_element(), override.value(), text))
    return parsed


def set_value(config: DictConfig, override: Override) -> None:
    """Set one typed value in a structured config, in place.

    Raises:
        ConfigError: unknown key (with the nearest match) or a value of the wrong type.
    """
    parts = override.key.split(".")
    node: Any = config
    for depth, part in enumerate(parts[:-1]):
        path = ".".join(parts[: depth + 1])
        _check_key(node, part, override, parts[:depth])
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, part):
            raise ConfigError(f"{override.text}: {path} is not set")
        child = node[int(part)] if isinstance(node, ListConfig) else node[part]
        if child is None:
            raise ConfigError(f"{override.text}: no {path} is chosen. Fix: add {path}=<name>")
        if not isinstance(child, (DictConfig, ListConfig)):
            raise ConfigError(
                f"{override.text}: {path} is a {type(child).__name__}, it has no key {parts[depth + 1]!r}"
            )
        node = child
    _check_key(node, parts[-1], override, parts[:-1])
    _assign(node, parts[-1], override)


def _check_key(node: DictConfig | ListConfig, part: str, override: Override, parents: list[str]) -> None:
    if isinstance(node, ListConfig):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(
                f"{override.text}: {'.'.join(parents)} is a list of {len(node)}, {part!r} is no index of it"
            )
        return
    if part == TARGET:
        raise ConfigError(f"{override.text}: {NO_TARGET}")
    names = [str(name) for name in node]  # not `part in node`, which is False for a missing value
    if OmegaConf.get_type(node) is dict or part in names:
        return
    where = ".".join(parents)
    prefix = f"{where}." if where else ""
    listed = ", ".join(prefix + name for name in sorted(names))
    raise ConfigError(
        f"unknown key {override.key!r} in {override.text!r}."
        f"{nearest(prefix + part, [prefix + name for name in names])} Keys: {listed}"
    )


def _assign(node: DictConfig | ListConfig, part: str, override: Override) -> None:
    value = override.value
    key: Any = int(part) if isinstance(node, ListConfig) else part
    current = node._get_node(key)
    if (
        isinstance(current, DictConfig)
        and isinstance(value, dict)
        and OmegaConf.get_type(current) is not dict
    ):
        for name, item in value.items():
            set_value(current, Override(str(name), item, override.text))
        return
    if isinstance(current, DictConfig) and is_dataclass(OmegaConf.get_type(current)):
        raise ConfigError(
            f"{override.text}: {override.key} is a section. Fix: set its keys, e.g. {override.key}.<key>=..."
        )
    hint = field_type(node, part)
    if isinstance(value, float) and value.is_integer() and hint is int:
        value = int(value)  # 1e6 is how people write a number of steps
    try:
        node[key] = value
    except OmegaConfBaseException as error:
        wanted = type_name(hint) if hint is not None else "another type"
        raise ConfigError(f"{override.text}: {override.key} takes {wanted}, got {_show(value)}") from error


def field_type(node: DictConfig | ListConfig, name: str) -> Any:
    """Annotated type of the dataclass field behind `node[name]`, or None where the node is untyped."""
    if isinstance(node, ListConfig):
        return None
    cls = OmegaConf.get_type(node)
    if not is_dataclass(cls):
        return None
    return typing.get_type_hints(cls).get(name)


def type_name(hint: Any) -> str:
    """A type as a user reads it: `int`, `list[str]`, `float or null`."""
    if hint is type(None):
        return "null"
    if hint is Any:
        return "any value"
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(item) for item in typing.get_args(hint))
    if origin is not None:
        inner = ", ".join("..." if item is Ellipsis else type_name(item) for item in typing.get_args(hint))
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def field_names(cls: Any) -> list[str]:
    """Field names of a dataclass, an empty list for anything else."""
    return [item.name for item in fields(cls)] if is_dataclass(cls) else []


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return f"{str(value)!r} ({type(value).__name__})" if not isinstance(value, str) else repr(value)
