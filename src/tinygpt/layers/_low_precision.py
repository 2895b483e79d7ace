"""Products of a linear layer in eight bits, forward and backward, from masters of full precision.

fp8 is a floating-point number with one factor a tensor, int8 an integer with one factor a row. Both are found anew from
the numbers at hand in every product ("dynamic scaling"), so there is no state to save.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinygpt.layers._autocast import computed_dtype

# Kernels take multiples of 16 and the one for int8 more than 16 rows; rows of zeros are added to reach this.
_ROW_MULTIPLE = 32
# What is smaller counts as zero, so that factors stay far from the largest float32.
_SMALLEST = 1e-30


def low_precision_linear(x: Tensor, weight: Tensor, precision: str) -> Tensor:
    """Return `x @ weight.T` with products in `"fp8"` or `"int8"`: `(..., in)` -> `(..., out)` in the dtype of `x`.

    Under autocast its dtype takes the place of that of `x`, as for `F.linear`.
    """
    flat = x.to(computed_dtype(x)).reshape(-1, x.shape[-1])
    missing = -len(flat) % _ROW_MULTIPLE if len(flat) else _ROW_MULTIPLE
    padded = F.pad(flat, (0, 0, 0, missing)) if missing else flat
    function = _Fp8Linear if precision == "fp8" else _Int8Linear
    y: Tensor = function.apply(padded, weight)  # type: ignore[no-untyped-call]
    return y[: len(flat)].view(*x.shape[:-1], len(weight))


class _Fp8Linear(torch.autograd.Function):
    """All three products in fp8: e4m3 for inputs and weights, e5m2, which has more range, for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight_dtype = weight.dtype
        x8, x_unit = _to_fp8(x, torch.float8_e4m3fn)
        weight8, weight_unit = _to_fp8(weight, torch.float8_e4m3fn)
        # Kept in a byte each, where a product of bfloat16 keeps two.
        ctx.save_for_backward(x8, x_unit, weight8, weight_unit)
        # Sums of the forward product may be rougher: their errors do not add up over steps as those of gradients do.
        return _fp8_product(x8, weight8.t(), x_unit, weight_unit, x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_unit, weight8, weight_unit = ctx.saved_tensors
        grad8, grad_unit = _to_fp8(grad, torch.float8_e5m2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _fp8_product(grad8, _by_columns(weight8), grad_unit, weight_unit, grad.dtype)
        if ctx.needs_input_grad[1]:
            rows = grad8.t().contiguous()
            grad_weight = _fp8_product(rows, _by_columns(x8), grad_unit, x_unit, ctx.weight_dtype)
        return grad_x, grad_weight


def _to_fp8(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `tensor / unit` in an fp8 dtype, by rows, and the unit: the power of two that lets the largest just fit.

    A power of two moves no bits, so each number is rounded once, and no float32 copy is needed.
    """
    if tensor.dtype == torch.float16:  # in which the factor of small gradients would be infinite
        tensor = tensor.float()
    largest = tensor.abs().amax().float().clamp_min(_SMALLEST)
    factor = torch.finfo(dtype).max / largest
    factor = factor.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)  # the exponent alone
    return (tensor * factor).to(dtype).contiguous(), factor.reciprocal()


def _fp8_product(
    a: Tensor, b: Tensor, a_unit: Tensor, b_unit: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """Return `a @ b` times both units; `a` lies in memory by rows and `b` by columns, as the kernel wants."""
    return torch._scaled_mm(a, b, scale_a=a_unit, scale_b=b_unit, out_dtype=dtype, use_fast_accum=fast)


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


class _Int8Linear(torch.autograd.Function):
    """The two products that do not sum over tokens in int8; the gradient of the weight in the dtype of the input.

    Each token and each channel has a factor of its own. A sum over tokens would need one for all of them, and gradients
    of tokens differ in size by far more than the 127 that an int8 can tell apart.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _int8_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _int8_product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = (grad.t() @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` in the dtype of `x`, both rounded to int8 row by row."""
    (x8, x_unit), (weight8, weight_unit) = _to_int8(x), _to_int8(weight)
    return (torch._int_mm(x8, weight8.t()) * x_unit * weight_unit.t()).to(x.dtype)


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return `tensor / unit` as int8 and the unit of each row, `(rows, 1)` float32."""
    unit = tensor.abs().amax(dim=1, keepdim=True).float().clamp_min(_SMALLEST) / 127
    return (tensor / unit).round().to(torch.int8).contiguous(), unit
