# SPDX-License-Identifier: Apache-2.0
"""A chunk task with everything on that could go wrong, for the tests of ReinFlow.

Horizon 4 of which 2 steps are executed, two observations of history, actions scaled to the data's range, observations
standardised.
"""

from __future__ import annotations

import torch

from robopost.algos.generative.reinflow import ReinFlow, ReinFlowConfig
from robopost.data.batch import Batch, Spec, bootstrap_discount
from robopost.policies.flow import Flow, FlowConfig

CPU = torch.device("cpu")
STATE = Spec({"state": ((3,), "float32")}, 2, (-2.0, -1.0), (2.0, 3.0), 40)
IMAGES = Spec(STATE.obs | {"image": ((16, 16, 3), "uint8")}, 2, (-2.0, -1.0), (2.0, 3.0), 40)
STATS = {
    "state": {"mean": [1.0, -1.0, 0.5], "std": [2.0, 0.5, 1.0]},
    "action": {"min": [-1.0, 0.0], "max": [1.5, 2.0], "count": 10},
}


def make_policy(spec=STATE, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {
        "horizon": 4,
        "execute": 2,
        "history": 2,
        "steps": 4,
        "width": 16,
        "depth": 1,
        "image_features": 8,
    }
    policy = Flow(FlowConfig(**sizes | options), spec)
    policy.normaliser.fit(STATS, obs="meanstd", action="minmax")
    return policy


def make(spec=STATE, policy=None, seed=0, policy_options=None, **options):
    """ReinFlow on a fresh policy, every noise off its starting point."""
    policy = policy if policy is not None else make_policy(spec, seed, **(policy_options or {}))
    sizes = {"rollout_steps": 3, "batch_size": 6, "epochs": 1, "hidden": [16], "noise_hidden": [16]}
    generator = torch.Generator().manual_seed(seed + 100)
    config = ReinFlowConfig(**sizes | options)
    return ReinFlow(config, policy, policy.spec, device=CPU, generator=generator)


def observe(policy, rows, seed=0):
    """Raw observations (rows, history, ...)."""
    g = torch.Generator().manual_seed(seed)
    lead = (rows,) if policy.history == 1 else (rows, policy.history)
    obs = {"state": 1 + 2 * torch.randn(*lead, 3, generator=g)}
    if "image" in policy.obs_keys:
        obs["image"] = torch.randint(256, (*lead, 16, 16, 3), generator=g, dtype=torch.uint8)
    return obs


def rollout(algo, decisions=3, envs=4, seed=0, reward=None):
    """A normalised batch (D, N) of `algo.decide`: one episode ends by itself, one by its time limit."""
    policy, total = algo.policy, decisions * envs
    g = torch.Generator().manual_seed(seed + 1)
    obs, after = observe(policy, total, seed), observe(policy, total, seed + 2)
    action = algo.decide(obs, g)
    terminated, truncated = torch.zeros(2, total, dtype=torch.bool)
    terminated[envs], truncated[envs + 1] = True, True
    mask = (torch.arange(policy.horizon) < policy.execute).expand(total, -1)
    batch = Batch(
        obs=obs,
        action=action.chunk,
        reward=torch.randn(total, generator=g) if reward is None else reward(action.chunk),
        next_obs=after,
        terminated=terminated,
        truncated=truncated,
        discount=bootstrap_discount(terminated, algo.needs.gamma),
        chunk_mask=mask,
        chain=action.chain,
        log_prob=action.log_prob,
    )
    return policy.normaliser.batch(batch.map(lambda tensor: tensor.unflatten(0, (decisions, envs))))


def euler(policy, obs, x, first=0, frozen=False):
    """Means of the steps `first` .. K - 1 of the stored chain `x` (B, K + 1, H, A), a step at a time.

    Written out from the paper: x_k + v(x_k, k / K, s) / K, shortcut models told the size of their step.
    """
    parts = policy.frozen if frozen else {"encoder": policy.encoder, "net": policy.net}
    cond, steps, means = parts["encoder"](obs), policy.config.steps, []
    for k in range(first, x.shape[1] - 1):
        times = [torch.full((len(x),), k / steps)]
        if policy.config.variant == "shortcut":
            times.append(
                torch.full(
                    (len(x),), (steps.bit_length() - 1) / (policy.config.shortcut_finest.bit_length() - 1)
                )
            )
        out = parts["net"](x[:, k], cond, *times)
        velocity = (out - x[:, k]) / (1 - k / steps) if policy.config.prediction == "sample" else out
        means.append(x[:, k] + velocity / steps)
    return torch.stack(means, 1)


def gradients(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    names = [name for name, p in module.named_parameters()]
    return {name: g for name, g in zip(names, found, strict=True) if g is not None and g.abs().max() > 0}


def rows_of(algo, batch=None):
    """What a minibatch of all rows holds."""
    batch = rollout(algo) if batch is None else batch
    data, _ = algo._data(batch, batch.chunk_mask.any(-1))
    return data, {key[4:]: value for key, value in data.items() if key.startswith("obs/")}


TARGET = 0.5


def bandit_policy(seed, **options):
    """A flow cloned from N(-0.5, 0.1^2), in normalised units, whatever it observes."""
    policy = make_policy(seed=seed, horizon=2, execute=1, width=32, depth=1, **options)
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    g, mask = torch.Generator().manual_seed(seed), torch.ones(256, 2, dtype=torch.bool)
    for _ in range(300):
        chunk = -0.5 + 0.1 * torch.randn(256, 2, 2, generator=g)
        loss = policy.bc_loss({"state": torch.zeros(256, 2, 3)}, chunk, mask, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def bandit_distance(policy):
    """Mean distance of the executed action of the policy, without noise, to the target."""
    chunk = policy.act(_nowhere(policy, 1024), generator=torch.Generator().manual_seed(9)).chunk
    return (policy.normaliser.action(chunk)[:, 0] - TARGET).norm(dim=-1).mean().item()


def bandit_learn(policy, iterations, seed, samples=1024, **options):
    """Fine-tune on one-step episodes whose reward is minus the squared distance of the executed action."""
    algo = make(
        policy=policy,
        seed=seed,
        **{"batch_size": 256, "epochs": 5, "actor_lr": 3e-4, "target_kl": 0.0} | options,
    )
    g = torch.Generator().manual_seed(seed)
    ends, obs = torch.ones(1, samples, dtype=torch.bool), _nowhere(policy, samples)
    for _ in range(iterations):
        action = algo.decide(obs, g)
        miss = policy.normaliser.action(action.chunk)[:, 0] - TARGET
        rows = {key: value[None] for key, value in obs.items()}
        batch = Batch(
            obs=rows,
            action=action.chunk[None],
            reward=-miss.square().sum(-1)[None],
            next_obs=rows,
            terminated=ends,
            truncated=~ends,
            discount=torch.zeros(1, samples),
            chunk_mask=torch.tensor([True, False]).expand(1, samples, 2),
            chain=action.chain[None],
            log_prob=action.log_prob[None],
        )
        algo.update(policy.normaliser.batch(batch))
    return algo


def _nowhere(policy, rows):
    """The raw observation that is zero once standardised."""
    return {"state": policy.normaliser.obs_shift_state.expand(rows, policy.history, -1)}
