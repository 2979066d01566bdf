# SPDX-License-Identifier: Apache-2.0
"""Natural-gradient steps: against a dense solve, by hand, per head, and the line search."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from robopost.algos.natural import conjugate_gradients, natural_step
from robopost.algos.online.hnpg import surrogate
from robopost.data.batch import Spec
from robopost.nets.rows import Rows
from robopost.policies.gaussian import gaussian_kl, normal_log_density
from robopost.policies.stepwise import Stepwise, StepwiseConfig

D, A = 4, 2
SPEC = Spec({"state": ((D,), "float32")}, A, (-1.0,) * A, (1.0,) * A, 1)


def bandit(dtype=torch.float64, heads=1, rows=40, seed=0):
    """A one-step Gaussian bandit per head: rows of parameters, surrogate and KL."""
    torch.manual_seed(seed)
    policy = Stepwise(StepwiseConfig(hidden=[4]), replace(SPEC, max_steps=heads)).to(dtype)
    g = torch.Generator().manual_seed(seed + 1)
    state = torch.randn(heads, rows, D, generator=g, dtype=dtype)
    chain = torch.randn(heads, rows, A, generator=g, dtype=dtype)
    advantage = torch.randn(heads, rows, generator=g, dtype=dtype) + chain[..., 0]
    matrix = Rows(policy, heads)
    with torch.no_grad():
        mean, log_std = (value.clone() for value in policy.heads(state))
        old = normal_log_density(chain, mean, log_std).sum(-1)

    def objective():
        return surrogate(advantage, normal_log_density(chain, *policy.heads(state)).sum(-1) - old)

    def divergence():
        return gaussian_kl(mean, log_std, *policy.heads(state)).sum(-1).mean(1)

    return policy, matrix, objective, divergence, (state, chain, advantage)


OPTIONS = {"max_kl": 1e-2, "damping": 0.1, "iterations": 60, "backtracks": 10}


def test_natural_gradient_matches_a_dense_solve():
    _, rows, objective, divergence, _ = bandit()
    old = rows.data.clone()
    gradient = rows.join(torch.autograd.grad(objective().sum(), rows.params))[0]
    slope = rows.join(torch.autograd.grad(divergence().sum(), rows.params, create_graph=True))[0]
    size = len(slope)
    columns = [
        rows.join(torch.autograd.grad(slope[i], rows.params, retain_graph=True, materialize_grads=True))[0]
        for i in range(size)
    ]
    fisher = torch.stack(columns)
    assert torch.allclose(fisher, fisher.t(), atol=1e-10)
    assert torch.linalg.eigvalsh(fisher).min() > -1e-10
    matrix = fisher + 0.1 * torch.eye(size, dtype=fisher.dtype)
    dense = torch.linalg.solve(matrix, gradient)
    solved = conjugate_gradients(lambda v: v @ matrix, gradient[None], 60, 1e-14)
    assert (solved[0] - dense).abs().max() < 1e-5
    result = natural_step(rows, objective, divergence, **OPTIONS)
    step = dense * (2e-2 / (dense @ matrix @ dense)).sqrt()
    assert torch.allclose(rows.data[0] - old[0], result.share * step, atol=1e-5)
    assert result.share == 1
    taken = rows.data[0] - old[0]
    quadratic = 0.5 * taken @ fisher @ taken
    assert torch.allclose(quadratic, result.quadratic, atol=1e-9)
    assert quadratic <= 1e-2 * (1 + 1e-6)
    assert result.after > result.before
    # Ten iterations, the default, are within a hair of the quadratic bound too.
    _, rows, objective, divergence, _ = bandit(seed=4)
    assert natural_step(rows, objective, divergence, **(OPTIONS | {"iterations": 10})).quadratic <= 1e-2 * (
        1 + 1e-6
    )


def test_fisher_of_a_linear_policy_by_hand():
    """Mean = W s + b, std = e^l: F = E[x x^T] / std^2 for each row of [W, b], 2 for each log-std."""
    policy = Stepwise(StepwiseConfig(hidden=[], log_std_init=0.5), replace(SPEC, max_steps=1)).double()
    state = torch.randn(1, 30, D, dtype=torch.float64)
    rows = Rows(policy, 1)
    mean, log_std = (value.detach().clone() for value in policy.heads(state))
    kl = gaussian_kl(mean, log_std, *policy.heads(state)).sum(-1).mean(1)
    slope = rows.join(torch.autograd.grad(kl.sum(), rows.params, create_graph=True))[0]
    v = torch.randn(len(slope), dtype=torch.float64)
    product = rows.join(torch.autograd.grad(slope @ v, rows.params))[0]
    x = torch.cat([state[0], torch.ones(30, 1, dtype=torch.float64)], 1)
    by_name = dict(zip([n for n, _ in policy.named_parameters()], policy.parameters(), strict=True))
    parts = dict(zip(by_name, v.split([p.numel() for p in by_name.values()]), strict=True))
    weight = torch.cat([parts["net.0.weight"].view(D, A), parts["net.0.bias"].view(1, A)])
    ours = dict(zip(by_name, product.split([p.numel() for p in by_name.values()]), strict=True))
    expected = x.t() @ x @ weight / 30 * np.exp(-1.0)
    assert torch.allclose(ours["net.0.weight"].view(D, A), expected[:D], atol=1e-10)
    assert torch.allclose(ours["net.0.bias"].view(1, A), expected[D:], atol=1e-10)
    assert torch.allclose(ours["log_std"], 2 * parts["log_std"], atol=1e-10)


def test_all_heads_at_once_equal_separate_calls():
    policy, rows, objective, divergence, (state, chain, advantage) = bandit(heads=3)
    advantage[2] *= 1e-7  # its residual is below the tolerance from the start: that head rests
    single = []
    for head in range(3):
        one = Stepwise(StepwiseConfig(hidden=[4]), replace(SPEC, max_steps=1)).double()
        for ours, theirs in zip(one.parameters(), policy.parameters(), strict=True):
            ours.data.copy_(theirs.data[head : head + 1])
        s, c, a = (x[head : head + 1] for x in (state, chain, advantage))
        mean, log_std = (value.detach().clone() for value in one.heads(s))
        old = normal_log_density(c, mean, log_std).sum(-1)
        matrix = Rows(one, 1)
        result = natural_step(
            matrix,
            lambda one=one, s=s, c=c, a=a, old=old: surrogate(
                a, normal_log_density(c, *one.heads(s)).sum(-1) - old
            ),
            lambda one=one, s=s, m=mean, sd=log_std: gaussian_kl(m, sd, *one.heads(s)).sum(-1).mean(1),
            **(OPTIONS | {"iterations": 10}),
        )
        single.append((matrix.data[0], result))
    result = natural_step(rows, objective, divergence, **(OPTIONS | {"iterations": 10}))
    for head, (data, alone) in enumerate(single):
        assert (rows.data[head] - data).abs().max() < 1e-8
        for name in ("before", "after", "share", "kl", "quadratic"):
            assert torch.allclose(getattr(result, name)[head], getattr(alone, name)[0], atol=1e-8), name


def test_line_search_refuses_halves_and_checks_kl():
    """One parameter: J = 2 x - c x^2 improves only up to a point, KL = x^2 / 2."""

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))

    def run(curve, kl_scale=1.0, **options):
        module = Scalar()
        rows = Rows(module, 2)
        objective = lambda: (2 * module.x - torch.tensor(curve)[:, None] * module.x.square()).squeeze(1)  # noqa: E731
        flat = lambda: (kl_scale * module.x.square() / 2 + module.x.pow(4) * 100).squeeze(1)  # noqa: E731
        options = {"max_kl": 0.5, "damping": 0.0, "iterations": 5, "backtracks": 4} | options
        return natural_step(rows, objective, flat, **options), rows.data[:, 0]

    # The full step is x = 1 (x^2 / 2 = max_kl), predicted gain 2.
    result, x = run([0.0, 4.0])
    assert result.share.tolist() == [1.0, 0.25]  # 2 - 4 < 0; 1 - 1 = 0 is no gain; 0.5 - 0.25 = 0.25 > 0.05
    assert x.tolist() == [1.0, 0.25]
    result, x = run([0.0, 1000.0])
    assert result.share.tolist() == [1.0, 0.0]
    assert x[1] == 0
    result, x = run([0.0, 1000.0], backtracks=0)
    assert x.tolist() == [1.0, 1.0]
    result, _ = run([0.0, 0.0], check_kl=True)  # x^2 / 2 + 100 x^4 <= 0.5 holds at 1/4 only
    assert result.share.tolist() == [0.25, 0.25]
    assert (result.kl <= 0.5).all()
