# SPDX-License-Identifier: Apache-2.0
"""The contract every algorithm signs: train 2N == train N, resume, N, bitwise; and kill -9 loses nothing whole."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from robopost.artefacts.checkpoint import (
    latest,
    load_json,
    load_policy,
    load_tensors,
    policy_files,
    save_folder,
)
from robopost.compose import compose
from robopost.data.batch import Spec
from robopost.data.store import Episode, EpisodeStore
from robopost.errors import CheckpointError, ConfigError
from robopost.loops import train
from robopost.policies.base import build_policy
from robopost.policies.flow import FlowConfig
from robopost.policies.tokens import TokenMLPConfig
from robopost.registry import ALGOS
from robopost.vector import make_vec

STATIONARY = [
    "policy=gaussian",
    "policy.hidden=[16]",
    "policy.squash=false",
    "algo.hidden=[16]",
    "algo.gamma=0.99",
    "algo.rollout_steps=10",
]
CHUNKS = [
    *("policy.horizon=4", "policy.execute=2", "policy.steps=3", "policy.width=16", "policy.depth=1"),
    *("algo.rollout_steps=5", "algo.batch_size=8", "algo.epochs=2", "algo.hidden=[16]"),
]
SPEC = Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,), 20)
TOKENS = ["policy=token", "policy.horizon=4", "policy.execute=2", "policy.bins=16", "policy.hidden=[16]"]
EPISODES = [
    *TOKENS,
    "env.max_steps=10",
    "algo.group=2",
    "algo.outcome=return",
    "algo.epochs=2",
    "algo.batch_size=4",
]
POLICY = {
    "bc": ["policy=flow", "policy.horizon=4", "policy.width=16", "policy.depth=1"],
    "td3_bc": ["policy=deterministic", "policy.hidden=[16]"],
    "a2pr": ["policy=deterministic", "policy.hidden=[16]", "algo.hidden=[16]", "algo.vae_hidden=[16]"],
    "prdc": ["policy=deterministic", "policy.hidden=[16]", "algo.hidden=[16]"],
    "rebrac": ["policy=deterministic", "policy.hidden=[16]", "algo.hidden=[16]"],
    "iql": ["policy=gaussian", "policy.hidden=[16]"],
    "famo2o_iql": [
        "policy=family",
        "policy.hidden=[16]",
        "policy.balance_hidden=[16]",
        "algo.balance_every=2",
    ],
    "cql": ["policy=gaussian", "policy.hidden=[16]", "algo.hidden=[16]", "algo.lagrange_gap=0.8"],
    "cal_ql": ["policy=gaussian", "policy.hidden=[16]", "algo.hidden=[16]", "algo.max_backup=true"],
    "famo2o_cql": [
        "policy=family_squashed",
        "policy.hidden=[16]",
        "policy.balance_hidden=[16]",
        "algo.hidden=[16]",
    ],
    "famo2o_cal_ql": [
        "policy=family_squashed",
        "policy.hidden=[16]",
        "algo.hidden=[16]",
        "algo.balance_every=2",
    ],
    "td3": ["policy=deterministic", "policy.hidden=[16]", "algo.hidden=[16]", "algo.warmup_steps=20"],
    "sac": ["policy=gaussian", "policy.hidden=[16]", "algo.hidden=[16]", "algo.warmup_steps=20"],
    "resfit": [
        "policy=residual",
        "policy.hidden=[16]",
        "algo.hidden=[16]",
        "algo.num_critics=3",
        "algo.warmup_steps=20",
        "algo.critic_warmup=9",
        "algo.updates_per_step=1",
        "algo.demo_fraction=0",
    ],
    "hnpg": [*STATIONARY, "algo.hybrid=false"],  # with recorded data: test_onpolicy_data.py
    "trpo": [*STATIONARY, "algo.critic_batch_size=8", "algo.critic_sweeps=2"],
    "npg": STATIONARY,
    "ppo": ["policy=gaussian", "policy.hidden=[16]", "algo.rollout_steps=10", "algo.batch_size=20"],
    "reinflow": [*CHUNKS, "algo.noise_hidden=[16]", "algo.finetune_steps=2", "algo.noise_decay_updates=4"],
    "dppo": [*CHUNKS, "algo.finetune_steps=2", "algo.min_log_prob_std=0.2"],
    "policyflow": [*CHUNKS, "policy.solver=midpoint", "policy.prediction=velocity", "algo.desired_kl=0.001"],
    "fpo": [*CHUNKS, "algo.pairs=3"],
    "grpo": EPISODES,
    "token_ppo": [*TOKENS, "algo.rollout_steps=5", "algo.batch_size=8", "algo.epochs=2", "algo.hidden=[16]"],
    "vla_opd": [
        *EPISODES,
        "algo.lambda_outcome=1",
        "algo.reference=student_init",
        "algo.reward_scale=1.25",
        "algo.check_teacher=0",
    ],
    "vla_opd_cached": [*TOKENS, "algo.reference=student_init", "algo.reward_scale=1.25"],
    "props": [
        "policy=gaussian",
        "policy.hidden=[16]",
        "algo.rollout_steps=10",
        "algo.batch_size=20",
        "algo.behaviour_steps=5",
        "algo.behaviour_minibatches=2",
    ],
}
ENVS = {
    "saves its state": ["env=InvertedPendulum-v5", "env.num_envs=2"],
    "is cut at checkpoints": ["env=Pendulum-v1", "env.num_envs=2"],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Episodes of a noisy integrator with both kinds of endings."""
    path = tmp_path_factory.mktemp("data") / "toy.zarr"
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, spec=SPEC, fps=10.0, source="toy") as made:
        for index in range(6):
            action = rng.uniform(-1, 1, (20, 1)).astype(np.float32)
            state = np.concatenate([np.zeros((1, 3)), np.cumsum(np.repeat(action, 3, 1), 0)]).astype(
                np.float32
            )
            reward = -np.abs(state[1:, 0])
            ends = index % 2 == 0
            made.append(Episode({"state": state}, action, reward, terminated=ends, truncated=not ends))
    return path


def words(algo, store, env=None):
    out = [f"algo={algo}", *POLICY[algo], "loop.steps=60", "loop.log_every=20", "loop.checkpoint_every=30"]
    regime = ALGOS.get(algo).target.regime
    out += ["loop.eval_episodes=2", "algo.batch_size=8"] if regime != "onpolicy" else ["loop.eval_episodes=2"]
    if algo.startswith("vla_opd"):
        out.append(
            f"algo.teacher={teacher(store.parent / f'teacher {env}'.replace(' ', '_'), ENVS.get(env))}"
        )
    if regime == "offline":
        return [*out, f"data.path={store}", "env=null"]
    if "policy=residual" in out:
        out.append(f"policy.base={base_policy(store.parent / env.replace(' ', '_'), ENVS[env])}")
    return [*out, *ENVS[env], "loop.steps=120", "loop.checkpoint_every=60", "loop.log_every=40"]


def teacher(folder, env):
    """An untrained token policy for `env`, or for the store's task."""
    if not folder.exists():
        torch.manual_seed(1)
        spec = SPEC
        if env is not None:
            vec = make_vec(compose(["algo=td3", *env]).env, 1)
            spec = vec.spec
            vec.close()
        config = TokenMLPConfig(horizon=4, bins=16, hidden=[16])
        save_folder(folder, policy_files(build_policy(config, spec)))
    return folder


def base_policy(folder, env):
    """An untrained flow policy for `env` with chunks of 4, to be corrected."""
    if not folder.exists():
        torch.manual_seed(0)
        vec = make_vec(compose(["algo=td3", *env]).env, 1)
        config = FlowConfig(horizon=4, steps=2, width=16, depth=1, normalise_action="bounds")
        save_folder(folder, policy_files(build_policy(config, vec.spec)))
        vec.close()
    return folder


def cases():
    for entry in ALGOS:
        if entry.target.regime == "offline":
            yield pytest.param(entry.name, None, id=entry.name)
        else:
            for env in ENVS:
                yield pytest.param(entry.name, env, id=f"{entry.name}, environment {env}")


def run(config_words, out, steps=None):
    extra = [f"out={out}"] + ([f"loop.steps={steps}"] if steps else [])
    return train(compose([*config_words, *extra]))


def assert_same_run(first, second):
    a, b = latest(first), latest(second)
    assert a.name == b.name
    for name in ("model.safetensors", "policy.safetensors"):
        left, right = load_tensors(a / name), load_tensors(b / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key} differs"
    assert load_json(a / "state.json") == load_json(b / "state.json")


@pytest.mark.parametrize(("algo", "env"), list(cases()))
def test_train_2n_equals_train_n_resume_n_bitwise(algo, env, store, tmp_path):
    base = words(algo, store, env)
    full = 60 if env is None else 120
    run(base, tmp_path / "straight")
    run(base, tmp_path / "resumed", full // 2)
    config = compose([*base, f"resume={tmp_path / 'resumed'}"])
    train(config)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_every_algorithm_is_in_the_contract():
    assert {entry.name for entry in ALGOS} <= set(POLICY), "add the new algorithm to POLICY"


def test_same_seed_same_run_other_seed_other_run(store, tmp_path):
    base = words("td3_bc", store)
    run(base, tmp_path / "a")
    run(base, tmp_path / "b")
    run([*base, "seed=1"], tmp_path / "c")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = (load_tensors(latest(tmp_path / name) / "policy.safetensors") for name in "ac")
    assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.slow
def test_killed_run_resumes_from_a_whole_checkpoint(store, tmp_path):
    base = [*words("td3_bc", store), "loop.steps=400", "loop.checkpoint_every=5", "loop.keep_checkpoints=1"]
    run(base, tmp_path / "straight")
    rng = np.random.default_rng(0)
    script = "import sys; from robopost.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "killed"
    for attempt in range(4):
        where = [f"out={out}"] if not (out / "config.json").exists() else [f"resume={out}"]
        process = subprocess.Popen(
            [sys.executable, "-c", script, "train", *base, *where],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = latest(out)
        limit = time.monotonic() + 60
        while latest(out) in (None, before) and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        checkpoint = latest(out)
        assert checkpoint is not None, f"no checkpoint after attempt {attempt}"
        load_tensors(checkpoint / "model.safetensors")
        load_json(checkpoint / "state.json")
        load_policy(out)
    train(compose([*base, f"resume={out}"]))
    assert_same_run(tmp_path / "straight", out)


def test_torn_leftovers_are_ignored_and_corruption_is_named(store, tmp_path):
    base = words("td3_bc", store)
    folder = run(base, tmp_path / "run")
    torn = folder / "checkpoints" / ".step_000000090.partial-1"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert latest(folder).name == "step_000000060"
    weights = latest(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        train(compose([*base, f"resume={folder}"]))


def test_checkpoint_of_another_algorithm_or_shape_is_refused(store, tmp_path):
    folder = run(words("td3_bc", store), tmp_path / "run")
    with pytest.raises(CheckpointError, match="written by algo 'td3_bc', this run has 'iql'"):
        train(compose([*words("iql", store), f"resume={folder}"]))
    with pytest.raises(CheckpointError, match="shape"):
        train(compose([*words("td3_bc", store), "policy.hidden=[24]", f"resume={folder}"]))


def test_a_run_folder_is_not_overwritten(store, tmp_path):
    base = words("td3_bc", store)
    folder = run(base, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(base, folder)


def test_run_folder_is_described_before_the_first_step(store, tmp_path):
    folder = run(words("td3_bc", store), tmp_path / "run")
    described = json.loads((folder / "provenance.json").read_text())
    assert described["seed"] == 0
    assert {"torch", "numpy", "robopost"} <= described["packages"].keys()
    assert json.loads((folder / "config.json").read_text())["algo"]["name"] == "td3_bc"
