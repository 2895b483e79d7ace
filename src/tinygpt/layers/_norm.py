"""Root-mean-square normalization."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt._numbers import check_real, check_whole, given
from tinygpt.errors import ConfigError
from tinygpt.layers._kept import (
    computes_plainly,
    made_again,
    others_choose_what_is_kept,
    takes_own_backward,
)
from tinygpt.layers._memory import empty_with_room

_LARGE = 2**20  # bytes; what is smaller is sooner kept than looked at


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps)` over the last axis, without a learned weight unless asked for.

    Without a weight the result is kept for the backward pass and not the input: whatever multiplies the result keeps it
    anyway, so the norm costs no memory. To change that result in place is an error in the backward pass.

    Args:
        dim: Width of the last axis.
        weight: Whether to multiply by a learned weight, which starts at one.
        eps: Added under the root; `None` takes the machine epsilon of the dtype, as torch does.

    Raises:
        ConfigError: If `dim` is not positive.

    References:
        Zhang and Sennrich, [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467), 2019.
        Without weight as in nanochat.
    """

    def __init__(self, dim: int, *, weight: bool = False, eps: float | None = None) -> None:
        super().__init__()
        check_whole(dim=dim)
        check_real(**given(eps=eps))
        if dim < 1:
            raise ConfigError(f"RMSNorm needs a positive dim, got {dim}.")
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim)) if weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the learned weight, if there is one, to ones."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis: `(..., dim)` -> same shape and dtype."""
        if self.weight is None:
            return rms_norm(x, eps=self.eps)
        return _norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, weight={self.weight is not None}"


def rms_norm(x: Tensor, *, eps: float | None = None) -> Tensor:
    """Return what `F.rms_norm` returns over the last axis, to the bit, and keep the result for the backward pass."""
    if x.requires_grad and not x.is_nested and takes_own_backward():
        normed: Tensor = _RMSNorm.apply(x, eps, False)[0]  # type: ignore[no-untyped-call]
        return normed
    return _norm(x, None, eps)


def rms_norm_(x: Tensor, *, eps: float | None = None) -> Tensor:
    """Return `rms_norm`, in the memory of `x` where that saves some; only for what nobody else reads."""
    if x.requires_grad and not _has_kernel(x) and takes_own_backward() and not others_choose_what_is_kept():
        normed: Tensor = _RMSNorm.apply(x, eps, True)[0]  # type: ignore[no-untyped-call]
        return normed
    return rms_norm(x, eps=eps)


def may_be_made_again(x: Tensor) -> bool:
    """Return whether a result of this size pays for being made again, and others let it be."""
    # First what asks for the compiler, under which sizes may be symbols.
    return takes_own_backward() and not others_choose_what_is_kept() and x.nbytes >= _LARGE


def norm_made_again(
    normed: Tensor, make: Callable[[], Tensor], *, of: Sequence[Tensor], weight: Tensor | None, eps: float | None
) -> AbstractContextManager[object]:
    """Return a context in which the result of a norm is not kept, if that pays.

    As `made_again`, where `make` makes the norm's input, and the weight is among what it is made of.
    """
    if normed.dtype != of[0].dtype or not may_be_made_again(normed):  # of another in an autocast, which is over by then
        return nullcontext()
    if weight is None:
        return made_again(normed, lambda: normalized(make(), eps)[0], of=of)
    return made_again(normed, lambda: _norm(make(), weight, eps), of=of)


def normalized(x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """Return the norm of `(..., dim)` and its factor `(..., 1)`, without gradients."""
    if _has_kernel(x):
        normed, factor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], None, eps)
        return normed, factor
    # What torch does there as well, with a third of the memory.
    square = torch.square(x, out=empty_with_room(x))
    factor = square.mean(dim=-1, keepdim=True).add_(_eps(x, eps)).rsqrt_()
    return torch.mul(x, factor, out=square), factor


def _normalize_(x: Tensor, eps: float | None) -> Tensor:
    """Norm `(..., seq, dim)` in place and return the factor; some positions at a time, so that little lies between."""
    factors = []
    for part in x.chunk(8, dim=-2):
        factors.append(part.square().mean(dim=-1, keepdim=True).add_(_eps(x, eps)).rsqrt_())
        part.mul_(factors[-1])
    return torch.cat(factors, dim=-2)


def norm_factor(x: Tensor, eps: float | None) -> Tensor:
    """Return the factor `(..., 1)` of the norm of `(..., dim)`, with gradients."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.square().mean(dim=-1, keepdim=True) + _eps(wide, eps)).rsqrt()


def _has_kernel(x: Tensor) -> bool:
    return x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64)


def _eps(x: Tensor, eps: float | None) -> float:
    return torch.finfo(x.dtype).eps if eps is None else eps


def norm_gradient(grad: Tensor, normed: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient of a norm's input from that of its result; in float32 at least, but on a GPU in its dtype."""
    plainly = computes_plainly(grad)
    if normed.is_cuda and not plainly:
        # The kernel of the plain norm, for an input that is normalized already; it sums in float32.
        ones = torch.ones_like(factor)
        kernel = torch.ops.aten._fused_rms_norm_backward
        dx: Tensor = kernel(grad, normed, [normed.shape[-1]], ones, None, [True, False])[0]
        return dx.mul_(factor)
    g, y = grad.to(factor.dtype), normed.to(factor.dtype)
    product = g * y
    mean = product.mean(dim=-1, keepdim=True)
    if plainly:
        return torch.addcmul(g, y, mean, value=-1.0) * factor
    return torch.addcmul(g, y, mean, value=-1.0, out=product).mul_(factor)


def _norm(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    """Norm and its factor `(..., 1)`: `y = factor * x`, and `dx = factor * (dy - y * mean(dy * y))`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float | None, in_place: bool) -> tuple[Tensor, Tensor]:
        if in_place:
            ctx.mark_dirty(x)
            y, factor = x, _normalize_(x, eps)
        else:
            y, factor = normalized(x, eps)
        ctx.save_for_backward(y, factor)
        ctx.set_materialize_grads(False)
        return y, factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_factor: Tensor | None) -> tuple[Tensor | None, None, None]:
        y, factor = ctx.saved_tensors
        result = None if grad is None else norm_gradient(grad, y, factor)
        if grad_factor is not None:  # in the second of two backward passes alone
            through = -grad_factor * factor.square() * y.to(factor.dtype) / y.shape[-1]
            result = through if result is None else result + through
        return None if result is None else result.to(y.dtype), None, None
