# SPDX-License-Identifier: Apache-2.0
"""Foreign data formats. Each is a class in a module of this package, registered by name.

A format looks like this; options are the keyword-only parameters of `read` (and of `write`)::

    @FORMATS.register("minari")
    class Minari(Format):
        '''Minari / D4RL-style HDF5.'''

        @classmethod
        def detect(cls, path: Path) -> bool: ...

        @classmethod
        def read(cls, path: Path, *, group: str = "") -> EpisodeSource: ...
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from robopost.data.batch import Spec
from robopost.data.episode import Episode, KeySpec, Problem
from robopost.errors import DataError, unknown
from robopost.registry import FORMATS, Entry

if TYPE_CHECKING:
    from robopost.data.store import EpisodeStore


@dataclass
class EpisodeSource:
    """What a reader returns: the declaration of a dataset and its episodes, read one at a time.

    Attributes:
        spec: observation keys, action size and bounds (+-inf where the file declares none).
        fps: steps per second; 0 when the file doesn't say.
        source: where the data comes from, for people, e.g. `"minari D4RL/door/human-v2"`.
        episodes: yields each episode once, in order; may be a generator that reads lazily.
        count: number of episodes, 0 when unknown (used for progress only).
        extras: key -> (shape without time, dtype) of the per-step extras of every episode.
        options: options that shaped the result and belong into its identity (e.g. `{"cameras": ["top"]}`).
        metadata: JSON-able facts about the dataset, kept in the store (licence, robot, original spec, ...).
    """

    spec: Spec
    fps: float
    source: str
    episodes: Iterable[Episode]
    count: int = 0
    extras: dict[str, KeySpec] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class Format(ABC):
    """One foreign format. Raise `DataError` for a file that is torn or foreign, never a bare KeyError.

    Heavy or optional packages are imported inside the methods, through `robopost.errors.require`.
    """

    can_write: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def detect(cls, path: Path) -> bool:
        """True when `path` (file or folder) is of this format. Cheap, never raises, no optional import."""

    @classmethod
    @abstractmethod
    def read(cls, path: Path, **options: Any) -> EpisodeSource:
        """Open `path`. Options are keyword-only parameters with defaults; unknown ones are rejected."""

    @classmethod
    def write(cls, store: EpisodeStore, path: Path, **options: Any) -> None:
        """Export `store` to `path`, which does not exist yet. Set `can_write` where this is implemented."""
        raise DataError(f"{cls.__name__} can't be written, only read")

    @classmethod
    def verify(cls, path: Path, **options: Any) -> list[Problem]:
        """Find what is wrong with `path`; default: read every episode and check it.

        A format with files of its own adds what only it can see: a missing video, a short table.
        """
        from robopost.data.verify import check_source

        return check_source(cls.read(path, **options))


def find_format(path: Path, name: str = "auto") -> Entry:
    """The registered format of `path`.

    Args:
        path: a file or a folder.
        name: a registry name, or `"auto"` to ask each format.

    Raises:
        DataError: nothing there, no format knows it, or several do.
    """
    if not path.exists():
        raise DataError(f"no data at {path}; fix: check data.path")
    if name != "auto":
        if name not in FORMATS:
            raise unknown("data format", name, FORMATS.names(), DataError)
        return FORMATS.get(name)
    found = [entry for entry in FORMATS if entry.target.detect(path)]
    if not found:
        raise DataError(
            f"{path} is of no known format ({', '.join(FORMATS.names())}); fix: name it with data.format"
        )
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise DataError(f"{path} could be {names}; fix: name one with data.format")
    return found[0]


def open_source(path: Path, name: str = "auto", options: dict[str, Any] | None = None) -> EpisodeSource:
    """Read `path` with its format; unknown `options` raise DataError with the nearest match."""
    target = find_format(path, name).target
    return target.read(path, **checked_options(target.read, options or {}))


def checked_options(method: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return `options` when `method` has a keyword-only parameter for each of them, else raise DataError."""
    parameters = inspect.signature(method).parameters.values()
    known = [item.name for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise unknown("option", key, known, DataError)
    return options
