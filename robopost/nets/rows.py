# SPDX-License-Identifier: Apache-2.0
"""Stacked networks with one row of a matrix per member: dot products, steps and Adam of a member are those of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError
from robopost.nets.ensemble import EnsembleLinear, EnsembleMLP
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
    parameters dozens more. Here it is one fused Adam over a row, and gradients are written where Adam reads them.

    Args:
        net: tanh between its layers, one output per member.
    """

    def __init__(self, net: EnsembleMLP) -> None:
        self.rows = Rows(net, net.members)
        data = self.rows.data
        self._grad = torch.zeros_like(data[0])
        self._moments = torch.zeros(2, data.shape[1], device=data.device, dtype=data.dtype)
        self._count = torch.zeros((), device=data.device)
        linears = [layer for layer in net if isinstance(layer, EnsembleLinear)]
        self._layers = [(layer.weight.detach(), layer.bias.detach()) for layer in linears]
        self._grads: list[tuple[Tensor, Tensor]] = []
        offset = 0
        for weight, bias in self._layers:
            views = []
            for shape in (weight.shape[1:], bias.shape[1:]):
                size = shape.numel()
                views.append(self._grad[offset : offset + size].view(shape))
                offset += size
            self._grads.append((views[0], views[1]))

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
            weight: (B, 1).
            steps: of Adam.
            lr: its learning rate.
            pick: (steps, b) rows of each step's minibatch, None = all rows at every step.

        Returns:
            (B, 1) f(x) - target before the last step (of a minibatch: of its rows).
        """
        layers = [(w[member], b[member]) for w, b in self._layers]
        row = self.rows.data[member]
        first, second = self._moments[0].zero_(), self._moments[1].zero_()
        self._count.zero_()
        twice = 2 * weight
        residual = target
        rows = (x, target, twice)
        for step in range(steps):
            if pick is not None:
                rows = (x[pick[step]], target[pick[step]], twice[pick[step]])
            residual = self._backward(layers, *rows)
            self._count.add_(1)
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
                [row],
                [self._grad],
                [first],
                [second],
                [],
                [self._count],
                amsgrad=False,
                lr=lr,
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
        return residual

    def predict(self, member: int, x: Tensor) -> Tensor:
        """Outputs of one member: (B, in) to (B, 1), without gradients."""
        hidden = x
        for weight, bias in self._layers[:-1]:
            hidden = torch.addmm(bias[member], hidden, weight[member]).tanh_()
        return torch.addmm(self._layers[-1][1][member], hidden, self._layers[-1][0][member])

    def _backward(
        self, layers: list[tuple[Tensor, Tensor]], x: Tensor, target: Tensor, twice: Tensor
    ) -> Tensor:
        """Write the gradient of the weighted squares; returns the residual."""
        hidden = [x]
        for w, b in layers[:-1]:
            hidden.append(torch.addmm(b, hidden[-1], w).tanh_())
        residual = torch.addmm(layers[-1][1], hidden[-1], layers[-1][0]).sub_(target)
        flow = residual * twice
        for index in reversed(range(len(layers))):
            grad_w, grad_b = self._grads[index]
            torch.mm(hidden[index].t(), flow, out=grad_w)
            torch.sum(flow, 0, keepdim=True, out=grad_b)
            if index:
                flow = torch.ops.aten.tanh_backward(flow @ layers[index][0].t(), hidden[index])
        return residual


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

    def many(self, x: Tensor, actions: Tensor) -> Tensor:
        """Several actions (G, B, n, A) for each x (G, B, D): (G, B, n). What x contributes is computed once."""
        linears = [layer for layer in self.net if isinstance(layer, EnsembleLinear)]
        weight, bias = linears[0].weight, linears[0].bias
        fixed = torch.baddbmm(bias, x, weight[:, : self.in_dim])
        moving = torch.bmm(actions.flatten(1, 2), weight[:, self.in_dim :])
        hidden = moving.unflatten(1, actions.shape[1:3]) + fixed.unsqueeze(2)
        hidden = hidden.flatten(1, 2)
        for layer in linears[1:]:
            hidden = torch.baddbmm(layer.bias, hidden.tanh(), layer.weight)
        return hidden.unflatten(1, actions.shape[1:3]).squeeze(-1)


def scale_head(net: EnsembleMLP, scale: float) -> None:
    """Shrink the output layer's weights and set its bias to 0."""
    head = net[len(net) - 1]
    assert isinstance(head, EnsembleLinear)
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.zero_()
