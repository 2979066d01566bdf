# SPDX-License-Identifier: Apache-2.0
"""What all loops share: the run folder, random streams, logging, evaluation, checkpoints and resume."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics
from robopost.artefacts.checkpoint import latest, load_json, load_tensors, save_checkpoint
from robopost.compose import to_dict
from robopost.config import TrainConfig
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError, RobopostError
from robopost.loops.provenance import provenance
from robopost.loops.ranks import ALONE, Ranks, check_batch
from robopost.policies.base import Policy, build_policy
from robopost.registry import ALGOS
from robopost.track import make_tracker

log = logging.getLogger(__name__)
STREAMS = ("data", "policy", "algo")
Files = dict[str, dict[str, Any]]


def resolve_device(name: str) -> torch.device:
    """`auto` picks CUDA where there is a device.

    Raises:
        ConfigError: the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} is not available here: {str(error).splitlines()[0]}") from error
    return device


@dataclass
class Run:
    """One training run of one seed in one folder.

    A loop builds the pieces through `build`, calls `after(step, metrics)` once per unit of progress, and gives
    `extra_state` / `restore_extra` for what only it knows (environment, buffer, counters).
    """

    config: TrainConfig
    folder: Path
    command: str = ""
    seeds: int = 1
    quiet: bool = False  # without the console tracker: one of several runs that train at once
    ranks: Ranks = ALONE  # the processes that train it
    device: torch.device = field(init=False)
    generators: dict[str, torch.Generator] = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.ranks.device or resolve_device(self.config.device)
        self.generators = {}
        for index, name in enumerate(STREAMS):
            self.generators[name] = torch.Generator(device=self.device)
            self.generators[name].manual_seed(stream_seed(self.config.seed, index))
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._updates = 0
        self._episodes: dict[str, list[float]] = {}
        self._timers: dict[str, float] = {}
        self._mark = time.perf_counter()
        self._marked_step = 0
        self.step = 0
        self.tracker: Any = None
        self._discardable = False
        self._kept: set[Path] | None = (
            None  # what the folder held before this run, None = there was no folder
        )

    # -- building -----------------------------------------------------------------------------------------------

    def build(self, spec: Spec, stats: dict[str, Any] | None, source: str) -> Algorithm:
        """Policy and algorithm for `spec`, normaliser fitted, weights from the seed.

        Args:
            spec: shapes of the task.
            stats: dataset statistics the normaliser is fitted to; None = environment bounds only.
            source: where `stats` come from, kept as provenance.
        """
        config = self.config
        torch.manual_seed(stream_seed(config.seed, len(STREAMS)))
        entry = ALGOS.get(config.algo.name)
        policy = build_policy(config.policy, spec).to(self.device)
        if stats is not None and not policy.normaliser_fixed:
            policy.normaliser.fit(
                stats, obs=config.policy.normalise_obs, action=config.policy.normalise_action, source=source
            )
        if config.accel.fsdp:
            from robopost.nets.sharded import shard  # takes seconds to import

            shard(policy, entry.target.sharded_by)
        algo: Algorithm = entry.target(
            config.algo, policy, policy.spec, device=self.device, generator=self.generators["algo"]
        )
        algo.accelerate("eager" if config.accel.fsdp else config.accel.mode)
        check_batch(self.ranks, algo.needs.batch_size)
        size = sum(parameter.numel() for parameter in policy.parameters())
        log.info(
            "%s on %s: policy %s, %.2fM parameters", entry.name, self.device, config.policy.name, size / 1e6
        )
        return algo

    def prepare(self, algo: Algorithm) -> dict[str, Any] | None:
        """Create the run folder, or restore `algo` from its latest checkpoint.

        Returns:
            The loop's own JSON state of the checkpoint, or None for a fresh run.
        """
        checkpoint = latest(self.folder) if self.folder.exists() else None
        # First of all: where the checkpoint doesn't fit, its run keeps its own description.
        state = self._restore(algo, checkpoint) if checkpoint is not None else None
        if not self.ranks.first:
            return state
        if checkpoint is None:
            self._kept = set(self.folder.iterdir()) if self.folder.exists() else None
            self._discardable = True
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "eval").mkdir(exist_ok=True)
        plain = to_dict(self.config)
        described = provenance(self.config, self.command, algo.policy) | {"seeds": self.seeds}
        described |= {"processes": self.ranks.size} if self.config.accel.fsdp else {}
        _write_json(self.folder / "provenance.json", described)
        _write_json(self.folder / "config.json", plain)  # last: it makes the folder a run
        track = replace(self.config.track, console=False) if self.quiet else self.config.track
        self.tracker = make_tracker(self.folder, track, plain, self.step, total=self.config.loop.total)
        self._marked_step = self.step
        self._mark = time.perf_counter()
        return state

    # -- progress -----------------------------------------------------------------------------------------------

    def record(self, metrics: Metrics) -> None:
        """Add the metrics of one update; tensors stay on their device until the next log line."""
        for key, value in metrics.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
            # Counted per key: delayed actor updates report less often than critics.
            self._counts[key] = self._counts.get(key, 0) + 1
        self._updates += 1

    def record_sums(self, sums: Metrics, counts: dict[str, int], updates: int) -> None:
        """Add the metrics of several updates: per key their sum and how many there were."""
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + counts[key]
        self._updates += updates

    def record_episode(self, values: dict[str, float]) -> None:
        """Add numbers known on the host, e.g. `train/return` of one finished episode; a log line has their mean."""
        for key, value in values.items():
            self._episodes.setdefault(key, []).append(value)

    def add_time(self, key: str, seconds: float) -> None:
        """Add to a `time/...` metric, reported as share of wall time in seconds per log interval."""
        self._timers[key] = self._timers.get(key, 0.0) + seconds

    def pause(self, seconds: float) -> None:
        """Leave `seconds` that went into something else out of the reported rates."""
        self._mark += seconds

    def due(self, step: int) -> bool:
        """True where `after(step)` has something to do."""
        loop = self.config.loop
        intervals = (loop.log_every, loop.eval_every, loop.checkpoint_every)
        last = step >= loop.total or step == loop.steps
        return last or any(crossed(self.step, step, every) for every in intervals)

    def after(
        self,
        step: int,
        algo: Algorithm,
        extra_state: Callable[[], tuple[Files, dict[str, Any]]] | None = None,
    ) -> bool:
        """Log, evaluate and checkpoint where `step` crosses an interval. Call once per unit of progress.

        Returns:
            True when a checkpoint was written.
        """
        loop, before, self.step = self.config.loop, self.step, step
        # The end of the offline updates is logged, evaluated and saved like the end of the run.
        last = step >= loop.total or step == loop.steps
        if last or crossed(before, step, loop.log_every):
            self._log(step)
        saving = last or crossed(before, step, loop.checkpoint_every)
        try:
            if self.config.env is not None and (last or crossed(before, step, loop.eval_every)):
                self.evaluate(algo, step)
        finally:
            # Also when the environment fails in the evaluation: what was learnt must not go with it.
            if saving:
                self.checkpoint(algo, step, extra_state)
        return saving

    def _log(self, step: int) -> None:
        keys = sorted(self._sums)
        # One transfer for all metrics instead of one sync per value.
        sums = [self._sums[key].float().reshape(()) for key in keys]
        values = self.ranks.mean(torch.stack(sums)).tolist() if keys else []
        line = {key: value / self._counts[key] for key, value in zip(keys, values, strict=True)}
        for key, value in line.items():
            if not np.isfinite(value):
                raise RobopostError(
                    f"{key} is {value} at step {step}: training diverged. "
                    "Fix: lower the learning rate, or check the data with `robopost data verify`"
                )
        episodes = self.ranks.merged(self._episodes)
        line |= {key: float(np.mean(items)) for key, items in episodes.items() if items}
        seconds = time.perf_counter() - self._mark
        done = step - self._marked_step
        line |= {"time/steps_per_s": done / max(seconds, 1e-9)} | self._timers
        if self._updates:
            line["time/updates_per_s"] = self._updates / max(seconds, 1e-9)
        if self.ranks.first:
            self.tracker.log(step, line)
        self._sums, self._counts, self._updates, self._episodes, self._timers = {}, {}, 0, {}, {}
        self._mark, self._marked_step = time.perf_counter(), step

    def evaluate(self, algo: Algorithm, step: int) -> None:
        """Evaluate the exported policy, log `eval/...` and save `eval/step_<step>.json`."""
        policy = self._exported(algo)
        try:
            if policy is not None:
                self._evaluate(policy, step)
        finally:
            self.ranks.wait()

    def _exported(self, algo: Algorithm) -> Policy | None:
        """The policy to evaluate or save; where it is spread over processes a whole copy, None but in the first."""
        if not self.config.accel.fsdp:
            return algo.export_policy()
        from robopost.nets.sharded import gathered

        return gathered(algo.export_policy())

    def _evaluate(self, policy: Policy, step: int) -> None:
        from robopost.evaluate.rollout import evaluate

        loop, track = self.config.loop, self.config.track
        began = time.perf_counter()
        training = policy.training
        policy.eval()
        video = self.folder / "videos" / f"step_{step:09d}.mp4" if track.video_episodes else None
        result = evaluate(
            policy,
            self.config.env,
            episodes=loop.eval_episodes,
            deterministic=loop.eval_deterministic,
            seed=stream_seed(self.config.seed, 100) % 2**31,
            video=video,
            video_episodes=track.video_episodes,
        )
        policy.train(training)
        self.tracker.log(step, result.metrics())
        if video is not None:
            self.tracker.video(step, "eval", video)
        _write_json(self.folder / "eval" / f"step_{step:09d}.json", result.to_json() | {"step": step})
        self._mark += time.perf_counter() - began

    def close(self) -> None:
        """Flush and close the trackers."""
        if self.tracker is not None:
            self.tracker.close()

    def discard(self) -> None:
        """Remove what a run that failed before its first step has written; does nothing after that."""
        if not self._discardable or self.step > 0 or not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if self._kept is None or path not in self._kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._kept is None:
            self.folder.rmdir()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def checkpoint(
        self, algo: Algorithm, step: int, extra_state: Callable[[], tuple[Files, dict[str, Any]]] | None
    ) -> None:
        """Write a whole checkpoint of this moment."""
        state, policy = algo.state_dict(), self._exported(algo)
        try:
            if policy is not None:
                self._save(state, policy, step, extra_state)
        finally:
            self.ranks.wait()

    def _save(
        self,
        state: dict[str, Any],
        policy: Policy,
        step: int,
        extra_state: Callable[[], tuple[Files, dict[str, Any]]] | None,
    ) -> None:
        files, loop_state = extra_state() if extra_state is not None else ({}, {})
        streams = {f"rng/{name}": generator.get_state() for name, generator in self.generators.items()}
        streams["rng/torch"] = torch.get_rng_state()
        plain = {
            "format": 1,
            "step": step,
            "algo": self.config.algo.name,
            "policy": self.config.policy.name,
            "algorithm": state["json"],
            "loop": loop_state,
        }
        save_checkpoint(
            self.folder,
            step,
            {"model.safetensors": state["tensors"] | streams, "state.json": plain} | files,
            policy=policy,
            keep=self.config.loop.keep_checkpoints,
            spare=self.config.loop.steps,  # the offline result outlives the online phase
        )

    def _restore(self, algo: Algorithm, checkpoint: Path) -> dict[str, Any]:
        plain = load_json(checkpoint / "state.json")
        for key in ("algo", "policy"):
            wanted = getattr(self.config, key).name
            if plain.get(key) != wanted:
                raise CheckpointError(
                    f"{checkpoint} was written by {key} {plain.get(key)!r}, this run has {wanted!r}. "
                    "Fix: use another out= folder, or fine-tune with policy=<run>"
                )
        self._check_phase(checkpoint, int(plain["step"]), plain["loop"].get("online_from"))
        tensors = load_tensors(checkpoint / "model.safetensors")
        for name, generator in self.generators.items():
            generator.set_state(tensors.pop(f"rng/{name}"))
        torch.set_rng_state(tensors.pop("rng/torch"))
        algo.load_state_dict({"tensors": tensors, "json": plain["algorithm"]})
        self.step = int(plain["step"])
        log.info("resumed %s at step %d", self.folder, self.step)
        loop = self.config.loop
        if self.step >= loop.total:
            name = "online_steps" if loop.online_steps else "steps"
            log.warning("nothing to do: loop.%s=%d. Fix: raise loop.%s", name, getattr(loop, name), name)
        return plain["loop"] | {"checkpoint": str(checkpoint)}

    def _check_phase(self, checkpoint: Path, step: int, online_from: int | None) -> None:
        """Refuse lengths under which the checkpoint's online phase would begin at another step."""
        steps, online = self.config.loop.steps, self.config.loop.online_steps
        began = online_from if online_from is not None else step if online and step > steps else steps
        if began != steps:
            did = "went online after" if online_from is not None else "has done"
            raise CheckpointError(
                f"{checkpoint} {did} {began} offline updates, loop.steps={steps} doesn't fit. "
                f"Fix: loop.steps={began}; loop.online_steps lengthens the online phase"
            )


def stream_seed(seed: int, stream: int) -> int:
    """Seed of a named stream: independent of the others for any `seed`."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> 1)


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """The single-seed config of `seed`."""
    return replace(config, seed=seed, seeds=1, resume="")


def crossed(before: int, step: int, every: int) -> bool:
    """True where a multiple of `every` lies above `before` and not above `step`; never for 0."""
    return every > 0 and step // every > before // every


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True))
    partial.replace(path)
