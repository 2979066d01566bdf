# SPDX-License-Identifier: Apache-2.0
"""Sampling error: how far the actions that were taken are from a policy's probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from robopost.data.batch import Obs
from robopost.errors import ConfigError
from robopost.policies.base import Policy
from robopost.policies.categorical import Categorical
from robopost.policies.gaussian import Gaussian

REFIT_STEPS = 500  # at most, of L-BFGS


@torch.no_grad()
def sampling_error(policy: Policy, obs: Obs, chain: Tensor) -> Tensor:
    """mean[log pi_MLE(a|s) - log pi(a|s)] over samples, in nats (Corrado and Hanna 2023, section 6).

    pi_MLE is the policy with its last layer (and its constant std, where it has one) fitted to the samples by maximum
    likelihood, everything before it as it is. Zero where the samples are what the policy would draw on average.
    In closed form where `has_closed_form`; tabular policies (`Categorical` without hidden layers on one-hot
    observations) count; the last layer of all others is refitted by L-BFGS.

    Args:
        policy: `Gaussian` or `Categorical`.
        obs: normalised observations (B, ...).
        chain: (B, 1, H, A) samples as in `Action.chain`.

    Raises:
        ConfigError: another class of policy.
    """
    if isinstance(policy, Categorical):
        target = policy.log_prob(obs, chain).double().mean()
        rows = policy.encoder(obs)
        if not policy.config.hidden and bool(((rows == 0) | (rows == 1)).all() & (rows.sum(-1) == 1).all()):
            return counted_log_prob(rows.argmax(-1), chain.flatten().long(), policy.spec.choices) - target
        return refitted_log_prob(policy, obs, chain) - target
    if not isinstance(policy, Gaussian):
        raise ConfigError(
            f"policy={policy.registry_name} has no sampling error: its last layer can't be fitted by likelihood. "
            "Fix: policy=gaussian or policy=categorical"
        )
    if has_closed_form(policy):
        return linear_gaussian_error(policy, obs, chain)
    # Of the samples before tanh on both sides: its slope cancels.
    target = policy.chain_log_prob(chain, *policy.distribution(obs)).double().mean()
    return refitted_log_prob(policy, obs, chain) - target


def has_closed_form(policy: Policy) -> bool:
    """True for a Gaussian whose mean is linear in its last layer and whose std is constant."""
    return isinstance(policy, Gaussian) and not (policy.config.state_std or policy.config.mean_tanh)


def linear_gaussian_error(policy: Gaussian, obs: Obs, chain: Tensor) -> Tensor:
    """`sampling_error` where `has_closed_form`: least squares for the mean, residual variance for the std.

    The fitted std obeys the policy's bounds. Squashing doesn't matter: the slope of tanh cancels.
    """
    mean, log_std = (part.flatten(1).double() for part in policy.distribution(obs))
    x = chain[:, -1].flatten(1).double()
    inputs = features(policy, obs).double()
    design = torch.cat([inputs, torch.ones_like(inputs[:, :1])], -1)
    # The fit of the residual is the change of the last layer; a pseudo-inverse, because features may be dead.
    off = x - mean
    change = torch.linalg.pinv(design.t() @ design, hermitian=True) @ (design.t() @ off)
    residual = (off - design @ change).square().mean(0)
    cfg = policy.config
    fitted = (0.5 * residual.log()).clamp(cfg.log_std_min, cfg.log_std_max)
    best = -0.5 * residual * (-2 * fitted).exp() - fitted
    target = -0.5 * off.square() * (-2 * log_std).exp() - log_std
    return best.sum() - target.sum(-1).mean()


def counted_log_prob(state: Tensor, action: Tensor, choices: int) -> Tensor:
    """Mean log of the empirical conditional probability of each sample, from counts.

    Args:
        state: (B,) index of the state.
        action: (B,) index of the action.
        choices: number of actions.
    """
    pair, visits = torch.unique(state * choices + action, return_counts=True)
    states, of_pair = torch.unique(pair // choices, return_inverse=True)
    visits = visits.double()
    total = torch.zeros(len(states), dtype=visits.dtype, device=visits.device).index_add_(0, of_pair, visits)
    return (visits * (visits / total[of_pair]).log()).sum() / visits.sum()


def refitted_log_prob(policy: Gaussian | Categorical, obs: Obs, chain: Tensor) -> Tensor:
    """Mean log-probability of the samples after fitting the policy's last layer to them, by L-BFGS in float64."""
    inputs, chain = features(policy, obs).double(), chain.double()
    last = list(policy.net)[-1]
    assert isinstance(last, torch.nn.Linear)
    constant = [policy.log_std] if isinstance(policy, Gaussian) and not policy.config.state_std else []
    fitted = [p.detach().double().requires_grad_() for p in (last.weight, last.bias, *constant)]

    def log_prob() -> Tensor:
        out = torch.nn.functional.linear(inputs, *fitted[:2])
        if isinstance(policy, Categorical):
            return policy.chain_log_prob(chain, *policy.head(out)).mean()
        mean, log_std = policy.head(out)
        if constant:  # `head` has read the policy's own
            bounded = fitted[2].clamp(policy.config.log_std_min, policy.config.log_std_max)
            log_std = bounded.view(mean.shape[1:]).expand_as(mean)
        return policy.chain_log_prob(chain, mean, log_std).mean()

    optimizer = torch.optim.LBFGS(
        fitted,
        max_iter=REFIT_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_prob()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return log_prob()


def features(policy: Gaussian | Categorical, obs: Obs) -> Tensor:
    """(B, D) what the last layer of the policy reads, without a gradient."""
    *layers, _ = policy.net
    out = policy.encoder(obs)
    for layer in layers:
        out = layer(out)
    return out.detach()
