# SPDX-License-Identifier: Apache-2.0
"""Suites of offline data: sets defined in YAML, recorded into stores by `robopost collect suite=...`.

A set is `configs/suite/<suite>/<set>.yaml`: an environment and the sources its transitions come from. A source
is named by `from`:

    random                      uniform actions
    script                      the environment's scripted expert, of `quality`
    actor/<name>                a published actor, $ROBOPOST_TEST_DATA/policies_mujoco/<name>.npz
    run/<name>/<step>           the policy of a checkpoint of a run in <folder of the stores>/runs/<name>
    replay/<name>/<step>        the replay buffer of that run up to that step

Runs are made by `robopost train recipe=suite/<name>`. Seeds are part of a set, so that the same commands give
the same episodes.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from robopost.collect import CollectResult, make_actor, open_actor, wave
from robopost.compose import compose
from robopost.config import CollectConfig
from robopost.config_files import file_options, find_file, search_dirs
from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.formats.replay import Replay
from robopost.data.store import EpisodeStore, is_store
from robopost.errors import ConfigError, DataError, unknown

KINDS = {"random": 1, "script": 1, "actor": 2, "run": 3, "replay": 3}  # words of `from`
FLUSH_STEPS = 20_000


@dataclass(frozen=True)
class Source:
    """Where a share of a set comes from.

    Attributes:
        origin: what `from` says.
        steps: transitions wanted; recording stops at the end of the episode that reaches them. 0 = all of a
            replay buffer.
        seed: episode i is reset with `seed + i`.
        noise: std of Gaussian noise on the actions, as a share of half the action range.
        deterministic: a policy's mode; False samples.
        quality: of the scripted expert.
    """

    origin: str
    steps: int = 0
    seed: int = 0
    noise: float = 0.0
    deterministic: bool = True
    quality: float = 1.0

    def __post_init__(self) -> None:
        kind, *rest = self.origin.split("/")
        if kind not in KINDS:
            raise unknown("source", kind, KINDS)
        if len(rest) + 1 != KINDS[kind] or (KINDS[kind] == 3 and not rest[-1].isdigit()):
            form = {1: "", 2: "/<name>", 3: "/<run>/<step>"}[KINDS[kind]]
            raise ConfigError(f"from: {self.origin} must read {kind}{form}")
        if self.steps < 0 or (self.steps == 0 and kind != "replay"):
            raise ConfigError(f"from: {self.origin}: steps={self.steps} must be at least 1")

    @property
    def kind(self) -> str:
        """First word of `from`."""
        return self.origin.split("/")[0]


@dataclass(frozen=True)
class SuiteSet:
    """One set of a suite.

    Attributes:
        suite, name: `mujoco_v5`, `hopper-medium`.
        version: raised whenever the set changes; scores of different versions don't compare.
        env: name or Gymnasium id.
        sources: in the order in which they are recorded.
    """

    suite: str
    name: str
    version: int
    env: str
    sources: tuple[Source, ...]

    @property
    def steps(self) -> int:
        """Transitions of the whole set, roughly: episodes are whole."""
        return sum(source.steps or int(source.origin.split("/")[-1]) for source in self.sources)


def set_names(pattern: str, config_dirs: Sequence[str | Path] = ()) -> list[str]:
    """`suite/set` names that match: a suite, a set, or a glob such as `mujoco_v5/hopper-*`.

    Args:
        pattern: what to match.
        config_dirs: config trees with suites of one's own, searched before the shipped one.

    Raises:
        ConfigError: nothing matches.
    """
    known = [name for name in file_options("suite", search_dirs(config_dirs)) if "/" in name]
    found = [name for name in known if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")]
    if not found:
        raise unknown("suite", pattern, [*known, *{name.split("/")[0] for name in known}])
    return found


def load_set(name: str, config_dirs: Sequence[str | Path] = ()) -> SuiteSet:
    """The definition of `suite/set`; `config_dirs` as in `set_names`.

    Raises:
        ConfigError: no such set, or a key or value that a set doesn't have.
    """
    path = find_file("suite", name, search_dirs(config_dirs))
    if path is None:
        raise unknown("suite", name, set_names("*", config_dirs))
    body = _read(path)
    suite, own = name.rsplit("/", 1)
    sources = [_source(path, item) for item in body.get("sources", [])]
    for other in body.get("include", []):
        if other == own:
            raise ConfigError(f"{path.name} includes itself")
        included = load_set(f"{suite}/{other}", config_dirs)
        if included.env != body["env"]:
            raise ConfigError(f"{path.name}: includes {other}, which is recorded in {included.env}")
        sources += included.sources
    if not sources:
        raise ConfigError(f"{path.name} has no sources")
    return SuiteSet(suite, own, int(body["version"]), str(body["env"]), tuple(sources))


def _read(path: Path) -> dict[str, Any]:
    """The keys of a set's file, checked."""
    try:
        body = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path.name}{line}: not valid YAML. Fix: correct it there") from error
    kinds = {"version": int, "env": str, "sources": list, "include": list}
    for key, value in body.items() if isinstance(body, dict) else ():
        if key not in kinds:
            raise ConfigError(f"{path.name}: {unknown('key', str(key), kinds)}")
        if not isinstance(value, kinds[key]):
            raise ConfigError(f"{path.name}: {key}: {value} must be of type {kinds[key].__name__}")
    for key in ("version", "env"):
        if not isinstance(body, dict) or key not in body:
            raise ConfigError(f"{path.name} has no {key}. Fix: add it, see docs/suite.md")
    return body


def _source(path: Path, item: Any) -> Source:
    if not isinstance(item, dict):
        raise ConfigError(f"{path.name}: source {item!r} must read {{from: <origin>, steps: <count>}}")
    keys = {"from", *(name for name in Source.__dataclass_fields__ if name != "origin")}
    for key in item:
        if key not in keys:
            raise ConfigError(f"{path.name}: {unknown('key of a source', key, keys)}")
    kinds = {"from": str, "steps": int, "seed": int, "noise": (int, float), "quality": (int, float)}
    for key, kind in (kinds | {"deterministic": bool}).items():
        if key in item and (
            not isinstance(item[key], kind) or (isinstance(item[key], bool) != (kind is bool))
        ):
            raise ConfigError(f"{path.name}: {key}: {item[key]!r} of a source is of the wrong type")
    try:
        return Source(origin=item.get("from", ""), **{key: item[key] for key in item if key != "from"})
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def collect_set(
    wanted: SuiteSet,
    folder: Path,
    *,
    scale: float = 1.0,
    num_envs: int = 16,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> CollectResult:
    """Record `wanted` into `folder`/<set>.zarr; an unfinished store is continued.

    Every episode carries the number of its source under `metadata["source"]`; the definition lies in the
    store's metadata under `suite`.

    Args:
        wanted: the set.
        folder: of the suite's stores; its sub-folder `runs` holds the runs that sources name.
        scale: share of each source's transitions.
        num_envs: parallel environments.
        device: where policies act.
        progress: called with the number of transitions in the store.

    Raises:
        ConfigError: the store holds another version or scale of the set.
        DataError: the file, run or checkpoint of a source is absent.
    """
    path = folder / f"{wanted.name}.zarr"
    facts = {
        "suite": wanted.suite,
        "set": wanted.name,
        "version": wanted.version,
        "env": wanted.env,
        "scale": scale,
        "sources": [asdict(source) for source in wanted.sources],
    }
    result = CollectResult(path)
    store = _continue(path, facts)
    report = progress or (lambda done: None)
    try:
        for index, source in enumerate(wanted.sources):
            done = _recorded(store, index)
            episodes = _episodes(wanted, source, folder, scale, num_envs, device, done)
            spec = next(episodes)
            assert isinstance(spec, Spec)
            if store is None:
                about = f"suite {wanted.suite}, set {wanted.name}, version {wanted.version}"
                store = EpisodeStore.create(path, spec=spec, fps=0.0, source=about, metadata={"suite": facts})
            waiting = 0
            for episode in episodes:
                assert isinstance(episode, Episode)
                episode.metadata["source"] = index
                store.append(episode)
                result.recorded += 1
                result.returns.append(float(episode.reward.sum()))
                waiting += len(episode)
                if waiting >= FLUSH_STEPS:
                    store.flush()
                    waiting = 0
                    report(store.num_steps)
            store.flush()
            report(store.num_steps)
    finally:
        if store is not None:
            store.close()
    with EpisodeStore.open(path) as whole:
        result.episodes, result.steps = len(whole), whole.num_steps
    return result


def _continue(path: Path, facts: dict[str, Any]) -> EpisodeStore | None:
    if not path.exists():
        return None
    if not is_store(path):
        raise DataError(f"{path} exists and is no robopost store. Fix: another out=")
    store = EpisodeStore.open(path, "a")
    if store.metadata.get("suite") != facts:
        store.close()
        raise ConfigError(
            f"{path} holds another version, scale or definition of this set. Fix: remove it, or another out="
        )
    return store


def _recorded(store: EpisodeStore | None, index: int) -> tuple[int, int]:
    """(episodes, steps) of source `index` that are in the store."""
    if store is None:
        return 0, 0
    lengths = [info["length"] for info in store.episode_info if info["metadata"].get("source") == index]
    return len(lengths), sum(lengths)


def _episodes(
    wanted: SuiteSet,
    source: Source,
    folder: Path,
    scale: float,
    num_envs: int,
    device: str,
    done: tuple[int, int],
) -> Iterator[Spec | Episode]:
    """The spec of a source, then those of its episodes that are not recorded yet."""
    count, steps = done
    if source.kind == "replay":
        run, step = _run(source, folder)
        read = Replay.read(run, steps=max(1, int(step * scale)))
        yield read.spec
        for index, episode in enumerate(read.episodes):
            if index >= count:
                yield episode
        return
    target = max(1, int(source.steps * scale))
    config = _config(wanted, source, folder, num_envs, device)
    policy, vec = open_actor(config, None, num_envs)
    try:
        yield vec.spec
        if steps >= target:
            return
        actor = make_actor(policy, config, vec)
        while steps < target:
            for episode in wave(vec, actor, source.seed + count):
                episode.metadata["seed"] = source.seed + count
                count += 1
                steps += len(episode)
                yield episode
                if steps >= target:
                    break
    finally:
        vec.close()


def _config(wanted: SuiteSet, source: Source, folder: Path, num_envs: int, device: str) -> CollectConfig:
    words = {"random": "random", "script": "script"}
    if source.kind == "actor":
        path = actor_folder() / f"{source.origin.split('/')[1]}.npz"
        if not path.is_file():
            raise DataError(
                f"{wanted.suite}/{wanted.name}: no actor at {path}. Fix: set ROBOPOST_TEST_DATA to the folder "
                "that holds policies_mujoco/"
            )
        words["actor"] = str(path)
    elif source.kind == "run":
        run, step = _run(source, folder)
        words["run"] = str(run / "checkpoints" / f"step_{step:09d}")
    base = compose([f"env={wanted.env}", "out=-"], "collect")
    return replace(
        base,
        policy=words[source.kind],
        quality=source.quality,
        noise=source.noise,
        deterministic=source.deterministic,
        num_envs=num_envs,
        device=device,
    )


def _run(source: Source, folder: Path) -> tuple[Path, int]:
    """(run folder, step) of a run or replay source, checked to be there."""
    _, name, step = source.origin.split("/")
    run = folder / "runs" / name
    if not (run / "checkpoints" / f"step_{int(step):09d}" / "policy.json").is_file():
        raise DataError(
            f"{run} has no checkpoint of step {step}. Fix: robopost train recipe=suite/{name} out={run}"
        )
    return run, int(step)


def actor_folder() -> Path:
    """Folder of the published actors."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("ROBOPOST_TEST_DATA", default)) / "policies_mujoco"
