"""A linear layer whose weight stays in float32 and whose product runs in the dtype of its input."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt._numbers import check_whole
from tinygpt.errors import ConfigError
from tinygpt.layers._autocast import computed_dtype
from tinygpt.layers._kept import takes_own_backward
from tinygpt.layers._low_precision import low_precision_linear


class Linear(nn.Linear):
    """`x @ weight.T (+ bias)` with a float32 master weight, multiplied in the dtype of `x`.

    The optimizer sees full-precision weights while a bfloat16 input gives a bfloat16 product, without autocast. The
    bfloat16 copy of the weight is not kept for the backward pass, but made again there.
    With [`set_matmul_precision`][tinygpt.layers.set_matmul_precision] it multiplies in eight bits while training.
    The weight starts uniform with standard deviation `in_features ** -0.5`, the bias (off by default) at zero.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether to add a learned bias.
        device: Where to create the parameters.
        dtype: Dtype of the parameters, float32 if not given.

    Raises:
        ConfigError: If a width is not positive.
    """

    matmul_precision: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole(in_features=in_features, out_features=out_features)
        if in_features < 1 or out_features < 1:
            raise ConfigError(f"Linear needs positive widths, got in_features={in_features}, {out_features=}.")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weight uniformly with standard deviation `in_features ** -0.5`; zero the bias."""
        uniform_with_std_(self.weight, self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis: `(..., in_features)` -> `(..., out_features)` in the dtype of `x`."""
        if self.matmul_precision is not None and self.training:
            y = low_precision_linear(x, self.weight, self.matmul_precision)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.dtype == computed_dtype(x) != self.weight.dtype and bias is None and takes_own_backward():
            product: Tensor = _CastLinear.apply(x, self.weight)
            return product
        return F.linear(x, self.weight.to(x.dtype), bias)


class _CastLinear(torch.autograd.Function):
    """`x @ weight.T` in the dtype of `x`, for which the weight is kept as it is and cast a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return grad_x, grad_weight


def uniform_with_std_(tensor: Tensor, std: float) -> None:
    """Fill in place from the uniform distribution around zero with this standard deviation."""
    bound = 3**0.5 * std
    nn.init.uniform_(tensor, -bound, bound)
