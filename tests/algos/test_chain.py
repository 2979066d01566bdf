# SPDX-License-Identifier: Apache-2.0
"""The chain task: offline reinforcement learning finds the way that most of the data does not take."""

from dataclasses import replace

import pytest
import torch

from robopost.algos.offline.bc import BC, BCConfig

FAST = {"actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05}
GAUSSIAN = {"squash": False, "mean_tanh": True, "state_std": False}
# name -> (updates, options of `lab.make`)
SOLVERS = {
    "td3_bc": (600, FAST),
    "iql": (
        600,
        FAST | {"policy_options": GAUSSIAN, "expectile": 0.9, "beta": 20.0, "actor_decay_updates": 0},
    ),
    "cql": (400, FAST | {"temperature_lr": 3e-3, "min_q_weight": 1.0}),
    "cal_ql": (700, FAST | {"temperature_lr": 3e-3, "min_q_weight": 1.0}),
}


def with_returns(data):
    """The chain's data with the return its behaviour gets on average from each transition."""
    state, after = data.obs["state"].argmax(1), data.next_obs["state"].argmax(1)
    value = torch.zeros(5)
    for _ in range(200):
        returns = data.reward + data.discount * value[after]
        value = torch.stack([returns[state == s].mean() for s in range(5)])
    return replace(data, extra={"return_to_go": returns})


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_state_gets_the_action_that_leads_to_the_reward(lab, chain, name):
    spec, data, states = chain
    updates, options = SOLVERS[name]
    algo, data = lab.make(name, spec=spec, **options), with_returns(data)
    for _ in range(updates):
        algo.update(data)
    assert (algo.policy.act(states, deterministic=True).chunk > 0).all()


@pytest.mark.parametrize("kind", ["deterministic", "gaussian"])
def test_cloning_goes_the_way_of_the_majority(lab, chain, kind):
    spec, data, states = chain
    torch.manual_seed(0)
    options = GAUSSIAN if kind == "gaussian" else {}
    policy = lab.make_policy(kind, spec, **options)
    generator = torch.Generator().manual_seed(0)
    config = BCConfig(lr=3e-3, ema=0.0, warmup=0)
    algo = BC(config, policy, spec, device=torch.device("cpu"), generator=generator)
    chunks = replace(data, action=data.action[:, None], chunk_mask=torch.ones(len(data), 1, dtype=torch.bool))
    for _ in range(300):
        algo.update(chunks)
    assert (algo.policy.act(states, deterministic=True).chunk < 0).all()
