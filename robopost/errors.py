# SPDX-License-Identifier: Apache-2.0
"""User-facing errors: one line that names the key, the value, the allowed range and the fix."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType


class RobopostError(Exception):
    """An error a user can act on. The command line prints its message alone and exits with `exit_code`."""

    exit_code = 2


class ConfigError(RobopostError):
    """A configuration value, key or name is wrong."""


class DataError(RobopostError):
    """A dataset or a batch breaks its contract."""


class CheckpointError(RobopostError):
    """A checkpoint is torn, foreign or does not fit."""


class EnvError(RobopostError):
    """An environment misbehaves or does not fit the policy."""


class MissingExtraError(RobopostError):
    """An optional dependency is needed and not installed."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `options`, or an empty string."""
    match = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def unknown(
    kind: str, name: str, options: Iterable[str], error: type[RobopostError] = ConfigError
) -> RobopostError:
    """Build the error for an unknown `name` of a `kind`, with the nearest match and the list."""
    listed = sorted(options)
    return error(f"unknown {kind} {name!r}.{nearest(name, listed)} Available: {', '.join(listed) or 'none'}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: import name, e.g. `"h5py"`.
        extra: the robopost extra that brings it, e.g. `"minari"`.

    Raises:
        MissingExtraError: with the exact install command, when the module is absent.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            raise MissingExtraError(f"{module} is installed but does not import: {error}") from error
        raise MissingExtraError(f"{module} is not installed. Fix: pip install 'robopost[{extra}]'") from error
