# SPDX-License-Identifier: Apache-2.0
"""Small policies, rollouts and recorded data of the HNPG tests."""

from dataclasses import replace

import numpy as np
import torch

from robopost.algos.online.hnpg import HNPG, HNPGConfig
from robopost.algos.online.trpo import NPG, TRPO, NPGConfig, TRPOConfig
from robopost.data.batch import Batch, Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.policies.base import EPISODE_STEP
from robopost.policies.gaussian import Gaussian, GaussianConfig
from robopost.policies.stepwise import Stepwise, StepwiseConfig

H, D, A = 3, 4, 2
SPEC = Spec({"state": ((D,), "float32")}, A, (-1.0,) * A, (1.0,) * A, H)
OPEN = replace(SPEC, max_steps=0)
KINDS = {"hnpg": (HNPG, HNPGConfig), "trpo": (TRPO, TRPOConfig), "npg": (NPG, NPGConfig)}


def make(name="hnpg", spec=SPEC, policy=None, seed=0, **config):
    cls, config_cls = KINDS[name]
    torch.manual_seed(seed)
    policy = policy or Stepwise(StepwiseConfig(hidden=[8, 8]), spec)
    config = {"hidden": [8, 8]} | config
    generator = torch.Generator().manual_seed(seed + 100)
    return cls(config_cls(**config), policy, spec, device=torch.device("cpu"), generator=generator)


def stationary(name="hnpg", spec=OPEN, **config):
    torch.manual_seed(1)
    policy = Gaussian(GaussianConfig(hidden=[8, 8], activation="tanh", squash=False, state_std=False), spec)
    return make(name, spec, policy, **({"gamma": 0.9, "rollout_steps": 6} | config))


def tensors(batch=20, seed=0, heads=H):
    """Fresh rows (H, B, ...), or recorded ones."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    last = (torch.arange(heads) == heads - 1)[:, None].expand(heads, batch)
    return {
        "action": draw(heads, batch, A).clamp(-1, 1),
        "chain": draw(heads, batch, A),
        "reward": draw(heads, batch),
        "done": last,
        "discount": (~last).float(),
        "obs/state": draw(heads, batch, D),
        "next_obs/state": draw(heads, batch, D),
    }


def rollout(algo, episodes=4, length=H, seed=0):
    """(T, N) steps of whole episodes, chains of the algorithm's own policy."""
    g = torch.Generator().manual_seed(seed)
    obs = {"state": torch.randn(length, episodes, D, generator=g)}
    step = torch.arange(length)[:, None].expand(length, episodes)
    flat = {"state": obs["state"].flatten(0, 1), EPISODE_STEP: step.flatten()}
    act = algo.policy.act(flat, generator=g)
    shape = lambda x: x.unflatten(0, (length, episodes))  # noqa: E731
    return Batch(
        obs=obs | {EPISODE_STEP: step},
        action=shape(act.chunk[:, 0]),
        reward=torch.randn(length, episodes, generator=g),
        next_obs={"state": torch.randn(length, episodes, D, generator=g)},
        terminated=step == length - 1,
        truncated=torch.zeros(length, episodes, dtype=torch.bool),
        discount=(step < length - 1).float() * algo.config.gamma,
        chain=shape(act.chain),
        log_prob=shape(act.log_prob),
    )


def recorded_data(episodes=6, length=H, seed=0, spec=SPEC, device="cpu"):
    rng = np.random.default_rng(seed)
    made = [
        Episode(
            {"state": rng.normal(size=(length + 1, D)).astype(np.float32)},
            rng.uniform(-1, 1, (length, A)).astype(np.float32),
            rng.normal(size=length).astype(np.float32),
            terminated=True,
            truncated=False,
        )
        for _ in range(episodes)
    ]
    return Dataset.from_episodes(made, spec, device=device)
