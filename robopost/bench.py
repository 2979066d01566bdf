# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that save after every cell, resume, and end in figures with targets.

A benchmark is a file `benchmarks/<name>.py` with a docstring and `run(bench: Bench) -> None`:

    from robopost.interleave import interleave

    def run(bench):
        steps = bench.scale(smoke=200, small=20_000, paper=200_000)
        measure = lambda: interleave(lambda: ours(steps), lambda: theirs(steps), rounds=7).row()
        row = bench.cell("halfcheetah", measure, params={"steps": steps})
        bench.figure("speed_ratio", row["median"], interval=(row["min"], row["max"]), unit="x", target=1.8)
"""

from __future__ import annotations

import fcntl
import fnmatch
import importlib.util
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from robopost import machine
from robopost.errors import ConfigError, unknown
from robopost.results import SCHEMA, params_hash, plain, read_result, write_json

logger = logging.getLogger(__name__)
TIERS = ("smoke", "small", "paper")
T = TypeVar("T")


class Missing(dict[str, Any]):
    """What a failed or left-out cell returns: false, empty, and NaN under every key.

    NaN runs through the arithmetic that follows and arrives as an empty figure: nothing is made up.
    """

    def __missing__(self, key: str) -> float:
        return math.nan


class Bench:
    """One benchmark's results file.

    Args:
        name: file name without suffix.
        tier: "smoke" (results/smoke/, not committed), "small" or "paper" (results/<suite>/).
        results_dir: the `results` folder.
        suite: sub-folder of small and paper results.
        cells: glob; cells whose key doesn't match are not measured (stored values are still used).
        rerun: measure matching cells again even where a stored value fits.
        packages: further distributions whose versions are recorded.
    """

    def __init__(
        self,
        name: str,
        tier: str = "smoke",
        results_dir: Path | str = "results",
        *,
        suite: str = "spine",
        cells: str = "*",
        rerun: bool = False,
        title: str = "",
        packages: Iterable[str] = (),
    ) -> None:
        if tier not in TIERS:
            raise unknown("tier", tier, TIERS)
        self.name, self.tier, self.suite, self.title = name, tier, suite, title or name
        self.path = Path(results_dir) / ("smoke" if tier == "smoke" else suite) / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.tables: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self._filter, self._rerun = cells, rerun
        self._finished = False
        self._packages = list(packages)
        self._asked: set[str] = set()
        self._measured: set[str] = set()
        self._new_figures: set[str] = set()
        self._new_tables: set[str] = set()
        self._revision = machine.revision()
        if self.path.exists():
            self._load()

    def scale(self, *, smoke: T, small: T, paper: T) -> T:
        """Pick a value by tier."""
        return {"smoke": smoke, "small": small, "paper": paper}[self.tier]

    def packages(self, *names: str) -> None:
        """Record the versions of further distributions, e.g. `"stable-baselines3"`."""
        self._packages += [name for name in names if name not in self._packages]

    def cell(
        self,
        key: str,
        fn: Callable[[], dict[str, Any]],
        *,
        params: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Measure one cell, or return what an earlier run stored for the same key, tier, params and seed.

        Args:
            key: unique in the benchmark, e.g. `"hopper/seed0"`.
            fn: does the measurement and returns a JSON-able dict.
            params: everything that changes the outcome; a changed value makes the stored cell stale.
            seed: recorded with the cell and in the file's list of seeds.

        Returns:
            The cell's dict, or `Missing` where it failed (recorded with its error) or the filter left it out.
        """
        if key in self._asked:
            raise ConfigError(f"benchmark {self.name!r} asks for the cell {key!r} twice; keys must be unique")
        self._asked.add(key)
        wanted = fnmatch.fnmatchcase(key, self._filter)
        digest = params_hash({"params": params or {}, "seed": seed})
        self._adopt()
        stored = self._find(key)
        fits = stored is not None and stored["status"] == "ok" and stored["hash"] == digest
        if stored is not None and fits and not (self._rerun and wanted):
            logger.info("%s: %s stored", self.name, key)
            return dict(stored["result"])
        if not wanted:
            self.left_out.append(key)
            return Missing()
        logger.info("%s: %s ...", self.name, key)
        row: dict[str, Any] = {
            "cell": key,
            "tier": self.tier,
            "hash": digest,
            "params": params or {},
            "seed": seed,
        }
        row |= {
            "commit": self._revision["commit"],
            "dirty": self._revision["dirty"],
            "load": machine.load()[:1],
        }
        start = time.perf_counter()
        result: dict[str, Any] = Missing()
        try:
            result = plain(fn())
            if not isinstance(result, dict):
                raise TypeError(f"cell {key!r} must return a dict, got {type(result).__name__}")
            row |= {"status": "ok", "result": result}
        except Exception as error:
            self.failed.append(key)
            where = traceback.format_exception(error)[-6:]
            row |= {"status": "failed", "error": machine.scrub(f"{type(error).__name__}: {error}")}
            row["trace"] = machine.scrub("".join(where))
            result = Missing()
            logger.warning("%s: %s failed: %s", self.name, key, error)
        row["seconds"] = round(time.perf_counter() - start, 3)
        # A failure must not wipe out an older measurement of the very same cell.
        if row["status"] == "failed" and fits and stored is not None:
            stored["last_error"] = row["error"]
        else:
            self._put(row)
        self._measured.add(key)
        self.save()
        return result

    def figure(
        self,
        name: str,
        value: float | None,
        *,
        interval: tuple[float, float] | None = None,
        unit: str = "",
        target: float | None = None,
        better: str = "higher",
        note: str = "",
    ) -> None:
        """Record a headline number. NaN or None stands for "not measured yet" and shows as empty.

        Args:
            name: unique over all benchmarks.
            value: the number; ratios are ours / theirs.
            interval: its confidence interval, or min-max of an interleaved ratio.
            unit: e.g. `"x"`, `"s"`, `"fraction"`.
            target: what the project is held to.
            better: "higher" or "lower".
            note: how the number is to be read, e.g. a difference in environment to a paper.
        """
        if better not in ("higher", "lower"):
            raise unknown("better", better, ("higher", "lower"))
        number = None if value is None or not math.isfinite(value) else float(value)
        bounds = None
        if number is not None and interval is not None and all(math.isfinite(v) for v in interval):
            bounds = [float(v) for v in interval]
        entry = {
            "name": name,
            "value": number,
            "interval": bounds,
            "unit": unit,
            "target": target,
            "better": better,
        }
        entry |= {"note": note, "tier": self.tier}
        self._new_figures.add(name)
        self.figures = [*(old for old in self.figures if old["name"] != name), entry]
        self.save()

    def table(self, name: str, rows: Sequence[dict[str, Any]], *, caption: str = "") -> None:
        """Store a table for the docs: dict keys of the rows are the columns; NaN shows as an empty cell."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        entry = {
            "name": name,
            "columns": columns,
            "rows": [[plain(row.get(c)) for c in columns] for row in rows],
        }
        entry |= {"caption": caption, "tier": self.tier}
        self._new_tables.add(name)
        self.tables = [*(old for old in self.tables if old["name"] != name), entry]
        self.save()

    def finish(self) -> None:
        """Drop what the benchmark no longer asks for and save. Called after `run` returned."""
        self._adopt()
        self.rows = [row for row in self.rows if row["tier"] != self.tier or row["cell"] in self._asked]
        self.figures = [f for f in self.figures if f["tier"] != self.tier or f["name"] in self._new_figures]
        self.tables = [t for t in self.tables if t["tier"] != self.tier or t["name"] in self._new_tables]
        self._finished = True
        self.save()

    def save(self) -> None:
        """Write the results file atomically: a killed run leaves the previous one whole.

        Several processes may fill one table (`--cells`): each keeps the others' cells.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if not self._finished:
                self._adopt()
            self._write()
        finally:
            os.close(folder)

    def _write(self) -> None:
        tiers = {row["tier"] for row in self.rows}
        data = {
            "schema": SCHEMA,
            "name": self.name,
            "suite": self.suite,
            "title": self.title,
            "tier": self.tier,
            "tiers": [tier for tier in TIERS if tier in tiers],
            "seeds": sorted({row["seed"] for row in self.rows if row["seed"] is not None}),
            **self._revision,
            "command": f"robopost bench {self.name} --tier {self.tier}",
            "versions": machine.versions(self._packages),
            "hardware": machine.hardware(),
            "load": machine.load(),
            "wall_s": round(sum(row["seconds"] for row in self.rows), 3),
            "figures": self.figures,
            "tables": self.tables,
            "rows": self.rows,
        }
        write_json(self.path, data)

    def _adopt(self) -> None:
        """Take over the cells that another process has stored since this one last looked."""
        if not self.path.exists():
            return
        for row in read_result(self.path)["rows"]:
            if row["tier"] != self.tier or row["cell"] not in self._measured:
                self._put(row)

    def _load(self) -> None:
        data = read_result(self.path)
        self.rows, self.figures, self.tables = data["rows"], data["figures"], data.get("tables", [])

    def _find(self, key: str) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["cell"] == key and row["tier"] == self.tier), None)

    def _put(self, row: dict[str, Any]) -> None:
        same = (old for old in self.rows if (old["cell"], old["tier"]) == (row["cell"], row["tier"]))
        old = next(same, None)
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row


def find_checkout(start: Path | None = None) -> Path:
    """Root of the checkout: the first with `benchmarks/` at or above `start`, else that of this package.

    Raises:
        ConfigError: there is none, e.g. robopost is installed from a wheel.
    """
    here = (start or Path.cwd()).resolve()
    package = Path(__file__).resolve().parent.parent
    for folder in (here, *here.parents, package):
        if (folder / "benchmarks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise ConfigError("no benchmarks/ here or above. Fix: run in a checkout of the robopost repository")


def available(root: Path) -> dict[str, Path]:
    """Benchmarks of a checkout, name to file; files that start with `_` are helpers."""
    return {
        path.stem: path
        for path in sorted((root / "benchmarks").glob("*.py"))
        if not path.stem.startswith("_")
    }


def run_benchmark(
    name: str,
    tier: str,
    *,
    root: Path,
    results_dir: Path | None = None,
    cells: str = "*",
    rerun: bool = False,
) -> Bench:
    """Load `benchmarks/<name>.py` and run it. An error outside a cell propagates; finished cells are saved.

    Raises:
        ConfigError: unknown benchmark or tier, or a file without a docstring or `run`.
    """
    files = available(root)
    if name not in files:
        raise unknown("benchmark", name, files)
    spec = importlib.util.spec_from_file_location(f"robopost_benchmark_{name}", files[name])
    if spec is None or spec.loader is None:
        raise ConfigError(f"benchmarks/{name}.py can't be imported")
    module = importlib.util.module_from_spec(spec)
    folder = str(files[name].parent)
    # What benchmarks share lies in a folder beside them: `from sides.originals import ...`.
    sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
        if not module.__doc__ or not callable(getattr(module, "run", None)):
            raise ConfigError(
                f"benchmarks/{name}.py needs a docstring that says what it measures, and run(bench)"
            )
        title = module.__doc__.strip().splitlines()[0]
        suite = getattr(module, "SUITE", "spine")
        bench = Bench(
            name, tier, results_dir or root / "results", suite=suite, cells=cells, rerun=rerun, title=title
        )
        module.run(bench)
    finally:
        sys.path.remove(folder)
    bench.finish()
    return bench
