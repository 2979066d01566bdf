# SPDX-License-Identifier: Apache-2.0
"""The results files that `robopost bench` writes: reading, writing, and whether a figure holds its target."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from robopost.errors import ConfigError

SCHEMA = 1


def status(figure: dict[str, Any]) -> str:
    """`"holds"`, `"misses"`, `"empty"` (not measured) or `"-"` (no target)."""
    value, target = figure["value"], figure["target"]
    if value is None:
        return "empty"
    if target is None:
        return "-"
    return "holds" if (value >= target if figure["better"] == "higher" else value <= target) else "misses"


def params_hash(params: dict[str, Any]) -> str:
    """Short content hash of a JSON-able dict, independent of key order."""
    text = json.dumps(plain(params), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON through a temporary file, synced and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(json.dumps(data, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_result(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ConfigError: not JSON, or of another schema.
    """
    try:
        data = json.loads(path.read_text())
        known = (
            data["schema"] == SCHEMA and isinstance(data["rows"], list) and isinstance(data["figures"], list)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a results file ({error}). Fix: delete it and run the benchmark"
        ) from error
    if not known:
        raise ConfigError(
            f"{path} has schema {data['schema']}, this version writes {SCHEMA}. Fix: delete it, run again"
        )
    return data


def read_results(results_dir: Path, *, smoke: bool = False) -> list[dict[str, Any]]:
    """All results files below `results_dir`, without (or, with `smoke`, only) those of the smoke tier."""
    paths = sorted(path for path in results_dir.glob("*/*.json") if (path.parent.name == "smoke") == smoke)
    return [read_result(path) for path in paths]


def plain(value: Any) -> Any:
    """NumPy and torch scalars and arrays to JSON types; NaN and infinities to None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float) -> str:
    """Four significant digits, thousands separated, without a needless exponent."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
    return f"{value:.2e}"
