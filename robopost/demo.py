# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end: imperfect demonstrations -> flow policy -> fine-tuned by RL -> evaluated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robopost.artefacts.checkpoint import latest, load_policy
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import DemoConfig
from robopost.errors import ConfigError
from robopost.evaluate.rollout import EvalResult, evaluate
from robopost.evaluate.video import side_by_side, write_gif
from robopost.loops import train
from robopost.report import Comparison, write_report

EVAL_SEED = 1_000_000  # evaluation episodes start from states that neither demonstrations nor training saw
Say = Callable[[str], None]


def run_demo(config: DemoConfig, say: Say = lambda text: None) -> dict[str, Any]:
    """Run every stage that has not finished yet in `config.out`, so that a killed demo goes on where it stopped.

    Returns:
        `{"before": ..., "after": ..., "gain": ..., "seconds": {...}}`, also written to `demo.json`.
    """
    lines: list[str] = []

    def tell(text: str) -> None:
        lines.append(text)
        say(text)

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    _check_same(config, out / "demo_config.json")
    seconds = _load(out / "seconds.json")

    def stage(name: str, done: Callable[[], bool], work: Callable[[], Any]) -> None:
        if done():
            tell(f"== {name}: done before")
            return
        tell(f"== {name}")
        began = time.perf_counter()
        work()
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - began, 2)
        (out / "seconds.json").write_text(json.dumps(seconds, indent=1))

    data, base, tuned = out / "demonstrations.zarr", out / "base", out / "finetuned"
    stage(
        "collecting demonstrations",
        lambda: (out / "base" / "config.json").exists(),
        lambda: collect(
            compose(
                [
                    "env=arm_push",
                    f"episodes={config.demonstrations}",
                    f"quality={config.quality}",
                    f"seed={config.seed * 10_000}",
                    f"out={data}",
                ],
                "collect",
            )
        ),
    )
    clone = ["recipe=arm_push/flow_bc", f"data.path={data}", f"seed={config.seed}"]
    clone += [f"loop.steps={config.clone_updates}"] if config.clone_updates else []
    stage("cloning a flow policy", lambda: _finished(base, clone), lambda: _train(clone, base))
    tune = ["recipe=arm_push/residual_td3", f"policy.base={base}", f"seed={config.seed}"]
    tune += [f"loop.steps={config.finetune_steps}"] if config.finetune_steps else []
    stage(
        "fine-tuning by reinforcement learning", lambda: _finished(tuned, tune), lambda: _train(tune, tuned)
    )

    results: dict[str, EvalResult] = {}
    for name, run in (("before", base), ("after", tuned)):
        stage(
            f"evaluating {name}",
            lambda name=name: name in results,
            lambda name=name, run=run: results.__setitem__(name, _evaluate(config, run)),
        )
    summary = _summary(config, results, seconds)
    stage("writing the report", lambda: False, lambda: _report(config, out, results))
    summary["seconds"] = seconds
    summary["wall_seconds"] = round(sum(seconds.values()), 1)
    for line in _lines(config, results, summary):
        tell(line)
    summary["output"] = lines
    (out / "demo.json").write_text(json.dumps(summary, indent=1))
    return summary


def _train(words: list[str], out: Path) -> None:
    """Train into `out`, resuming a run that was killed."""
    where = [f"resume={out}"] if latest(out) is not None else [f"out={out}"]
    if latest(out) is None and out.exists():
        # Killed before its first checkpoint: nothing to keep.
        (out / "config.json").unlink(missing_ok=True)
    train(compose([*words, *where]), command="robopost demo")


def _finished(run: Path, words: list[str]) -> bool:
    checkpoint = latest(run)
    return checkpoint is not None and int(checkpoint.name.removeprefix("step_")) >= compose(words).loop.steps


def _evaluate(config: DemoConfig, run: Path) -> EvalResult:
    return evaluate(
        load_policy(run),
        compose(["recipe=arm_push/flow_bc"]).env,
        episodes=config.eval_episodes,
        seed=EVAL_SEED,
        video=run / "videos" / "demo.mp4" if config.video_episodes else None,
        video_episodes=config.video_episodes,
    )


def _summary(config: DemoConfig, results: dict[str, EvalResult], seconds: dict[str, float]) -> dict[str, Any]:
    before, after = results["before"].success(), results["after"].success()
    assert before is not None, "arm_push has a success predicate"
    assert after is not None, "arm_push has a success predicate"
    return {
        "config": asdict(config),
        "before": results["before"].to_json(),
        "after": results["after"].to_json(),
        "gain": after.value - before.value,
        "intervals_apart": after.low > before.high,
    }


def _lines(config: DemoConfig, results: dict[str, EvalResult], summary: dict[str, Any]) -> list[str]:
    """What the demo says at its end."""
    lines = []
    for name, result in results.items():
        success = result.success()
        assert success is not None, "arm_push has a success predicate"
        lines.append(f"{name:<8}success {success.text(percent=True)} of {config.eval_episodes} episodes")
    lines.append(f"gain    {100 * summary['gain']:+.0f} points in {summary['wall_seconds']:.0f} s")
    lines.append("report  report.html" + (", before_after.mp4" if config.video_episodes else ""))
    return lines


def _report(config: DemoConfig, out: Path, results: dict[str, EvalResult]) -> None:
    video = None
    if config.video_episodes:
        video = out / "before_after.mp4"
        titles = ("demonstrations cloned", "after fine-tuning")
        before, after = results["before"].clips, results["after"].clips
        side_by_side(before, after, video, titles=titles)
        pairs = (before[:2], after[:2])
        write_gif(list(zip(titles, pairs, strict=True)), out / "before_after.gif", fps=8)
    write_report(
        [out / "base", out / "finetuned"],
        out / "report.html",
        title="robopost demo: arm_push",
        comparisons=[Comparison("cloned, then fine-tuned", results["before"], results["after"], video)],
    )


def _check_same(config: DemoConfig, path: Path) -> None:
    """A folder belongs to one demo config: stages of different sizes must not be mixed."""
    wanted = {key: value for key, value in asdict(config).items() if key != "out"}
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ConfigError(
            f"{path.parent} holds a demo with other settings. Fix: out=<another folder>, or delete it"
        )
    path.write_text(json.dumps(wanted, indent=1))


def _load(path: Path) -> dict[str, float]:
    return json.loads(path.read_text()) if path.exists() else {}
