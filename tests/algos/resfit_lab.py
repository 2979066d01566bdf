# SPDX-License-Identifier: Apache-2.0
"""Small base policies and algorithms of the ResFiT tests."""

import torch
from torch import nn

from robopost.algos.online.resfit import ResFiT, ResFiTConfig
from robopost.artefacts.checkpoint import policy_files, save_folder
from robopost.data.batch import Batch, Spec
from robopost.policies.base import Policy
from robopost.policies.flow import Flow, FlowConfig
from robopost.policies.residual import BASE_ACTION, ResidualConfig, ResidualPolicy

SPEC = Spec({"state": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0), 50)
PIXELS = Spec({"state": ((3,), "float32"), "image": ((16, 16, 3), "uint8")}, 2, (-1.0,) * 2, (1.0,) * 2, 50)


def save_base(folder, spec=SPEC, **options):
    """An untrained flow policy with chunks of 4, saved; returns its path as a word."""
    torch.manual_seed(0)
    base = Flow(FlowConfig(**{"horizon": 4, "steps": 2, "width": 16, "depth": 1} | options), spec)
    save_folder(folder, policy_files(base))
    return str(folder)


def residual(base, spec=SPEC, config=ResidualConfig, cls=ResidualPolicy, **options):
    torch.manual_seed(1)
    return cls(config(base=base, **{"hidden": [16], "scale": 0.3} | options), spec)


def make(policy, seed=0, **config) -> ResFiT:
    torch.manual_seed(seed)
    config = {"hidden": [16, 16], "critic_warmup": 0} | config
    return ResFiT(
        ResFiTConfig(**config),
        policy,
        policy.spec,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(seed + 100),
    )


def make_batch(spec, size=16, seed=0) -> Batch:
    """Random transitions of a residual policy's `spec`, normalised."""
    g = torch.Generator().manual_seed(seed)

    def obs():
        out = {}
        for key, (shape, dtype) in spec.obs.items():
            if dtype == "uint8":
                out[key] = torch.randint(0, 256, (size, *shape), generator=g, dtype=torch.uint8)
            elif key == BASE_ACTION:
                out[key] = torch.rand(size, *shape, generator=g) * 2 - 1
            else:
                out[key] = torch.randn(size, *shape, generator=g)
        return out

    terminated = torch.rand(size, generator=g) < 0.2
    return Batch(
        obs=obs(),
        action=torch.rand(size, spec.action_dim, generator=g) * 2 - 1,
        reward=torch.rand(size, generator=g),
        next_obs=obs(),
        terminated=terminated,
        truncated=torch.zeros(size, dtype=torch.bool),
        discount=torch.where(terminated, 0.0, 0.97),
    )


def randomise(policy: Policy, std=10.0):
    """Any training: weights of the correction at random."""
    for parameter in policy.net.parameters():
        torch.nn.init.normal_(parameter, std=std)


def plain(net, member=None):
    layers = []
    for layer in net:
        if not hasattr(layer, "weight"):
            layers.append(nn.ReLU())
            continue
        weight = layer.weight.detach() if member is None else layer.weight.detach()[member].t()
        bias = layer.bias.detach() if member is None else layer.bias.detach()[member, 0]
        layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        layers[-1].weight.data.copy_(weight)
        layers[-1].bias.data.copy_(bias)
    return nn.Sequential(*layers)


def step_plain(optimizer, loss, norm):
    optimizer.zero_grad()
    loss.backward()
    # Parameters of others have gradients too: the actor's loss runs through the critics.
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(mine, norm)
    optimizer.step()


def blend(old, new, tau):
    for a, b in zip(old.parameters(), new.parameters(), strict=True):
        a.data.mul_(1 - tau).add_(tau * b.data)


def same(net, other, member=None):
    for ours, theirs in zip(plain(net, member).parameters(), other.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5
