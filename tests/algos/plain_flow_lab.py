# SPDX-License-Identifier: Apache-2.0
"""Small flows and rollouts for the tests of PolicyFlow and FPO: horizon 4, of which 2 steps are executed."""

from __future__ import annotations

import torch

from robopost.algos.generative.fpo import FPO, FPOConfig
from robopost.algos.generative.policyflow import PolicyFlow, PolicyFlowConfig
from robopost.data.batch import Batch, Spec, bootstrap_discount
from robopost.policies.flow import Flow, FlowConfig

CPU = torch.device("cpu")
SPEC = Spec({"state": ((3,), "float32")}, 2, (-2.0, -1.0), (2.0, 3.0), 40)
POINT = Spec({"state": ((1,), "float32")}, 2, (-float("inf"),) * 2, (float("inf"),) * 2, 1)
CLASSES = {"policyflow": (PolicyFlow, PolicyFlowConfig), "fpo": (FPO, FPOConfig)}


def make_policy(spec=SPEC, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"horizon": 4, "execute": 2, "steps": 3, "width": 16, "depth": 1, "normalise_action": "bounds"}
    return Flow(FlowConfig(**sizes | options), spec)


def make(name, policy=None, seed=0, spec=SPEC, policy_options=None, **config):
    policy = policy if policy is not None else make_policy(spec, seed, **(policy_options or {}))
    cls, config_cls = CLASSES[name]
    sizes = {"rollout_steps": 3, "batch_size": 6, "epochs": 1, "hidden": [16]}
    generator = torch.Generator().manual_seed(seed + 100)
    return cls(config_cls(**sizes | config), policy, policy.spec, device=CPU, generator=generator)


def rollout(algo, decisions=3, envs=4, seed=0, reward=None, short=True):
    """A normalised batch (D, N) of `algo.decide`; with `short` one decision ended after its first step."""
    policy, total = algo.policy, decisions * envs
    g = torch.Generator().manual_seed(seed + 1)
    size = policy.spec.obs["state"][0][0]
    obs, after = ({"state": torch.randn(total, size, generator=g)} for _ in range(2))
    action = algo.decide(obs, g)
    terminated = torch.zeros(total, dtype=torch.bool)
    mask = (torch.arange(policy.horizon) < policy.execute).repeat(total, 1)
    if short:
        terminated[envs], mask[envs, 1:] = True, False
    batch = Batch(
        obs=obs,
        action=action.chunk,
        reward=torch.randn(total, generator=g) if reward is None else reward(action.chunk),
        next_obs=after,
        terminated=terminated,
        truncated=torch.zeros(total, dtype=torch.bool),
        discount=bootstrap_discount(terminated, algo.needs.gamma),
        chunk_mask=mask,
        chain=action.chain,
    )
    return policy.normaliser.batch(batch.map(lambda tensor: tensor.unflatten(0, (decisions, envs))))


def bandit(algo, count, reward):
    """(1, count) batch of one-step episodes from the same state; `reward` of executed actions (count, A)."""
    obs = {"state": torch.zeros(count, 1)}
    action = algo.decide(obs, algo.generator)
    done = torch.ones(count, dtype=torch.bool)
    batch = Batch(
        obs=obs,
        action=action.chunk,
        reward=reward(action.chunk[:, 0]),
        next_obs=obs,
        terminated=done,
        truncated=~done,
        discount=torch.zeros(count),
        chunk_mask=torch.ones(count, 1, dtype=torch.bool),
        chain=action.chain,
    )
    return batch.map(lambda tensor: tensor.unsqueeze(0))


def rows_of(algo, batch, seed=0):
    """(rows of `remember` with obs and random advantages, obs) of all decisions of a rollout."""
    flat = batch.map(lambda tensor: tensor.flatten(0, 1))
    with torch.no_grad():
        rows = algo.remember(flat)
    g = torch.Generator().manual_seed(seed)
    return rows | {"advantage": torch.randn(len(flat), generator=g)}, flat.obs


def output_layer(policy):
    """Last linear layer of the velocity network."""
    return policy.net.net.out[-1]
