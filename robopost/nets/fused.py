# SPDX-License-Identifier: Apache-2.0
"""Perceptrons as one autograd node: faster on CPUs where MKL is slow, and for several seeds at once.

torch sends float32 matrix products to MKL, which on AMD processors does not use its AVX-512 kernels; oneDNN,
which torch ships as well, does, and takes about half the time at 256 x 256 x 256 (measured on a Zen 5 part).
torch offers those kernels only to its own compiler (`torch.ops.mkldnn._linear_pointwise`), so they are
checked against plain torch before first use and left alone where they are missing or disagree. Everywhere
else, and on a GPU, networks run as written.

Under `stacked`, where `vectorise` runs over seeds, every ReLU perceptron takes a second path, on any device:
one batched product per layer for all seeds (and all members of an ensemble), instead of the four operations
that vmap would make of it, each with its own overhead and memory.

Gradients are the same to float32 rounding on both paths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robopost.nets.vectorise import escape

MIN_WORK = 1 << 21  # multiply-adds of the largest layer below which call overhead dominates
ROW_STEP = 32  # granularity of the rows that work is restricted to
_override: bool | None = None
_stacked = False


def force(enabled: bool | None) -> None:
    """Switch the fused path on or off; None = decide by processor. For tests and benchmarks."""
    global _override
    _override = enabled


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within this context networks run as written: the fused kernels have no second derivative."""
    before = _override
    force(False)
    try:
        yield
    finally:
        force(before)


@contextmanager
def stacked() -> Iterator[None]:
    """Within this context `vectorise` runs over seeds."""
    global _stacked
    before, _stacked = _stacked, True
    try:
        yield
    finally:
        _stacked = before


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
    """True when `net` is a ReLU perceptron and `x` (B, in), and seeds are stacked or it is large, float32, on CPU."""
    if x.dim() != 2 or not _is_perceptron(net):
        return False
    if _stacked:
        return True
    return _slow_mkl(x) and not torch.compiler.is_compiling() and _large(x.shape[0], parameters(net)[::2])


def _slow_mkl(x: Tensor) -> bool:
    """True where oneDNN is the faster library for products of `x`."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return False
    return preferred() if _override is None else _override and available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in the faster library: x (..., in), weight (out, in), bias (out,) to (..., out)."""
    rows = x.numel() // x.shape[-1]
    if rows * weight.numel() < MIN_WORK or _stacked or torch.compiler.is_compiling() or not _slow_mkl(x):
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1])
    out = (
        _Linear.apply(flat, weight, bias) if torch.is_grad_enabled() else _linear(flat, weight, bias, "none")
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def sequential(net: nn.Module, x: Tensor) -> Tensor:
    """Evaluate `net` with `linear` for its linear layers; without `nn.Module`'s detours, as long as a small layer."""
    for layer in net._modules.values():
        if isinstance(layer, nn.Linear):
            x = linear(x, layer._parameters["weight"], layer._parameters["bias"])  # type: ignore[arg-type]
        elif layer is not None:
            x = layer.forward(x)
    return x


def parameters(net: nn.Sequential) -> list[Any]:
    """Weight and bias of each layer of a perceptron; `net.parameters()` takes as long as a small matrix product."""
    layers = [layer._parameters for layer in list(net._modules.values())[::2] if layer is not None]
    return [layer[name] for layer in layers for name in ("weight", "bias")]


def _is_perceptron(net: nn.Sequential) -> bool:
    """True where linear layers alternate with ReLUs: a LayerNorm would stand where a ReLU should."""
    layers = list(net._modules.values())
    return len(layers) % 2 == 1 and all(isinstance(layer, nn.ReLU) for layer in layers[1::2])


def _large(rows: int, weights: list[Tensor]) -> bool:
    return max(w.shape[-2] * w.shape[-1] for w in weights) * rows >= MIN_WORK


def mlp(net: nn.Sequential, x: Tensor, weights: list[Tensor] | None = None) -> Tensor:
    """Evaluate a `usable` perceptron: (B, in) -> (B, out), or (E, B, out) for stacked layers.

    Args:
        net: the module.
        x: (B, in).
        weights: replaces its parameters, in their order (a detached tensor gets no gradient).
    """
    parts = parameters(net) if weights is None else weights
    if _stacked:
        return escape(_seeds, x, *parts)
    return _Perceptron.apply(x, *parts) if torch.is_grad_enabled() else _evaluate(x, parts)[0]


def kept_rows(net: nn.Sequential, x: Tensor, mask: Tensor) -> Tensor | None:
    """Indices (K,) that hold every row that `mask` (B,) keeps, where evaluating `net` on these alone saves work.

    None where it doesn't, and where the number of rows has to stay: on a GPU, when compiling or stacking seeds.
    """
    return None if _stacked or not usable(net, x) else _kept(mask)


def _kept(mask: Tensor) -> Tensor | None:
    """Their number is rounded up: oneDNN builds a kernel for every new shape, which takes milliseconds."""
    count = -(-int(mask.sum()) // ROW_STEP) * ROW_STEP
    return mask.argsort(descending=True, stable=True)[:count] if count < mask.shape[0] else None


def _with_gradient(grad: Tensor) -> Tensor | None:
    """`_kept` of the rows where a gradient isn't zero."""
    if int(grad.count_nonzero()) > (grad.shape[0] - ROW_STEP) * grad.shape[1]:
        return None  # too few rows of zeros, without a look at each
    return _kept(grad.any(-1))


def _seeds(x: Tensor, *weights: Tensor) -> Tensor:
    """The perceptrons of all seeds: x (N, B, in), weights (N, ...) -> (N, B, out) or (N, E, B, out)."""
    if _slow_mkl(x) and _large(x.shape[1], list(weights[::2])):
        rows = zip(x.unbind(), *(weight.unbind() for weight in weights), strict=True)
        return torch.stack([_Perceptron.apply(*row) for row in rows])
    return _Stacked.apply(x, *weights)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, post: str) -> Tensor:
    """post(x weight^T + bias) with oneDNN, any strides; `post` is "none" or "relu"."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post, [], "")


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, post: str = "none") -> Tensor:
    """`_linear` where the product is large; on small ones MKL has the lower overhead."""
    if x.shape[0] * weight.shape[0] * weight.shape[1] >= MIN_WORK:
        return _linear(x, weight, bias, post)
    out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    return out.relu_() if post == "relu" else out


def _product(grad: Tensor, inputs: Tensor) -> Tensor:
    """grad^T inputs (out, in). oneDNN copies its first factor where that is transposed: the narrower one."""
    if inputs.shape[1] < grad.shape[1]:
        return _dense(inputs.t(), grad.t()).t()
    return _dense(grad.t(), inputs.t())


def _matrices(weight: Tensor) -> Sequence[Tensor]:
    """Per member: weight as (out, in)."""
    return [weight] if weight.dim() == 2 else weight.mT.unbind()


def _evaluate(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Output of a perceptron, and what every hidden layer gave to each member."""
    stacked = weights[0].dim() == 3
    hidden = [x] * (weights[0].shape[0] if stacked else 1)
    saved: list[Tensor] = []
    for index in range(0, len(weights), 2):
        last = index == len(weights) - 2
        matrices, bias = _matrices(weights[index]), weights[index + 1]
        biases = bias.flatten(1).unbind() if stacked else [bias]
        layer = zip(hidden, matrices, biases, strict=True)
        hidden = [_dense(h, w, b, "none" if last else "relu") for h, w, b in layer]
        if not last:
            saved += hidden
    return torch.stack(hidden) if stacked else hidden[0], saved


def residual(blocks: nn.ModuleList, out: nn.Sequential, h: Tensor) -> Tensor | None:
    """Blocks [ReLU, linear, ReLU, linear] with skips, then [ReLU, linear], h (..., width) to (..., out).

    None where the layers are others, or plain torch is no slower.
    """
    rows = h.numel() // h.shape[-1]
    if _stacked or torch.compiler.is_compiling() or not _slow_mkl(h) or not _plain(blocks, out):
        return None
    weights: list[Tensor] = [*blocks.parameters(), *out.parameters()]
    if not _large(rows, weights[::2]):
        return None
    flat = h.reshape(rows, h.shape[-1])
    return _Residual.apply(flat, *weights).view(*h.shape[:-1], -1)


def _plain(blocks: nn.ModuleList, out: nn.Sequential) -> bool:
    kinds = [[type(layer) for layer in net.children()] for net in (*blocks, out)]
    return all(
        kind == [nn.ReLU, nn.Linear] * (2 if net < len(blocks) else 1) for net, kind in enumerate(kinds)
    )


class _Linear(torch.autograd.Function):
    """x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias, "none")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _dense(grad, weight.t()) if of_x else None,
            _product(grad, x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


class _Residual(torch.autograd.Function):
    """h + W2 relu(W1 relu(h)) of every block, then Wo relu(h): x (B, width) to (B, out)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, *weights: Tensor) -> Tensor:
        saved: list[Tensor] = []
        for index in range(0, len(weights) - 2, 4):
            w1, b1, w2, b2 = weights[index : index + 4]
            a = h.relu()
            z = _dense(a, w1, b1, "relu")
            h = _dense(z, w2, b2).add_(h)
            saved += [a, z]
        a = h.relu_() if weights[:-2] else h.relu()
        ctx.save_for_backward(*weights, *saved, a)
        return _dense(a, weights[-2], weights[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 1
        weights, saved = ctx.saved_tensors[:count], list(ctx.saved_tensors[count:])
        grads: list[Tensor | None] = [None] * count

        def pull(flow: Tensor, layer: int, inputs: Tensor) -> Tensor:
            """Gradients of linear layer `layer`, and of its input before the ReLU that made it."""
            if ctx.needs_input_grad[1 + 2 * layer]:
                grads[2 * layer] = _product(flow, inputs)
                grads[2 * layer + 1] = flow.sum(0)
            flow = _dense(flow, weights[2 * layer].t())
            return torch.ops.aten.threshold_backward.grad_input(flow, inputs, 0, grad_input=flow)

        last = count // 2 - 1
        flow = pull(grad, last, saved.pop())
        for layer in reversed(range(0, last, 2)):
            z, a = saved.pop(), saved.pop()
            flow = flow + pull(pull(flow, layer + 1, z), layer, a)
        return flow, *grads


class _Perceptron(torch.autograd.Function):
    """relu(... relu(x W1 + b1) ...) Wn + bn for every member."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        out, saved = _evaluate(x, weights)
        ctx.save_for_backward(x, *weights, *saved)
        ctx.members = 1 if weights[0].dim() == 2 else weights[0].shape[0]
        return out

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
        rows = _with_gradient(flow[0]) if members == 1 else None
        if rows is not None:
            batch = x.shape[0]
            x, flow[0], *saved = (tensor.index_select(0, rows) for tensor in (x, flow[0], *saved))
        for layer in reversed(range(count // 2)):
            weight, bias = weights[2 * layer], weights[2 * layer + 1]
            inputs = [x] * members if layer == 0 else saved[(layer - 1) * members : layer * members]
            if ctx.needs_input_grad[1 + 2 * layer]:
                if stacked:
                    parts = [_product(h, g) for h, g in zip(inputs, flow, strict=True)]
                    grads[2 * layer] = torch.stack(parts) if members > 1 else parts[0].unsqueeze(0)
                else:
                    grads[2 * layer] = _product(flow[0], inputs[0])
            if ctx.needs_input_grad[2 + 2 * layer]:
                sums = [g.sum(0) for g in flow]
                grads[2 * layer + 1] = torch.stack(sums).view(bias.shape) if stacked else sums[0]
            if layer == 0 and not ctx.needs_input_grad[0]:
                break
            flow = [_dense(g, w.t()) for g, w in zip(flow, _matrices(weight), strict=True)]
            if layer > 0:
                for g, h in zip(flow, inputs, strict=True):
                    torch.ops.aten.threshold_backward.grad_input(g, h, 0, grad_input=g)
            else:
                grad_x = flow[0] if members == 1 else torch.stack(flow).sum(0)
                if rows is not None:
                    grad_x = grad_x.new_zeros(batch, grad_x.shape[1]).index_copy_(0, rows, grad_x)
        return grad_x, *grads


class _Stacked(torch.autograd.Function):
    """`_Perceptron` for N seeds, of E members each or one, with batched products over all N * E."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        members = weights[0].shape[1] if weights[0].dim() == 4 else 0
        hidden = x.unsqueeze(1).expand(-1, members, -1, -1).flatten(0, 1) if members else x
        saved = [hidden]
        for index in range(0, len(weights), 2):
            matrix, bias = _batched(weights[index], weights[index + 1])
            hidden = torch.baddbmm(bias, hidden, matrix)
            if index < len(weights) - 2:
                saved.append(hidden.relu_())
        ctx.save_for_backward(*weights, *saved)
        ctx.members = members
        return hidden.unflatten(0, (-1, members)) if members else hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 1
        weights, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grads: list[Tensor | None] = [None] * count
        flow = grad.flatten(0, 1) if ctx.members else grad
        for layer in reversed(range(count // 2)):
            weight, bias, inputs = weights[2 * layer], weights[2 * layer + 1], saved[layer]
            if ctx.needs_input_grad[1 + 2 * layer]:
                product = torch.bmm(inputs.mT, flow) if ctx.members else torch.bmm(flow.mT, inputs)
                grads[2 * layer] = product.view(weight.shape)
            if ctx.needs_input_grad[2 + 2 * layer]:
                grads[2 * layer + 1] = flow.sum(1).view(bias.shape)
            if layer == 0 and not ctx.needs_input_grad[0]:
                return None, *grads
            flow = torch.bmm(flow, _batched(weight, bias)[0].mT)
            if layer > 0:
                torch.ops.aten.threshold_backward.grad_input(flow, inputs, 0, grad_input=flow)
        return flow.unflatten(0, (-1, ctx.members)).sum(1) if ctx.members else flow, *grads


def _batched(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of all seeds and members: weight as (G, in, out) and bias as (G, 1, out)."""
    if weight.dim() == 3:
        return weight.mT, bias.unsqueeze(1)
    return weight.flatten(0, 1), bias.flatten(0, 1)
