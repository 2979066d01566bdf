# SPDX-License-Identifier: Apache-2.0
"""Small token and flow policies, rollouts of whole episodes, and the toy of the card, for tests of distillation."""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

from robopost.algos.vla.opd import VLAOPD, VLAOPDConfig
from robopost.artefacts.checkpoint import policy_files, save_folder
from robopost.data.batch import Batch, Spec
from robopost.policies.flow import Flow, FlowConfig
from robopost.policies.tokens import TokenConfig, TokenMLP, TokenMLPConfig, TokenPolicy

CPU = torch.device("cpu")
SPEC = Spec({"state": ((3,), "float32")}, 2, (-2.0, -1.0), (2.0, 3.0), 40)


def toy():
    """The module of the toy, which lies with the benchmarks."""
    if "token_reach" not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "benchmarks" / "sides" / "token_reach.py"
        found = importlib.util.spec_from_file_location("token_reach", path)
        module = importlib.util.module_from_spec(found)
        sys.modules["token_reach"] = module
        found.loader.exec_module(module)
    return sys.modules["token_reach"]


def make_policy(seed=0, spec=SPEC, spread=1.0, **options):
    """A token policy with random logits, `spread` times as large as at the start of training."""
    torch.manual_seed(seed)
    sizes = {"horizon": 3, "bins": 16, "hidden": [16]}
    policy = TokenMLP(TokenMLPConfig(**sizes | options), spec)
    with torch.no_grad():
        for p in policy.net.parameters():
            p.mul_(spread)
    return policy


class Ordered(TokenPolicy):
    """An autoregressive token policy: every slot also sees the mean of the tokens before it."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.net = nn.Linear(4, config.bins)

    @property
    def autoregressive(self):
        return True

    def logits(self, obs, tokens=None):
        flat = tokens.flatten(1).float() / self.bins
        before = (flat.cumsum(1) - flat) / torch.arange(1, flat.shape[1] + 1)
        seen = obs["state"][:, None].expand(-1, flat.shape[1], -1)
        out = self.net(torch.cat([seen, before[..., None]], -1))
        return out.unflatten(1, (self.horizon, self.spec.action_dim))


def ordered(seed=0):
    torch.manual_seed(seed)
    return Ordered(TokenConfig(name="ordered", horizon=3, bins=16), SPEC)


def make_flow(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"horizon": 3, "steps": 4, "width": 16, "depth": 1, "normalise_action": "bounds"}
    return Flow(FlowConfig(**sizes | options), SPEC)


def save(policy, folder):
    save_folder(folder, policy_files(policy))
    return str(folder)


def make(policy, teacher="", seed=0, cls=VLAOPD, config_cls=VLAOPDConfig, **options):
    """An algorithm on `policy`; `teacher` is a path."""
    options = ({"teacher": teacher} if teacher else {}) | {"batch_size": 100} | options
    generator = torch.Generator().manual_seed(seed + 100)
    return cls(config_cls(**options), policy, policy.spec, device=CPU, generator=generator)


def rollout(policy, decisions=3, episodes=4, seed=0, lengths=None, success=None):
    """A normalised rollout (D, M): episode m executes `lengths[m]` steps of chunks of the policy's horizon."""
    g = torch.Generator().manual_seed(seed)
    horizon, total = policy.horizon, decisions * episodes
    lengths = torch.tensor(lengths or [decisions * horizon] * episodes)
    success = torch.tensor(success or [1.0, 0.0] * (episodes // 2))
    obs = {"state": torch.randn(total, 3, generator=g)}
    chain = torch.randint(policy.bins, (total, 1, horizon, 2), generator=g)
    step = torch.arange(decisions * horizon).view(decisions, 1, horizon)
    empty = torch.zeros(decisions, episodes)
    batch = Batch(
        obs=obs,
        action=policy.decode(chain[:, 0]),
        reward=torch.zeros(total),
        next_obs=obs,
        terminated=torch.zeros(total, dtype=torch.bool),
        truncated=torch.zeros(total, dtype=torch.bool),
        discount=torch.ones(total),
        chain=chain,
    )
    batch = batch.map(lambda tensor: tensor.unflatten(0, (decisions, episodes)))
    mask = step < lengths[None, :, None]
    rows = {"success": success + empty, "return": success + empty}
    return Batch(**{**vars(batch), "chunk_mask": mask, "extra": rows})
