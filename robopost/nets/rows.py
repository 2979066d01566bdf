# SPDX-License-Identifier: Apache-2.0
"""Stacked networks with one row of a matrix per member: dot products, steps and Adam of a member are those of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError
from robopost.nets.ensemble import EnsembleLinear, EnsembleMLP
from robopost.nets.flat import fused_adam
from robopost.nets.mlp import check_sizes


class Rows:
    """Makes the trainable parameters of `module` views of one matrix `data` (G, P), a row per member.

    Parameters keep their identity, names and shapes, as with `robopost.nets.flat.Flat`, and the same warning applies:
    build the module on its device first.

    Args:
        module: with G > 1 every parameter's first dimension is the member.
        members: G.

    Attributes:
        params: the trainable parameters, in module order.
        data: (G, P) the memory all of them share.

    Raises:
        ConfigError: a parameter isn't stacked, or there is none.
    """

    def __init__(self, module: nn.Module, members: int = 1) -> None:
        self.members = members
        self.params = [p for p in module.parameters() if p.requires_grad]
        wrong = [tuple(p.shape) for p in self.params if members > 1 and p.shape[:1] != (members,)]
        if wrong or not self.params:
            found = f"a parameter of shape {wrong[0]}" if wrong else "no trainable parameters"
            raise ConfigError(f"{type(module).__name__} has {found}, {members} stacked members were expected")
        self.data = self.join([p.detach() for p in self.params])
        offset = 0
        for p in self.params:
            size = p.numel() // members
            part = self.data[:, offset : offset + size]
            p.data = part.view(p.shape) if members > 1 else part[0].view(p.shape)
            offset += size

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped as the parameters, e.g. gradients, as a matrix (G, P)."""
        return torch.cat([tensor.reshape(self.members, -1) for tensor in tensors], 1)

    def set(self, data: Tensor) -> None:
        """Write all parameters from (G, P)."""
        with torch.no_grad():
            self.data.copy_(data)


class Regression:
    """Fits the members of a stacked tanh perceptron one after another, in closed form.

    A step of a small network is all overhead: the graph of the loss has dozens of nodes, an optimiser over six
    parameters dozens more. Here gradients are written where one fused Adam over a row reads them, a column of ones
    beside each layer's input makes weight and bias one product, and tanh(z) = 2 sigmoid(2 z) - 1, which torch
    evaluates in a seventh of the time on CPUs (the same to 2e-7).

    Args:
        net: tanh between its layers, one output per member.
    """

    def __init__(self, net: EnsembleMLP) -> None:
        self.rows = Rows(net, net.members)
        data = self.rows.data
        self._grad = torch.zeros_like(data[0])
        self._moments = torch.zeros(2, data.shape[1], device=data.device, dtype=data.dtype)
        self._counts = torch.zeros(0).unbind()  # 1, 2, ..: Adam's step numbers
        linears = [layer for layer in net if isinstance(layer, EnsembleLinear)]
        self._layers = [(layer.weight.detach(), layer.bias.detach()) for layer in linears]
        # A row holds weight (in, out), then bias (1, out), layer after layer: together (in + 1, out).
        self._grads: list[Tensor] = []
        offset = 0
        for weight, _ in self._layers:
            shape = (weight.shape[1] + 1, weight.shape[2])
            self._grads.append(self._grad[offset : offset + shape[0] * shape[1]].view(shape))
            offset += shape[0] * shape[1]

    @torch.no_grad()
    @torch.compiler.disable()
    def fit(
        self,
        member: int,
        x: Tensor,
        target: Tensor,
        weight: Tensor,
        *,
        steps: int,
        lr: float,
        pick: Tensor | None = None,
    ) -> Tensor:
        """Minimise sum_i weight_i (f(x_i) - target_i)^2 over the member's parameters; Adam begins afresh.

        Args:
            member: which one.
            x: (B, in).
            target: (B, 1).
            weight: (B, 1), or (b, 1) with `pick`.
            steps: of Adam.
            lr: its learning rate.
            pick: (steps, b) rows of each step's minibatch, None = all rows at every step.

        Returns:
            F(x) - target before the last step: (B, 1), of a minibatch (b, 1).
        """
        if len(self._counts) < steps:
            self._counts = torch.arange(1.0, steps + 1, device=x.device).unbind()
        row = self.rows.data[member]
        moments = (self._moments[0].zero_(), self._moments[1].zero_())
        layers = [(w[member], b[member]) for w, b in self._layers]
        rows = len(x) if pick is None else pick.shape[1]
        work = _Workspace(layers, self._grads, x, rows)
        twice, residual, goal = 2 * weight, target, target
        for step in range(steps):
            if pick is not None:
                work.inputs[0][:, :-1] = x[pick[step]]
                goal = target[pick[step]]
            residual = work.backward(goal, twice)
            fused_adam(row, self._grad, moments, self._counts[step], lr)
        return residual

    def predict(self, member: int, x: Tensor) -> Tensor:
        """Outputs of one member: (B, in) to (B, 1), without gradients."""
        hidden = x
        for weight, bias in self._layers[:-1]:
            hidden = tanh_(torch.addmm(bias[member], hidden, weight[member]))
        return torch.addmm(self._layers[-1][1][member], hidden, self._layers[-1][0][member])


class _Workspace:
    """Buffers and views of one fit; its gradients go where `grads` lie."""

    def __init__(
        self, layers: list[tuple[Tensor, Tensor]], grads: list[Tensor], x: Tensor, rows: int
    ) -> None:
        ones = lambda width: torch.ones(rows, width + 1, device=x.device, dtype=x.dtype)  # noqa: E731
        self.layers, self.grads = layers, grads
        self.inputs = [ones(weight.shape[0]) for weight, _ in layers]
        if rows == len(x):
            self.inputs[0][:, :-1] = x
        self.minus_one = torch.full((), -1.0, device=x.device, dtype=x.dtype)
        # Python that makes a view takes as long as a small kernel: all views are made once.
        self.hidden = [inputs[:, :-1] for inputs in self.inputs]
        self.turned = [inputs.t() for inputs in self.inputs]
        self.back = [weight.t() for weight, _ in layers]

    def backward(self, target: Tensor, twice: Tensor) -> Tensor:
        """Write the gradient of the weighted squares; returns the residual (b, 1)."""
        layers, hidden = self.layers, self.hidden
        for index, (weight, bias) in enumerate(layers[:-1]):
            doubled = torch.addmm(bias, hidden[index], weight, beta=2, alpha=2)
            torch.add(self.minus_one, doubled.sigmoid_(), alpha=2, out=hidden[index + 1])
        weight, bias = layers[-1]
        residual = torch.addmm(bias, hidden[-1], weight).sub_(target)
        flow = residual * twice
        for index in range(len(layers) - 1, -1, -1):
            torch.mm(self.turned[index], flow, out=self.grads[index])
            if index:
                flow = torch.ops.aten.tanh_backward(flow @ self.back[index], hidden[index])
        return residual


def tanh_(x: Tensor) -> Tensor:
    """Tanh in place, see `Regression`."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class StackedQ(nn.Module):
    """G critics Q_g(x, a) with tanh layers and stacked weights, evaluated for all members at once.

    Args:
        members: G.
        in_dim: size of x.
        action_dim: size of a.
        hidden: layer sizes.
        head_scale: the output layer's initial weights are multiplied by it, its bias starts at 0.
    """

    def __init__(
        self, members: int, in_dim: int, action_dim: int, hidden: Sequence[int], head_scale: float = 0.1
    ) -> None:
        super().__init__()
        check_sizes(hidden)
        self.in_dim = in_dim
        self.net = EnsembleMLP(members, in_dim + action_dim, hidden, 1, "tanh")
        scale_head(self.net, head_scale)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        """Pairs x (G, B, D) and actions (G, B, A) to (G, B)."""
        return self.net(torch.cat([x, action], -1)).squeeze(-1)

    @torch.no_grad()
    def many(self, x: Tensor, actions: Tensor) -> Tensor:
        """Several actions (G, B, n, A) for each x (G, B, D), without gradients: (G, B, n).

        What x contributes to the first layer is computed once.
        """
        linears = [layer for layer in self.net if isinstance(layer, EnsembleLinear)]
        weight, bias = linears[0].weight, linears[0].bias
        fixed = torch.baddbmm(bias, x, weight[:, : self.in_dim])
        moving = torch.bmm(actions.flatten(1, 2), weight[:, self.in_dim :])
        hidden = moving.unflatten(1, actions.shape[1:3]) + fixed.unsqueeze(2)
        hidden = hidden.flatten(1, 2)
        for layer in linears[1:]:
            hidden = torch.baddbmm(layer.bias, tanh_(hidden), layer.weight)
        return hidden.unflatten(1, actions.shape[1:3]).squeeze(-1)


def scale_head(net: EnsembleMLP, scale: float) -> None:
    """Shrink the output layer's weights and set its bias to 0."""
    head = net[len(net) - 1]
    assert isinstance(head, EnsembleLinear)
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.zero_()
