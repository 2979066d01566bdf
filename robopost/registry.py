# SPDX-License-Identifier: Apache-2.0
"""Names to classes. Configs and checkpoints select by name, never by import path."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from robopost.errors import ConfigError, unknown

T = TypeVar("T")
PLUGIN_GROUP = "robopost.plugins"


@dataclass(frozen=True)
class Entry:
    """One registered object: the class or function, its config dataclass and a one-line summary."""

    name: str
    target: Any
    config: type | None
    summary: str


class Registry:
    """A named collection that fills itself from a package of robopost and from installed plugins."""

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, name: str, config: type | None = None) -> Callable[[T], T]:
        """Class or function decorator. `config` is the dataclass that YAML under this name is checked against."""
        if config is not None and not is_dataclass(config):
            raise TypeError(f"{self.kind} {name!r}: config must be a dataclass, got {config!r}")

        def add(target: T) -> T:
            present = self._entries.get(name)
            if present is not None and present.target.__qualname__ != target.__qualname__:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"{self.kind} {name!r} is registered twice: {present.target!r} and {target!r}"
                )
            doc = (getattr(target, "__doc__", None) or "").strip()
            self._entries[name] = Entry(name, target, config, doc.splitlines()[0] if doc else "")
            return target

        return add

    def get(self, name: str) -> Entry:
        """Return the entry called `name`; an unknown name raises ConfigError with the nearest match."""
        self._load()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._entries

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return [entry.name for entry in self]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        if self._package:
            root = importlib.import_module(self._package)
            for module in pkgutil.walk_packages(root.__path__, prefix=f"{self._package}."):
                importlib.import_module(module.name)
        load_plugins()


_plugins_loaded = False


def load_plugins() -> None:
    """Import every module named by the entry-point group `robopost.plugins`, once per process."""
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in sorted(entry_points(group=PLUGIN_GROUP), key=lambda point: point.name):
        try:
            point.load()
        except Exception as error:
            raise ConfigError(f"plugin {point.name!r} ({point.value}) does not load: {error}") from error


ALGOS = Registry("algorithm", "robopost.algos")
POLICIES = Registry("policy", "robopost.policies")
ENVS = Registry("environment")  # robopost_envs and third parties, through plugins
FORMATS = Registry("data format", "robopost.data.formats")
TRACKERS = Registry("tracker", "robopost.track")
