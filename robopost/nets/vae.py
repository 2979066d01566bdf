# SPDX-License-Identifier: Apache-2.0
"""A conditional variational auto-encoder of actions: q(z|s, a) and p(a|s, z), both perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets import fused
from robopost.nets.ensemble import EnsembleMLP
from robopost.nets.value import ObsConcat

LOG_STD = (-4.0, 15.0)  # clamp of the encoder's output: numerical stability


class ActionVAE(nn.Module):
    """Encodes an action given the observation and decodes it back; everything in normalised units.

    The encoder is N(mean, std^2) with a diagonal covariance, the decoder ends in tanh. Mean and log std are
    one linear layer, which is the same as two side by side.

    Args:
        spec: shapes of the task.
        keys: observation keys of the policy; the float ones are used.
        hidden: hidden layer sizes of the encoder and of the decoder, ReLU between.
        latent: size L of the latent vector.
        history: observations stacked by the policy.
    """

    def __init__(
        self, spec: Spec, keys: Sequence[str], hidden: Sequence[int], latent: int, *, history: int = 1
    ) -> None:
        super().__init__()
        if latent < 1:
            raise ConfigError(f"latent size {latent} of an auto-encoder must be at least 1")
        self.latent = latent
        self.join = ObsConcat(spec, keys, history)
        # Ensembles of one: their (in, out) weights make a forward pass an eighth faster on CPU at this size.
        self.encoder = EnsembleMLP(1, self.join.dim + spec.action_dim, hidden, 2 * latent)
        self.decoder = EnsembleMLP(1, self.join.dim + latent, hidden, spec.action_dim)

    def forward(
        self,
        obs: Obs,
        action: Tensor,
        noise: Tensor,
        *,
        frozen: bool = False,
        needed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw one latent vector by reparameterisation, decode.

        Args:
            obs: normalised observations.
            action: (B, A) normalised.
            noise: (B, L) standard normal.
            frozen: gradient to `action` alone: a policy gradient needs none of the weights'.
            needed: (B,) bool, rows whose decoded action is wanted; that of others may be 0.

        Returns:
            (decoded action (B, A) in (-1, 1), mean (B, L), log_std (B, L)).
        """
        state = self.join(obs)
        code = _apply(self.encoder, torch.cat([state, action], -1), frozen)
        mean, log_std = code.chunk(2, -1)
        log_std = log_std.clamp(*LOG_STD)
        latent = torch.addcmul(mean, log_std.exp(), noise)
        x = torch.cat([state, latent], -1)
        rows = None if needed is None else fused.kept_rows(self.decoder, x, needed)
        if rows is None:
            return _apply(self.decoder, x, frozen).tanh(), mean, log_std
        part = _apply(self.decoder, x.index_select(0, rows), frozen).tanh()
        return part.new_zeros(len(x), part.shape[1]).index_copy(0, rows, part), mean, log_std

    def decode(self, obs: Obs, latent: Tensor) -> Tensor:
        """Actions (B, A) of latent vectors (B, L); draws from the prior where those are standard normal."""
        return self.decoder(torch.cat([self.join(obs), latent], -1))[0].tanh()


def kl_divergence(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), averaged over batch and latent dimensions (Kingma and Welling 2014, app.
    B).

    The sum over latent dimensions is the usual form; the average is A2PR's and BCQ's code.
    """
    return -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()


def _apply(net: EnsembleMLP, x: Tensor, frozen: bool) -> Tensor:
    if not frozen:
        return net(x)[0]
    weights = {name: value.detach() for name, value in net.named_parameters()}
    if fused.usable(net, x):
        return fused.mlp(net, x, list(weights.values()))[0]
    return torch.func.functional_call(net, weights, (x,))[0]
