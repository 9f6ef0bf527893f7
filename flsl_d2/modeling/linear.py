"""Linear layers and the MLP of a block: who multiplies, and what is kept for the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

__all__ = ["Linear", "Mlp", "linear"]

# What torch.compile puts in the place of linear layers on CPUs, where weights are constant.
_OVERLOADS = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_ONEDNN = _OVERLOADS and _OVERLOADS.default

# Below this many multiplications the calls cost more than the products gain.
_MIN_TERMS = 2**27

# For the product of a weight's gradient oneDNN transposes the gradient of the output first, which
# pays where each of its numbers is multiplied with this many of the input.
_MIN_WIDTH = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, onednn: bool = True) -> Tensor:
    """``F.linear``; on a CPU in fp32 by oneDNN, equal up to rounding.

    PyTorch leaves these products to MKL, which on AMD's processors is the slower one.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        onednn: False for what PyTorch takes by itself. It is also taken where
            ``torch.backends.mkldnn.flags(enabled=False)`` says so, and for small products.
    """
    if not (onednn and _onednn_can(x, weight)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """``F.gelu(linear(...))``, in one go where oneDNN multiplies and no gradient is wanted."""
    if torch.is_grad_enabled() or not (onednn and _onednn_can(x, weight)):
        return F.gelu(linear(x, weight, bias, onednn))
    return _product(x, weight, bias, "gelu")


def _weight_gradient(gradient: Tensor, x: Tensor, onednn: bool = True) -> Tensor:
    """(T, out) and (T, in) to (out, in)."""
    if x.shape[1] >= _MIN_WIDTH:
        return linear(gradient.T, x.T, onednn=onednn)
    return gradient.T @ x


def _onednn_can(x: Tensor, weight: Tensor) -> bool:
    return (
        # Exporters and counters of operations know linear layers and not oneDNN's.
        not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and _ONEDNN is not None  # builds of PyTorch differ
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and x.numel() * len(weight) >= _MIN_TERMS
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.flsl_d2.onednn_linear(x, weight, bias, then)
    return _by_onednn(x, weight, bias, then)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    return _ONEDNN(x, weight, bias, then, [], "none")


# The compiler has rules of its own for oneDNN's operator, which take constant weights only.
_library = torch.library.Library("flsl_d2", "DEF")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, str then) -> Tensor")
_library.impl("onednn_linear", _by_onednn, "CPU")


@torch.library.register_fake("flsl_d2::onednn_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


if _ONEDNN is not None:

    @register_flop_formula(_OVERLOADS)
    def _flops(x: tuple, weight: tuple, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.T) if of_x else None,
            _weight_gradient(rows, x.flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies by :func:`linear`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        onednn: see :func:`linear`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, onednn: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.onednn = onednn

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias, self.onednn)


class Mlp(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: width of input and output.
        hidden_dim: width between the two.
        recompute_gelu: in training, keep the hidden layer for the backward pass once, before the
            GELU, and apply the GELU again there.
        onednn: see :func:`linear`.
    """

    def __init__(
        self, dim: int, hidden_dim: int, recompute_gelu: bool = True, onednn: bool = True
    ) -> None:
        super().__init__()
        self.recompute_gelu = recompute_gelu
        self.fc1 = Linear(dim, hidden_dim, onednn=onednn)
        self.fc2 = Linear(hidden_dim, dim, onednn=onednn)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        # Compilers choose themselves what to recompute.
        if not (self.recompute_gelu and self.training) or torch.compiler.is_compiling():
            fc1 = self.fc1
            return self.fc2(_linear_gelu(x, fc1.weight, fc1.bias, fc1.onednn))
        hidden = self.fc1(x)
        return _GeluLinear.apply(hidden, self.fc2.weight, self.fc2.bias, self.fc2.onednn)


class _GeluLinear(torch.autograd.Function):
    """GELU and a linear layer that keep their input, and not what is between them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, onednn: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.onednn = onednn
        return linear(F.gelu(hidden), weight, bias, onednn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_weight = _weight_gradient(rows, F.gelu(hidden).flatten(0, -2), ctx.onednn)
        # Under autocast the weight is wider than what it was multiplied with.
        of_gelu = linear(gradient, weight.to(gradient.dtype).T, onednn=ctx.onednn)
        of_hidden = torch.ops.aten.gelu_backward(of_gelu, hidden)
        return of_hidden, of_weight.to(weight.dtype), rows.sum(0, dtype=weight.dtype), None
