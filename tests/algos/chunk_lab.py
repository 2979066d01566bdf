# SPDX-License-Identifier: Apache-2.0
"""Small diffusion policies, decisions and a bandit, for the tests of DPPO and of the frame it stands on."""

import torch

from robopost.algos.generative.dppo import DPPO, DPPOConfig
from robopost.data.batch import Batch, Spec, bootstrap_discount
from robopost.policies.diffusion import Diffusion, DiffusionConfig

CPU = torch.device("cpu")
SPEC = Spec({"state": ((3,), "float32")}, 2, (-2.0, -1.0), (2.0, 3.0), 40)
IMAGES = Spec(SPEC.obs | {"image": ((16, 16, 3), "uint8")}, 2, (-2.0, -1.0), (2.0, 3.0), 40)
BANDIT = Spec({"state": ((1,), "float32")}, 2, (-1.0, -1.0), (1.0, 1.0), 1)


def make_policy(spec=SPEC, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"horizon": 4, "execute": 3, "steps": 5, "width": 16, "depth": 1, "normalise_action": "bounds"}
    return Diffusion(DiffusionConfig(**sizes | options), spec)


def make(policy=None, seed=0, policy_options=None, cls=DPPO, config_cls=DPPOConfig, **options):
    policy = policy if policy is not None else make_policy(seed=seed, **(policy_options or {}))
    sizes = {"rollout_steps": 3, "batch_size": 6, "epochs": 1, "hidden": [16]}
    generator = torch.Generator().manual_seed(seed + 100)
    config = config_cls(**sizes | options)
    return cls(config, policy, policy.spec, device=CPU, generator=generator)


def observe(policy, rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs = {"state": torch.randn(rows, 3, generator=g)}
    if "image" in policy.obs_keys:
        obs["image"] = torch.randint(256, (rows, 16, 16, 3), generator=g, dtype=torch.uint8)
    return obs


def rollout(algo, decisions=3, envs=4, seed=0, padded=0):
    """A normalised batch (D, N) of `algo.decide`: one episode ends by itself, one by its time limit.

    The last `padded` environments have made one decision fewer: their last row is zeros.
    """
    policy, total = algo.policy, decisions * envs
    g = torch.Generator().manual_seed(seed + 1)
    obs = observe(policy, total, seed)
    action = algo.decide(obs, g)
    terminated, truncated = torch.zeros(2, total, dtype=torch.bool)
    terminated[envs], truncated[envs + 1] = True, True
    batch = Batch(
        obs=obs,
        action=action.chunk,
        reward=torch.randn(total, generator=g),
        next_obs=observe(policy, total, seed + 2),
        terminated=terminated,
        truncated=truncated,
        discount=bootstrap_discount(terminated, algo.needs.gamma),
        chunk_mask=(torch.arange(policy.horizon) < policy.execute).expand(total, -1).clone(),
        chain=action.chain,
        log_prob=action.log_prob,
    )
    batch = policy.normaliser.batch(batch.map(lambda tensor: tensor.unflatten(0, (decisions, envs))))
    if padded:
        batch.map(lambda tensor: tensor[-1, -padded:].zero_())
    return batch


def bandit_policy(seed, updates=200, **options):
    """Cloned from actions around (-0.5, -0.5)."""
    torch.manual_seed(seed)
    sizes = {
        "horizon": 1,
        "steps": 5,
        "train_steps": 20,
        "width": 32,
        "depth": 2,
        "normalise_action": "bounds",
    }
    policy = Diffusion(DiffusionConfig(**sizes | options), BANDIT)
    optimizer, g = torch.optim.Adam(policy.parameters(), 2e-3), torch.Generator().manual_seed(seed)
    mask = torch.ones(256, 1, dtype=torch.bool)
    for _ in range(updates):
        action = -0.5 + 0.1 * torch.randn(256, 1, 2, generator=g)
        loss = policy.bc_loss({"state": torch.zeros(256, 1)}, action, mask, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def bandit_distance(policy, goal=0.5):
    """Mean distance of the policy's samples to the best action (goal, goal)."""
    g = torch.Generator().manual_seed(9)
    chunk = policy.act({"state": torch.zeros(1024, 1)}, generator=g).chunk
    return (chunk[:, 0] - goal).norm(dim=-1).mean().item()


def play_bandit(algo, rollouts, pulls=512, goal=0.5):
    """Fine-tune: the reward of an action is minus its squared distance to (goal, goal); metrics of the last update."""
    g, obs = torch.Generator().manual_seed(1), {"state": torch.zeros(pulls, 1)}
    ended, metrics = torch.ones(pulls, dtype=torch.bool), {}
    for _ in range(rollouts):
        action = algo.decide(obs, g)
        batch = Batch(
            obs=obs,
            action=action.chunk,
            reward=-(action.chunk[:, 0] - goal).square().sum(-1),
            next_obs=obs,
            terminated=ended,
            truncated=~ended,
            discount=torch.zeros(pulls),
            chunk_mask=torch.ones(pulls, 1, dtype=torch.bool),
            chain=action.chain,
            log_prob=action.log_prob,
        )
        metrics = algo.update(batch.map(lambda tensor: tensor.unsqueeze(0)))
    return metrics
