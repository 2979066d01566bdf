# SPDX-License-Identifier: Apache-2.0
"""accel.fsdp: two processes on the CPU learn what one learns, save what one saves, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from robopost.algos.vla.grpo import GRPO, GRPOConfig
from robopost.artefacts.checkpoint import latest, load_policy, load_tensors
from robopost.compose import compose
from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError, RobopostError
from robopost.loops import train
from robopost.loops.ranks import ALONE, TORCHRUN, Joined, check, check_batch
from robopost.policies.tokens import TokenMLP, TokenMLPConfig

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

WORKER = Path(__file__).with_name("fsdp_worker.py")
LIMIT = 150  # seconds, on a machine that does other things too
SPEC = Spec(
    {"image": ((16, 16, 3), "uint8"), "state": ((5,), "float32"), "instruction": ((64,), "uint8")},
    2,
    (-1.0, -1.0),
    (1.0, 1.0),
)
PENDULUM = Spec({"state": ((3,), "float32")}, 1, (-2.0,), (2.0,), 200)
COMMON = ["algo=bc", "algo.batch_size=8", "device=cpu", "track.console=false", "track.tensorboard=false"]
COMMON += ["loop.log_every=1", "loop.checkpoint_every=3", "loop.steps=6"]
VLA = [*COMMON, "algo.warmup=2", "policy=token_vla", "env=null", "policy.horizon=4", "policy.image_shift=0"]
VLA += [f"policy.siglip.{word}" for word in ("width=16", "layers=1", "heads=2", "mlp=16", "patch=8")]
VLA += [f"policy.language.{word}" for word in ("width=16", "layers=2", "heads=2", "mlp=24")]
LORA = ["policy.lora_rank=2", "policy.dtype=bfloat16", "algo.ema=0", "loop.steps=3"]
THRIFTY = ["policy.gradient_checkpointing=true", "policy.freeze_vision=true", "policy.layout=openvla"]
THRIFTY += ["loop.steps=3"]
FLOW = [*COMMON, "policy=flow", "policy.horizon=4", "policy.width=16", "policy.depth=1", "env=Pendulum-v1"]
FLOW += ["loop.eval_episodes=2", "env.max_steps=20"]
SHARDED = "accel.fsdp=true"
TOKENS = [
    *COMMON[1:],
    "policy=token",
    "policy.horizon=4",
    "policy.execute=2",
    "policy.bins=16",
    "policy.hidden=[16]",
]
CACHED = [*TOKENS, "algo=vla_opd_cached", "env=null"]
PLAY = [*TOKENS, "env=Pendulum-v1", "env.num_envs=8", "env.max_steps=10", "loop.eval_episodes=2"]
PLAY += ["algo.group=2", "algo.outcome=return", "algo.epochs=2", "loop.checkpoint_every=8"]
GROUPS = [*PLAY, "algo=grpo", "policy.normalise_obs=identity"]
OPD = [*PLAY, "algo=vla_opd", "algo.reference=student_init", "algo.reward_scale=1.25", "algo.temperature=1.5"]
OPD += ["algo.check_teacher=0", "algo.routing=none"]


def record(path, spec):
    from robopost.nets.vla.prompts import to_bytes

    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, spec=spec, fps=10.0, source="toy") as made:
        for steps in (9, 5, 11):
            obs = {"state": rng.normal(size=(steps + 1, *spec.obs["state"][0])).astype(np.float32)}
            if "image" in spec.obs:
                obs["image"] = rng.integers(0, 256, (steps + 1, 16, 16, 3)).astype(np.uint8)
                words = to_bytes("touch the red cube").numpy()
                obs["instruction"] = np.repeat(words[None], steps + 1, 0)
            action = rng.uniform(-1, 1, (steps, spec.action_dim)).astype(np.float32)
            reward = np.zeros(steps, np.float32)
            made.append(Episode(obs, action, reward, terminated=False, truncated=True))
    return f"data.path={path}"


def launch(folder, jobs):
    """Two processes, started as torchrun does; returns what the first said after the second was killed, and when."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env |= {"OMP_NUM_THREADS": "1"}
    logs = [open(folder / f"log_{rank}", "w") for rank in (0, 1)]  # noqa: SIM115
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(path)],
            stderr=log,
            stdout=log,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    try:
        started[1].wait(timeout=LIMIT)
        died = time.perf_counter()
        started[0].wait(timeout=60)
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            log.close()
    said = [(folder / f"log_{rank}").read_text() for rank in (0, 1)]
    codes = [process.returncode for process in started]
    assert codes == [2, -signal.SIGKILL], said[0][-2000:] + said[1][-2000:]
    return said[0], time.perf_counter() - died


def back_at(source, target, step):
    """A copy of the run `source` as it was at `step`."""
    shutil.copytree(source, target)
    for path in target.glob("checkpoints/step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (target / "checkpoints" / "LATEST").write_text(f"step_{step:09d}")
    return target


def both_kept(run):
    """The last two checkpoints, the newest first."""
    return sorted(run.glob("checkpoints/step_*"), reverse=True)


def tensors(run, name="model.safetensors"):
    return {k: v for k, v in load_tensors(latest(run) / name).items() if not k.startswith("rng/")}


def metrics(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def assert_near(run, other, atol=2e-6):
    for name in ("model.safetensors", "policy.safetensors"):
        mine, theirs = tensors(run, name), tensors(other, name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value.dtype == theirs[key].dtype
            if key.endswith(
                "k_proj.bias"
            ):  # softmax doesn't see it: Adam makes steps of what rounding leaves
                continue
            torch.testing.assert_close(value.double(), theirs[key].double(), atol=atol, rtol=1e-4, msg=key)
    for key in ("loss/bc", "loss/opd", "policy/entropy", "grad/norm"):
        np.testing.assert_allclose(metrics(run, key), metrics(other, key), rtol=2e-5)


def assert_same(run, other):
    for name in ("model.safetensors", "policy.safetensors"):
        mine, theirs = tensors(run, name), tensors(other, name)
        assert mine.keys() == theirs.keys()
        assert [key for key, value in mine.items() if not torch.equal(value, theirs[key])] == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one process and of two, all of which share one launch."""
    folder = tmp_path_factory.mktemp("fsdp")
    scenes, swings = record(folder / "arm.zarr", SPEC), record(folder / "swings.zarr", PENDULUM)
    out = lambda name: f"out={folder / name}"  # noqa: E731
    train(compose([*VLA, scenes, out("one")]))
    train(compose([*VLA, *LORA, scenes, out("one_lora")]))
    train(compose([*TOKENS, "algo=bc", "env=null", swings, out("teacher"), "loop.steps=1", "seed=7"]))
    teacher = f"algo.teacher={folder / 'teacher'}"
    train(compose([*CACHED, swings, teacher, out("one_cached")]))
    train(compose([*VLA, *THRIFTY, scenes, out("one_thrifty")]))
    back_at(folder / "one", folder / "handed_over", 3)
    endless = [word for word in FLOW if not word.startswith("env")]
    jobs = [
        [*VLA, scenes, SHARDED, out("two")],
        [f"resume={folder / 'handed_over'}", SHARDED],
        [*VLA, *LORA, scenes, SHARDED, out("two_lora")],
        [*VLA, *THRIFTY, scenes, SHARDED, out("two_thrifty")],
        [*FLOW, swings, SHARDED, out("flow")],
        [*FLOW, swings, SHARDED, out("flow_half"), "loop.steps=3"],
        [f"resume={folder / 'flow_half'}", "loop.steps=6"],
        [*CACHED, swings, teacher, SHARDED, out("two_cached")],
        [*GROUPS, SHARDED, out("grpo"), "loop.steps=24"],
        [*GROUPS, SHARDED, out("grpo_half"), "loop.steps=16"],
        [f"resume={folder / 'grpo_half'}", "loop.steps=24"],
        [*OPD, teacher, SHARDED, out("opd"), "loop.steps=16"],
        [*endless, "env=null", swings, SHARDED, out("killed"), "loop.steps=100000"],
    ]
    said, seconds = launch(folder, jobs)
    (folder / "last_words").write_text(said)
    assert seconds < 30
    return folder


def test_two_processes_learn_what_one_learns(runs):
    """2 x B/2 = 1 x B: losses, norms, weights, moments and averages; chunks end before their masks in both halves."""
    assert len(metrics(runs / "two", "loss/bc")) == 6
    assert_near(runs / "one", runs / "two")
    first = load_policy(runs / "one").state_dict()
    moved = (first["language.model.norm.weight"] - 1).abs().max()
    assert moved > 1e-4  # far more than the tolerance


def test_activations_computed_again_and_frozen_towers(runs):
    assert_near(runs / "one_thrifty", runs / "two_thrifty")


def test_float32_adapters_on_bfloat16_weights(runs):
    """Equal to the rounding of bfloat16 products, which depends on the rows of a batch."""
    mine, theirs = tensors(runs / "one_lora"), tensors(runs / "two_lora")
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        distance = (value.double() - theirs[key].double()).norm()
        assert distance <= (0 if value.dtype == torch.bfloat16 else 5e-3) * value.double().norm(), key
    assert any(value.dtype == torch.bfloat16 for value in mine.values())
    np.testing.assert_allclose(*(metrics(runs / f"{n}_lora", "loss/bc") for n in ("one", "two")), rtol=1e-4)


def test_every_process_holds_its_part_only(runs):
    held = [json.loads((runs / "two" / f"held_{index}.json").read_text()) for index in (0, 1)]
    total = held[0]["all"]
    for name in ("weights", "gradients", "moments", "average"):
        assert held[0][name] + held[1][name] == total
        assert max(part[name] for part in held) < 0.6 * total


def test_checkpoints_go_from_one_process_to_two_and_back(runs):
    assert_near(runs / "one", runs / "handed_over")
    back = back_at(runs / "two", runs / "back", 3)
    from robopost.cli.train import resolve

    train(resolve([f"resume={back}", "accel.fsdp=false"]))
    assert_near(runs / "one", back)


def test_resume_is_exact_with_noise(runs):
    assert_same(runs / "flow", runs / "flow_half")
    assert metrics(runs / "flow", "loss/bc") == metrics(runs / "flow_half", "loss/bc")


def test_the_first_process_evaluates_and_logs(runs):
    assert metrics(runs / "flow", "eval/return")
    steps = [json.loads(line)["step"] for line in (runs / "flow" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 6]
    policy = load_policy(runs / "flow")
    chunk = policy.act({"state": torch.zeros(2, 3)}, generator=torch.Generator().manual_seed(0)).chunk
    assert chunk.shape == (2, 4, 1)
    assert json.loads((runs / "flow" / "provenance.json").read_text())["processes"] == 2


def test_cached_distillation_learns_what_one_process_learns(runs):
    assert_near(runs / "one_cached", runs / "two_cached")


def test_rollouts_of_two_processes_resume_exactly(runs):
    assert_same(runs / "grpo", runs / "grpo_half")
    assert metrics(runs / "grpo", "grad/norm") == metrics(runs / "grpo_half", "grad/norm")
    logged = [json.loads(line)["step"] for line in (runs / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(logged)) == [8, 16, 24]  # 8 episodes of all copies together
    assert metrics(runs / "grpo", "data/steps") == [80.0, 80.0, 80.0]


@pytest.mark.parametrize("name", ["grpo", "opd"])
def test_rollouts_teach(runs, name):
    last, before = (load_tensors(path / "policy.safetensors") for path in both_kept(runs / name))
    assert any(not torch.equal(value, before[key]) for key, value in last.items())
    assert all(np.isfinite(metrics(runs / name, "grad/norm")))


def test_temperature_set_after_the_cut_is_saved(runs):
    assert load_policy(runs / "opd").temperature == 1.5


def test_a_run_of_two_goes_on_in_one_process_with_rollouts(runs):
    from robopost.cli.train import resolve

    alone = back_at(runs / "grpo", runs / "grpo_alone", 16)
    train(resolve([f"resume={alone}", "accel.fsdp=false", "loop.steps=24"]))
    assert latest(alone).name == "step_000000024"
    assert len(metrics(alone, "grad/norm")) == 3


def test_a_lost_process_ends_the_other_with_one_line(runs):
    said = (runs / "last_words").read_text()
    lines = [line for line in said.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "process 0 of 2 has lost another one" in lines[0]
    assert "Traceback" not in said
    assert latest(runs / "killed").name == "step_000000006"


# -- what is refused --------------------------------------------------------------------------------------------


def test_without_torchrun_the_command_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"torchrun --nproc-per-node .* accel.fsdp=true"):
        train(compose([*FLOW, "data.path=x", SHARDED, f"out={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_torchrun_without_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes, and accel.fsdp=false"):
        train(compose([*FLOW, "data.path=x", f"out={tmp_path / 'run'}"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["accel.mode=compile"], r"accel.mode=compile doesn't go with accel.fsdp=true"),
        (["accel.mode=cudagraph"], r"accel.mode=cudagraph doesn't go with"),
        (["seeds=2"], r"seeds=2 doesn't go with"),
        (
            ["algo=td3_bc", "policy=deterministic"],
            r"algo=td3_bc can't train with accel.fsdp=true, which .*bc",
        ),
    ],
)
def test_what_does_not_go_together(words, message, monkeypatch):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "1")
    base = [word for word in FLOW if not word.startswith(("algo", "policy"))]
    with pytest.raises(ConfigError, match=message):
        check(compose([*base, SHARDED, "algo=bc", "policy=flow", *words]))


def test_batches_are_split_evenly():
    ranks = [Joined.__new__(Joined) for _ in range(2)]
    for index, item in enumerate(ranks):
        item.index, item.size = index, 2
    rows = torch.arange(8)
    assert torch.equal(torch.cat([item.mine(rows) for item in ranks]), rows)
    assert ALONE.mine(rows) is rows
    with pytest.raises(ConfigError, match=r"batch_size=9 .* multiple of 2. Fix: algo.batch_size=8"):
        check_batch(ranks[0], 9)
    noise = [torch.Generator() for _ in range(2)]
    draws = []
    for update in (1, 2, 1):
        for item, generator in zip(ranks, noise, strict=True):
            item.reseed({"algo": generator, "policy": torch.Generator()}, 0, update)
            draws.append(float(torch.rand((), generator=generator)))
    assert draws[:2] == draws[4:]
    assert len(set(draws)) == 4


@pytest.mark.parametrize("total", [0, 2, 7])
def test_a_process_with_fewer_rows_takes_as_many_minibatches(total):
    policy = TokenMLP(TokenMLPConfig(horizon=2, bins=8, hidden=[8]), PENDULUM)
    draw = torch.Generator().manual_seed(0)
    algo = GRPO(GRPOConfig(batch_size=4), policy, PENDULUM, device=torch.device("cpu"), generator=draw)
    algo._flat.most = lambda parts: max(parts, 3)
    rows = {"obs/state": torch.randn(total, 3), "valid": torch.ones(total, 2, 1, dtype=torch.bool)}
    rows |= {"tokens": torch.zeros(total, 2, 1, dtype=torch.long), "old": torch.zeros(total, 2, 1)}
    rows |= {"advantage": torch.ones(total), "mixed": torch.ones(total, dtype=torch.bool)}
    parts = algo._minibatches(rows, total)
    assert len(parts) == 3
    assert sum(int(part["valid"][:, 0, 0].sum()) for part in parts) == total
    for part in parts:
        metrics = algo.minibatch_step(part)
        assert torch.isfinite(metrics["grad/norm"])
        assert bool(part["valid"].any()) == bool(metrics["grad/norm"] > 0)


def test_only_losses_of_connections_are_explained():
    joined = Joined.__new__(Joined)
    joined.index, joined.size, joined._dist = 0, 2, torch.distributed
    lost = joined.explained(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert isinstance(lost, RobopostError)
    bug = RuntimeError("shapes differ")
    assert joined.explained(bug) is bug
