# SPDX-License-Identifier: Apache-2.0
"""Small tasks, batches and builders shared by the algorithm tests."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robopost.algos.offline.a2pr import A2PR, A2PRConfig
from robopost.algos.offline.cal_ql import CalQL, CalQLConfig
from robopost.algos.offline.cql import CQL, CQLConfig
from robopost.algos.offline.iql import IQL, IQLConfig
from robopost.algos.offline.rebrac import ReBRAC, ReBRACConfig
from robopost.algos.offline.td3_bc import TD3BC, TD3BCConfig
from robopost.algos.online.ppo import PPO, PPOConfig
from robopost.algos.online.props import PROPS, PROPSConfig
from robopost.algos.online.sac import SAC, SACConfig
from robopost.algos.online.td3 import TD3, TD3Config
from robopost.data.batch import Batch, Spec
from robopost.policies.deterministic import Deterministic, DeterministicConfig
from robopost.policies.gaussian import Gaussian, GaussianConfig

OBS, ACT = 5, 2
SPEC = Spec({"state": ((OBS,), "float32")}, ACT, (-1.0,) * ACT, (1.0,) * ACT, 100)
CLASSES = {
    "td3": (TD3, TD3Config, "deterministic"),
    "td3_bc": (TD3BC, TD3BCConfig, "deterministic"),
    "a2pr": (A2PR, A2PRConfig, "deterministic"),
    "rebrac": (ReBRAC, ReBRACConfig, "deterministic"),
    "sac": (SAC, SACConfig, "gaussian"),
    "iql": (IQL, IQLConfig, "gaussian"),
    "cql": (CQL, CQLConfig, "gaussian"),
    "cal_ql": (CalQL, CalQLConfig, "gaussian"),
    "ppo": (PPO, PPOConfig, "gaussian"),
    "props": (PROPS, PROPSConfig, "gaussian"),
}


def make_policy(kind, spec=SPEC, **options):
    options.setdefault("hidden", [16, 16])
    if kind == "deterministic":
        return Deterministic(DeterministicConfig(**options), spec)
    return Gaussian(GaussianConfig(**options), spec)


def make(name, policy=None, seed=0, spec=SPEC, policy_options=None, **config):
    cls, config_cls, kind = CLASSES[name]
    torch.manual_seed(seed)
    options = dict(policy_options or {})
    if name in ("ppo", "props"):
        options = {"squash": False, "state_std": False, "activation": "tanh", "init": "orthogonal"} | options
        config = {"rollout_steps": 8, "batch_size": 8, "epochs": 2} | config
    if name == "props":
        config = {"behaviour_steps": 4, "behaviour_minibatches": 2} | config
    policy = policy if policy is not None else make_policy(kind, spec, **options)
    config.setdefault("hidden", [16, 16])
    if name == "a2pr":
        config.setdefault("vae_hidden", [16, 16])
    generator = torch.Generator().manual_seed(seed + 100)
    return cls(config_cls(**config), policy, spec, device=torch.device("cpu"), generator=generator)


def make_batch(size=32, seed=0, spec=SPEC):
    g = torch.Generator().manual_seed(seed)
    obs, act = spec.obs["state"][0][0], spec.action_dim
    terminated = torch.rand(size, generator=g) < 0.2
    return Batch(
        obs={"state": torch.randn(size, obs, generator=g)},
        action=torch.rand(size, act, generator=g) * 2 - 1,
        reward=torch.randn(size, generator=g),
        next_obs={"state": torch.randn(size, obs, generator=g)},
        terminated=terminated,
        truncated=torch.zeros(size, dtype=torch.bool),
        discount=torch.where(terminated, 0.0, 0.99),
        extra={
            "next_action": torch.rand(size, act, generator=g) * 2 - 1,
            "next_action_mask": torch.rand(size, generator=g) < 0.9,
        },
    )


def make_rollout(algo, steps=8, envs=2, seed=0):
    """A (T, N) batch whose chains the algorithm's own policy has sampled."""
    rows = make_batch(steps * envs, seed)
    g = torch.Generator().manual_seed(seed + 1)
    action = algo.policy.act(rows.obs, generator=g)
    rows = replace(rows, action=action.chunk[:, 0], chain=action.chain, log_prob=action.log_prob)
    return rows.map(lambda tensor: tensor.unflatten(0, (steps, envs)))


def any_batch(algo, seed=0):
    """What the algorithm's `update` takes."""
    if algo.regime == "onpolicy":
        return make_rollout(algo, seed=seed)
    batch = make_batch(seed=seed)
    g = torch.Generator().manual_seed(seed + 50)
    returns = {"return_to_go": torch.randn(len(batch), generator=g)}
    return replace(batch, extra=returns) if "return_to_go" in algo.needs.extra else batch


def plain_layers(net, member=None):
    """The linear layers of an MLP, or of one member of an ensemble, as a fresh Sequential."""
    layers = []
    linears = [layer for layer in net.modules() if hasattr(layer, "weight") and hasattr(layer, "bias")]
    for index, layer in enumerate(linears):
        weight = layer.weight.detach() if member is None else layer.weight.detach()[member].t()
        bias = layer.bias.detach().reshape(-1) if member is None else layer.bias.detach()[member].reshape(-1)
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(bias)
        layers.append(linear)
        if index < len(linears) - 1:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def assert_same_net(net, plain, member=None, tolerance=1e-5):
    for ours, theirs in zip(plain_layers(net, member).parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).abs().max() < tolerance


@pytest.fixture
def lab():
    """The helpers of this file."""
    return SimpleNamespace(
        SPEC=SPEC,
        NAMES=sorted(CLASSES),
        make=make,
        make_policy=make_policy,
        make_batch=make_batch,
        make_rollout=make_rollout,
        any_batch=any_batch,
        plain_layers=plain_layers,
        assert_same_net=assert_same_net,
    )


def chain_mdp():
    """Five one-hot states in a row; action > 0 goes right, else left; reward 1 for leaving the right end
    (terminal).

    Seven of ten recorded actions go the wrong way in every state, so cloning learns the wrong one.
    """
    rows = []
    for state in range(5):
        for k in range(20):
            right = k % 10 < 3
            action = (0.6 if right else -0.6) + 0.02 * (k % 5)
            leaves = right and state == 4
            rows.append(
                (state, action, float(leaves), min(state + 1, 4) if right else max(state - 1, 0), leaves)
            )
    state, action, reward, after, done = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Batch(
        obs={"state": nn.functional.one_hot(state, 5).float()},
        action=action.float()[:, None],
        reward=reward,
        next_obs={"state": nn.functional.one_hot(after, 5).float()},
        terminated=done,
        truncated=torch.zeros_like(done),
        discount=torch.where(done, 0.0, 0.9),
    )


@pytest.fixture
def chain():
    """(spec, batch, all five states) of the chain task."""
    spec = Spec({"state": ((5,), "float32")}, 1, (-1.0,), (1.0,), 50)
    return spec, chain_mdp(), {"state": torch.eye(5)}
