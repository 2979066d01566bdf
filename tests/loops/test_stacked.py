# SPDX-License-Identifier: Apache-2.0
"""`seeds=N` trained at once is what N separate runs write: weights, metrics, random streams, folders."""

import importlib.util
import logging
import shutil
from pathlib import Path

import pytest
import torch

from robopost.artefacts.checkpoint import latest, load_json, load_policy, load_tensors
from robopost.cli import main
from robopost.compose import compose
from robopost.errors import ConfigError, RobopostError
from robopost.loops import train

spec = importlib.util.spec_from_file_location("stacked_lab", Path(__file__).parent / "stacked_lab.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
contract = lab.contract
store = lab.store
N = lab.N
OFFLINE = lab.OFFLINE
STACK = lab.STACK
words = lab.words
separate = lab.separate
stacked = lab.stacked
assert_close = lab.assert_close
files = lab.files
assert_same_runs = lab.assert_same_runs


@pytest.mark.parametrize("algo", OFFLINE)
def test_stacked_seeds_equal_separate_runs(algo, store, tmp_path):
    base = words(algo, store)
    alone, together = separate(base, tmp_path / "alone"), stacked(base, tmp_path / "together")
    assert_same_runs(alone, together)
    # The folder of a seed is that of a run of its own.
    for seed in range(N):
        a, b = alone / f"seed_{seed}", together / f"seed_{seed}"
        assert files(a) == files(b)
        one, two = load_json(a / "config.json"), load_json(b / "config.json")
        assert one.pop("out") != two.pop("out")
        assert (one["accel"].pop("stack_seeds"), two["accel"].pop("stack_seeds")) == ("auto", "on")
        assert one == two
        assert load_json(b / "provenance.json")["seed"] == seed
        load_policy(b)
    weights = [load_tensors(latest(together / f"seed_{s}") / "policy.safetensors") for s in range(N)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_other_policies_and_settings(store, tmp_path):
    cases = {
        "clone": (
            "bc",
            "policy=deterministic",
            "policy.horizon=2",
            "policy.hidden=[16]",
            "algo.grad_clip=0.05",
        ),
        "decay": (
            "bc",
            "policy=gaussian",
            "policy.hidden=[16,16]",
            "policy.layernorm=true",
            "algo.decay_steps=20",
        ),
        "subset": ("td3_bc", "algo.num_critics=4", "algo.target_subset=2", "algo.critic_layernorm=true"),
        "corl": ("iql", "algo.variant=corl", "algo.n_step=3", "policy.state_std=false", "policy.history=2"),
    }
    for name, (algo, *more) in cases.items():
        base = [*words(algo, store)[:1], *words(algo, store, "algo.batch_size=16")[1:], *more]
        if algo == "bc":
            base = [
                word for word in base if not word.startswith(("policy.width", "policy.depth", "policy=flow"))
            ]
            base = [word for word in base if word != "policy.horizon=4"]
        one, two = separate(base, tmp_path / name, range(2)), stacked(base, tmp_path / f"{name}-2", "seeds=2")
        assert_same_runs(one, two, range(2))


def test_checkpoints_are_interchangeable(store, tmp_path):
    base = words("td3_bc", store)
    straight = separate(base, tmp_path / "straight")
    half = [*base, "loop.steps=16"]
    # Stacked first, then each seed by itself, and the other way round.
    folder = stacked(half, tmp_path / "stacked")
    for seed in range(N):
        train(compose([*base, f"seed={seed}", f"resume={folder}/seed_{seed}"]))
    assert_same_runs(straight, folder)
    folder = separate(half, tmp_path / "separate")
    train(compose([*base, *STACK, f"resume={folder}"]))
    assert_same_runs(straight, folder)


def test_stacked_resume_is_exact(store, tmp_path):
    base = words("iql", store)
    straight = stacked(base, tmp_path / "straight")
    resumed = stacked([*base, "loop.steps=16"], tmp_path / "resumed")
    train(compose([*base, *STACK, f"resume={resumed}"]))
    for seed in range(N):
        contract.assert_same_run(straight / f"seed_{seed}", resumed / f"seed_{seed}")


def test_command_line_resumes_all_seeds(store, tmp_path):
    base = words("td3_bc", store)
    out = tmp_path / "run"
    assert main(["train", *base, *STACK, "loop.steps=8", f"out={out}"]) == 0
    shutil.rmtree(out / "seed_2")  # killed before its first checkpoint was written
    assert main(["train", f"resume={out}", "loop.steps=24"]) == 0
    alone = separate(base, tmp_path / "alone")
    for seed in range(N):
        a, b = (load_tensors(latest(f / f"seed_{seed}") / "model.safetensors") for f in (alone, out))
        assert_close(a, b)


def test_seeds_at_different_steps_meet(store, tmp_path):
    """A run over seeds that was killed: one seed is done, one half-way, one fresh."""
    base = words("a2pr", store, "seeds=4")
    straight = separate(words("a2pr", store), tmp_path / "straight", range(4))
    folder = tmp_path / "run"
    for seed, steps in {0: 24, 1: 16, 2: 8}.items():
        train(
            compose(
                [*words("a2pr", store), f"seed={seed}", f"loop.steps={steps}", f"out={folder}/seed_{seed}"]
            )
        )
    train(compose([*base, "accel.stack_seeds=on", f"resume={folder}"]))
    assert_same_runs(straight, folder, range(4))


def test_every_seed_is_evaluated_on_its_own(store, tmp_path):
    base = words("td3_bc", store, "env=Pendulum-v1", "loop.eval_every=12", "loop.eval_episodes=2")
    alone, together = separate(base, tmp_path / "alone"), stacked(base, tmp_path / "together")
    assert_same_runs(alone, together)
    returns = []
    for seed in range(N):
        for step in (12, 24):
            a, b = (
                load_json(f / f"seed_{seed}" / "eval" / f"step_{step:09d}.json") for f in (alone, together)
            )
            assert a.keys() == b.keys()
            assert (a["seed"], a["env"]) == (b["seed"], b["env"])
            assert a["raw"]["returns"] == pytest.approx(b["raw"]["returns"], rel=1e-4)
        returns.append(b["raw"]["returns"][0])
    assert len(set(returns)) == N


def test_online_phase_follows_seed_by_seed(store, tmp_path):
    base = words("td3_bc", store, "env=Pendulum-v1", "env.num_envs=1", "loop.eval_episodes=1")
    base += ["loop.online_steps=12", "loop.buffer_size=100"]
    assert_same_runs(separate(base, tmp_path / "alone"), stacked(base, tmp_path / "together"))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["accel.mode=compile"], "accel.mode=compile compiles one seed's update"),
        (["track.also=[trackio]"], r"track.also=\['trackio'\] follows one run at a time"),
        (["algo=sac", "env=Pendulum-v1", "data.path="], "algo=sac learns in an environment"),
    ],
)
def test_what_cannot_be_stacked_is_named(store, tmp_path, more, reason):
    base = words("td3_bc", store, *STACK, f"out={tmp_path / 'run'}", *more)
    base = [word for word in base if "algo=sac" not in more or not word.startswith(("policy=", "algo=td3"))]
    with pytest.raises(ConfigError, match=f"accel.stack_seeds=on: {reason}. Fix: accel.stack_seeds=off"):
        train(compose(base))
    assert not (tmp_path / "run").exists()


def test_auto_stacks_where_it_is_faster_and_says_why_not(store, tmp_path, caplog):
    base = words("td3_bc", store, "loop.steps=8", "algo.hidden=[16]", "device=cpu")

    def said(*more):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="robopost"):
            train(compose([*base, *more]))
        return caplog.text

    text = said("seeds=3", f"out={tmp_path / 'few'}")
    assert "seeds one after another: 3 of " in text
    assert "(from 4 seeds, up to 50,000 parameters); accel.stack_seeds=on stacks them" in text
    assert "seeds one after another" in said("seeds=4", "algo.hidden=[256,256]", f"out={tmp_path / 'large'}")
    assert "seed_3: 4 seeds at once from step 0" in said("seeds=4", f"out={tmp_path / 'small'}")
    assert "seeds at once" not in said("seeds=4", "accel.stack_seeds=off", f"out={tmp_path / 'off'}")
    assert "seed_0, seed_1: 2 seeds at once" in said(
        "seeds=2", "accel.stack_seeds=on", f"out={tmp_path / 'on'}"
    )
    with pytest.raises(ConfigError, match=r"accel.stack_seeds.*Did you mean 'auto'"):
        train(compose([*base, "seeds=2", f"out={tmp_path / 'typo'}", "accel.stack_seeds=atuo"]))


def test_divergence_names_the_seed(store, tmp_path):
    base = words("td3_bc", store, "algo.critic_lr=1e38", "algo.actor_lr=1e38")
    with pytest.raises(RobopostError, match=r"^seed_0: loss/\w+ is (nan|inf)"):
        stacked(base, tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("algo", OFFLINE)
def test_captured_stack_equals_separate_eager_runs(algo, store, tmp_path):
    base = words(algo, store, "device=cuda")
    alone = separate([*base, "accel.mode=eager"], tmp_path / "alone")
    together = stacked([*base, "accel.mode=cudagraph"], tmp_path / "together")
    for seed in range(N):
        a, b = (load_tensors(latest(f / f"seed_{seed}") / "model.safetensors") for f in (alone, together))
        assert a.keys() == b.keys()
        for key in a.keys() - {"rng/torch"}:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
