# SPDX-License-Identifier: Apache-2.0
"""Settings of published methods that several benchmarks train with."""

IQL_POLICY = [  # of the authors' code on locomotion
    "policy=gaussian",
    "policy.squash=false",
    "policy.mean_tanh=true",
    "policy.state_std=false",
    "policy.normalise_obs=identity",
    "policy.init=orthogonal",
]


def reward_scale(returns):
    """IQL's factor on rewards for episodes of these returns: their range becomes 1000."""
    return 1000 / (max(returns) - min(returns))
