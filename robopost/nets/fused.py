# SPDX-License-Identifier: Apache-2.0
"""A faster evaluation of float32 perceptrons on CPUs where MKL is slow.

torch sends float32 matrix products to MKL, which on AMD processors does not use its AVX-512 kernels; oneDNN,
which torch ships as well, does, and takes about half the time at 256 x 256 x 256 (measured on a Zen 5 part).
torch offers those kernels only to its own compiler (`torch.ops.mkldnn._linear_pointwise`), so they are
checked against plain torch before first use and left alone where they are missing or disagree. Everywhere
else, and on a GPU, networks run as written.

The whole perceptron is one autograd node; gradients are the same to float32 rounding.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MIN_WORK = 1 << 21  # multiply-adds of the largest layer below which call overhead dominates
_override: bool | None = None


def force(enabled: bool | None) -> None:
    """Switch the fused path on or off; None = decide by processor. For tests and benchmarks."""
    global _override
    _override = enabled


@functools.cache
def available() -> bool:
    """True when torch's oneDNN linear exists here and agrees with plain torch."""
    try:
        # No random numbers: the check must not move the global generator.
        x, weight = torch.arange(40.0).view(8, 5).sin(), torch.arange(35.0).view(7, 5).cos()
        bias, grad = torch.arange(7.0).sin(), torch.arange(56.0).view(8, 7).sin()
        return bool(
            torch.allclose(_linear(x, weight, bias, "relu"), torch.relu(x @ weight.t() + bias), atol=1e-5)
            and torch.allclose(_linear(x.t(), grad.t(), None, "none"), x.t() @ grad, atol=1e-5)
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


@functools.cache
def preferred() -> bool:
    """True on AMD processors with AVX-512."""
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:4096]
    except OSError:
        return False
    return vendor and torch.backends.cpu.get_cpu_capability() == "AVX512" and available()


def usable(net: nn.Sequential, x: Tensor) -> bool:
    """True when `net` is a ReLU perceptron, large enough, and `x` is (B, in) float32 on CPU."""
    if x.dim() != 2 or x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if not (preferred() if _override is None else _override and available()):
        return False
    layers = list(net._modules.values())
    # Linear layers alternate with ReLUs: a LayerNorm would stand where a ReLU should.
    if len(layers) % 2 == 0 or not all(isinstance(layer, nn.ReLU) for layer in layers[1::2]):
        return False
    weights = [layer.weight for layer in layers[::2] if isinstance(layer.weight, Tensor)]
    return max(w.shape[-2] * w.shape[-1] for w in weights) * x.shape[0] >= MIN_WORK


def mlp(net: nn.Sequential, x: Tensor, weights: list[Tensor] | None = None) -> Tensor:
    """Evaluate a `usable` perceptron: (B, in) -> (B, out), or (E, B, out) for stacked layers.

    Args:
        net: the module.
        x: (B, in).
        weights: replaces its parameters, in their order (a detached tensor gets no gradient).
    """
    return _Perceptron.apply(x, *(net.parameters() if weights is None else weights))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, post: str) -> Tensor:
    """post(x weight^T + bias) with oneDNN, any strides; `post` is "none" or "relu"."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, [], "")


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, post: str = "none") -> Tensor:
    """`_linear` where the product is large; on small ones MKL has the lower overhead."""
    if x.shape[0] * weight.numel() >= MIN_WORK:
        return _linear(x, weight, bias, post)
    out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    return out.relu_() if post == "relu" else out


def _rows(weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per member: weight as (out, in) and bias as (out,)."""
    if weight.dim() == 2:
        return [(weight, bias)]
    return [(w.t(), b.view(-1)) for w, b in zip(weight.unbind(), bias.unbind(), strict=True)]


class _Perceptron(torch.autograd.Function):
    """relu(... relu(x W1 + b1) ...) Wn + bn for every member."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        layers = list(zip(weights[::2], weights[1::2], strict=True))
        members = 1 if weights[0].dim() == 2 else weights[0].shape[0]
        hidden = [x] * members
        saved = []
        for index, (weight, bias) in enumerate(layers):
            post = "relu" if index < len(layers) - 1 else "none"
            rows = _rows(weight, bias)
            hidden = [_dense(h, w, b, post) for h, (w, b) in zip(hidden, rows, strict=True)]
            saved += hidden if post == "relu" else []
        ctx.save_for_backward(x, *weights, *saved)
        ctx.members = members
        return hidden[0] if weights[0].dim() == 2 else torch.stack(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        members, count = ctx.members, len(ctx.needs_input_grad) - 1
        x, *rest = ctx.saved_tensors
        weights, saved = rest[:count], rest[count:]
        grads: list[Tensor | None] = [None] * count
        grad_x: Tensor | None = None
        stacked = weights[0].dim() == 3
        flow = list(grad.unbind()) if stacked else [grad]
        for layer in reversed(range(count // 2)):
            weight, bias = weights[2 * layer], weights[2 * layer + 1]
            inputs = [x] * members if layer == 0 else saved[(layer - 1) * members : layer * members]
            if ctx.needs_input_grad[1 + 2 * layer]:
                if stacked:
                    parts = [_dense(h.t(), g.t()) for h, g in zip(inputs, flow, strict=True)]
                    grads[2 * layer] = torch.stack(parts)
                else:
                    grads[2 * layer] = _dense(flow[0].t(), inputs[0].t())
            if ctx.needs_input_grad[2 + 2 * layer]:
                sums = [g.sum(0) for g in flow]
                grads[2 * layer + 1] = torch.stack(sums).view(bias.shape) if stacked else sums[0]
            if layer == 0 and not ctx.needs_input_grad[0]:
                break
            rows = _rows(weight, bias)
            flow = [_dense(g, w.t()) for g, (w, _) in zip(flow, rows, strict=True)]
            if layer > 0:
                flow = [torch.ops.aten.threshold_backward(g, h, 0) for g, h in zip(flow, inputs, strict=True)]
            else:
                grad_x = flow[0] if members == 1 else torch.stack(flow).sum(0)
        return grad_x, *grads
