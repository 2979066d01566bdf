# SPDX-License-Identifier: Apache-2.0
"""One minibatch of the released ReinFlow and DPPO code, run as it is: loss, backward, both optimisers.

What differs from a run of their agents: no logging, no files, no environment. `einops`, which their image networks
import, is a stand-in. `vectorised=True` replaces one statement of DPPO's loss, the list comprehension over the
minibatch that makes the denoising discounts, by the same numbers from one tensor operation.
"""

import contextlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sides.originals import reference, stub
from torch import Tensor

CHUNK = 4  # steps of a chunk, all executed, as published for Gymnasium tasks
DISCOUNTS = """torch.tensor(
            [
                self.gamma_denoising ** (self.ft_denoising_steps - i - 1)
                for i in denoising_inds
            ]
        ).to(self.device)"""
VECTORISED = "self.gamma_denoising ** (self.ft_denoising_steps - denoising_inds.float() - 1)"


@contextlib.contextmanager
def package(name: str) -> Iterator[None]:
    """Within this context `model` is the package of the clone `name`; both projects call theirs so."""
    folder = str(reference(name))
    sys.path.insert(0, folder)
    for part in ("einops", "einops.layers", "einops.layers.torch"):
        sys.modules.setdefault(part, stub(part, Rearrange=None))
    try:
        yield
    finally:
        sys.path.remove(folder)
        for key in [key for key in sys.modules if key == "model" or key.startswith("model.")]:
            del sys.modules[key]


def critic_of(module: Any, obs: int) -> Any:
    """Their critic, as published for Gymnasium tasks."""
    return module.CriticObs(
        cond_dim=obs, mlp_dims=[256, 256, 256], activation_type="Mish", residual_style=True
    )


def reinflow(obs: int, act: int, width: int, steps: int) -> Any:
    """ReinFlow's model with the published settings for Hopper, noise learned between 0.1 and 0.24."""
    with package("ReinFlow"):
        flow = importlib.import_module("model.flow.mlp_flow")
        critic = critic_of(importlib.import_module("model.common.critic"), obs)
        kind = importlib.import_module("model.flow.ft_ppo.ppoflow").PPOFlow
    net = flow.FlowMLP(
        horizon_steps=CHUNK,
        action_dim=act,
        cond_dim=obs,
        mlp_dims=[width] * 3,
        activation_type="ReLU",
        residual_style=True,
    )
    return kind(
        device="cpu",
        policy=net,
        critic=critic,
        actor_policy_path=None,
        act_dim=act,
        horizon_steps=CHUNK,
        act_min=-1,
        act_max=1,
        obs_dim=obs,
        cond_steps=1,
        noise_scheduler_type="learn_decay",
        inference_steps=steps,
        ft_denoising_steps=steps,
        randn_clip_value=3,
        min_sampling_denoising_std=0.1,
        min_logprob_denoising_std=0.1,
        max_logprob_denoising_std=0.24,
        logprob_min=-1.0,
        logprob_max=1.0,
        clip_ploss_coef=0.01,
        clip_ploss_coef_base=0.01,
        clip_ploss_coef_rate=3,
        clip_vloss_coef=None,
        denoised_clip_value=1.0,
        time_dim_explore=0,
        learn_explore_time_embedding=False,
        use_time_independent_noise=False,
        noise_hidden_dims=[64, 64],
        logprob_debug_sample=False,
        logprob_debug_recalculate=False,
        explore_net_activation_type="Tanh",
    )


def dppo(obs: int, act: int, width: int, steps: int, tuned: int, *, vectorised: bool) -> Any:
    """DPPO's model with the published settings for Hopper."""
    with package("dppo"):
        net = importlib.import_module("model.diffusion.mlp_diffusion").DiffusionMLP(
            action_dim=act,
            horizon_steps=CHUNK,
            cond_dim=obs,
            mlp_dims=[width] * 3,
            activation_type="ReLU",
            residual_style=True,
        )
        module = importlib.import_module("model.diffusion.diffusion_ppo")
        critic = critic_of(importlib.import_module("model.common.critic"), obs)
    kind = module.PPODiffusion
    if vectorised:
        source = textwrap.dedent(inspect.getsource(kind.loss))
        old = textwrap.dedent(DISCOUNTS)
        flat = " ".join(source.split())
        assert " ".join(old.split()) in flat, "the released loss has changed"
        start = source.index("discount = torch.tensor(")
        end = source.index("advantages *= discount")
        space = {**vars(module)}
        exec(source[:start] + f"discount = {VECTORISED}\n    " + source[end:], space)
        kind = type("VectorisedPPODiffusion", (kind,), {"loss": space["loss"]})
    return kind(
        gamma_denoising=0.99,
        clip_ploss_coef=0.01,
        clip_ploss_coef_base=0.01,
        clip_ploss_coef_rate=3,
        randn_clip_value=3,
        min_sampling_denoising_std=0.1,
        min_logprob_denoising_std=0.1,
        actor=net,
        critic=critic,
        ft_denoising_steps=tuned,
        horizon_steps=CHUNK,
        obs_dim=obs,
        action_dim=act,
        denoising_steps=steps,
        device="cpu",
    )


def minibatch(model: Any, rows: dict[str, Tensor], **options: Any) -> Callable[[], None]:
    """A function that does what their agents do with one minibatch: three losses, one backward pass, two steps.

    Args:
        model: from `reinflow` or `dppo`.
        rows: arguments of its `loss` by name.
        options: more of them.
    """
    actor = torch.optim.AdamW(model.actor_ft.parameters(), lr=4.5e-5, weight_decay=0.0)
    critic = torch.optim.AdamW(model.critic.parameters(), lr=6.5e-4, weight_decay=0.0)

    def step() -> None:
        policy, entropy, value, *_ = model.loss(**rows, **options)
        loss = policy + 0.03 * entropy + 0.5 * value
        actor.zero_grad()
        critic.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.actor_ft.parameters(), 1.0)
        actor.step()
        critic.step()

    return step
