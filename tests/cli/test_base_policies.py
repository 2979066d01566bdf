# SPDX-License-Identifier: Apache-2.0
"""A policy to start from that doesn't fit what is asked of it: one line, before the first step, nothing left behind.

Add a row to `CASES`: a name, the words after `robopost` and a pattern of the line; `{place}` holds the policies of
`STORED`.
"""

import math
import re

import pytest

from robopost.artefacts.checkpoint import policy_files, save_folder
from robopost.cli import main
from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.base import build_policy
from robopost.policies.categorical import CategoricalConfig
from robopost.policies.deterministic import DeterministicConfig
from robopost.policies.flow import FlowConfig
from robopost.policies.gaussian import GaussianConfig
from robopost.policies.pretrained import check_fits

INF = math.inf
STATE = {"state": ((25,), "float32")}  # of arm_push, which has 3 actions in [-1, 1]


def task(obs=None, actions=3, low=-1.0, high=1.0, choices=0):
    return Spec(obs or STATE, actions, (low,) * actions, (high,) * actions, 70, choices)


def gaussian(**options):
    return GaussianConfig(hidden=[8], **options)


STORED = {
    "gaussian": (gaussian(), task()),
    "chunks": (gaussian(horizon=4), task()),
    "flow": (FlowConfig(horizon=4, width=16, depth=1, steps=2), task()),
    "keys": (gaussian(), task({"keypoint": ((20,), "float32")})),
    "shape": (gaussian(), task({"state": ((27,), "float32")})),
    "actions": (gaussian(), task(actions=4)),
    "pixels": (gaussian(), task(low=0.0, high=512.0)),
    "choices": (CategoricalConfig(hidden=[8]), task(actions=1, low=0.0, high=3.0, choices=4)),
}
RANGES = (
    "acts in \\[0, 512\\] .action 0., the environment's bounds are \\[-1, 1\\]: the units differ\\. Fix: .*"
)
ARM = ["env=arm_push", "env.threads=1", "out={place}/out"]
PPO = ["train", "algo=ppo", "policy=pretrained", *ARM]
TD3 = ["train", "algo=td3", "policy=residual", *ARM]

# name: (words, pattern)
CASES = {
    "flow without a log-probability": (
        [*PPO, "policy.path={place}/flow"],
        r"algo=ppo needs a policy with a log-probability, policy=flow has none\. Fix: .*",
    ),
    "a run's name without a log-probability": (
        ["train", "algo=props", "policy={place}/flow", *ARM],
        r"algo=props needs a policy with a log-probability, policy=flow has none\. Fix: .*",
    ),
    "residual without a log-probability": (
        ["train", "algo=sac", "policy=residual", "policy.base={place}/flow", *ARM],
        r"algo=sac needs a log-probability and bounded samples, which policy=residual here lacks\. Fix: .*",
    ),
    "chunks for an algorithm of single actions": (
        ["train", "algo=sac", "policy={place}/chunks", *ARM],
        r"algo=sac works on single actions, policy\.horizon=4\. Fix: .*policy=residual policy\.base=<run>.*",
    ),
    "another horizon": (
        [*PPO, "policy.path={place}/chunks", "policy.horizon=8"],
        r"policy\.horizon=8: {place}/chunks was trained with 4, .*Fix: drop policy\.horizon.*",
    ),
    "another history": (
        [*PPO, "policy.path={place}/gaussian", "policy.history=2"],
        r"policy\.history=2: {place}/gaussian was trained with 1, .*",
    ),
    "another normaliser": (
        [*PPO, "policy.path={place}/gaussian", "policy.normalise_action=minmax"],
        r"policy\.normalise_action=minmax: {place}/gaussian was trained with bounds, .*",
    ),
    "more steps than a chunk has": (
        [*PPO, "policy.path={place}/chunks", "policy.execute=9"],
        r"policy\.execute=9 must lie in 1\.\.4 .*",
    ),
    "keys": (
        [*PPO, "policy.path={place}/keys"],
        r"policy\.path={place}/keys observes 'keypoint', the environment offers state\. Fix: .*",
    ),
    "shape": (
        [*PPO, "policy.path={place}/shape"],
        r"policy\.path={place}/shape observes 'state' of shape \(27,\), here it is \(25,\)\. Fix: .*",
    ),
    "action dimension": (
        [*PPO, "policy.path={place}/actions"],
        r"policy\.path={place}/actions has 4 actions, the environment has 3\. Fix: .*",
    ),
    "units of actions": ([*PPO, "policy.path={place}/pixels"], r"policy\.path={place}/pixels " + RANGES),
    "discrete actions": (
        [*PPO, "policy.path={place}/choices"],
        r"policy\.path={place}/choices was trained on 4 discrete actions, the environment has continuous .*",
    ),
    "nothing there": ([*PPO, "policy.path={place}/none"], r"no policy at {place}/none: it does not exist"),
    "keys of a base": ([*TD3, "policy.base={place}/keys"], r".*'keypoint'.* the environment offers state.*"),
    "shape of a base": ([*TD3, "policy.base={place}/shape"], r".*'state'.*\(27,\).*\(25,\).*"),
    "action dimension of a base": ([*TD3, "policy.base={place}/actions"], r".* 4 action.*environment.* 3.*"),
    "chunks in place of a residual": (
        [*TD3, "policy.base={place}/flow", "policy.horizon=4"],
        r"policy\.horizon of a residual policy is 1: .*",
    ),
    "no base": (TD3, r"policy\.base is empty: .*Fix: policy\.base=<run>"),
    "no base there": ([*TD3, "policy.base={place}/none"], r"no policy at {place}/none: it does not exist"),
    "residual for cloning": (
        ["train", "algo=bc", "policy=residual", "policy.base={place}/flow", "data.collect=1", *ARM],
        r"algo=bc can't train policy=residual, .*: deterministic, .*flow.*",
    ),
    "units of actions in an evaluation": (
        ["eval", "policy={place}/pixels", "env=arm_push", "episodes=1", "out={place}/out"],
        r"policy={place}/pixels " + RANGES,
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    for name, (config, spec) in STORED.items():
        save_folder(folder / name, policy_files(build_policy(config, spec)))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_one_line(case, place, capsys):
    words, pattern = CASES[case]
    code = main([word.replace("{place}", str(place)) for word in words])
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == err.splitlines()[-1:], err
    wanted = pattern.replace("{place}", re.escape(str(place)))
    assert re.fullmatch(wanted, lines[0].removeprefix("error: ")), lines[0]
    out = place / "out"  # data that was recorded on the way may stay
    left = {path.name for path in out.iterdir()} if out.exists() else set()
    assert not left - {"data.zarr", "data.zarr.cache"}, left


def stored(bounds, mode, data=None, actions=2):
    """A policy whose normaliser has seen `data` [low, high] per action."""
    policy = build_policy(
        DeterministicConfig(hidden=[4]), task(actions=actions, low=bounds[0], high=bounds[1])
    )
    low, high = data or ([bounds[0]] * actions, [bounds[1]] * actions)
    stats = {"action": {"min": low, "max": high, "mean": low, "std": high, "count": 9}}
    policy.normaliser.fit(stats, obs="identity", action=mode)
    return policy


@pytest.mark.parametrize(
    ("policy", "bounds", "fits"),
    [
        (stored((-1.0, 1.0), "bounds"), (-1.0, 1.0), True),
        (stored((-1.0, 1.0), "bounds"), (-0.5, 2.0), True),
        (stored((0.0, 512.0), "bounds"), (-1.0, 1.0), False),  # everything would be clipped
        (stored((-1.0, 1.0), "bounds"), (0.0, 512.0), False),  # hardly anything could be reached
        (stored((-1.0, 1.0), "bounds"), (2.0, 3.0), False),
        (
            stored((-INF, INF), "bounds"),
            (-1.0, 1.0),
            True,
        ),  # in the environment's units, for all one can tell
        (stored((-INF, INF), "minmax", ([13.0, 20.0], [500.0, 511.0])), (0.0, 512.0), True),
        (stored((-INF, INF), "minmax", ([13.0, 20.0], [500.0, 511.0])), (-1.0, 1.0), False),
        (stored((-1.0, 1.0), "minmax", ([-0.9, 0.3], [0.4, 0.3])), (-1.0, 1.0), True),  # one never moved
        (stored((-1.0, 1.0), "minmax", ([-0.9, 0.001], [0.4, 0.002])), (-1.0, 1.0), True),  # one hardly did
        (stored((-1.0, 1.0), "minmax", ([0.3, 0.3], [0.3, 0.3])), (-0.1, 0.1), True),  # none did
        (stored((0.0, 512.0), "identity"), (-1.0, 1.0), True),
        (stored((0.0, 512.0), "meanstd"), (-1.0, 1.0), True),
        (stored((-1.0, 1.0), "bounds"), (-INF, INF), True),
    ],
)
def test_ranges_of_actions(policy, bounds, fits):
    spec = task(actions=2, low=bounds[0], high=bounds[1])
    if fits:
        check_fits(policy, spec, "policy=x")
    else:
        with pytest.raises(ConfigError, match=r"policy=x acts in .*the units differ\. Fix: "):
            check_fits(policy, spec, "policy=x")
