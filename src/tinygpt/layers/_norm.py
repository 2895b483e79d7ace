"""Root-mean-square normalization."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt._numbers import check_real, check_whole, given
from tinygpt.errors import ConfigError
from tinygpt.layers._kept import made_again, others_choose_what_is_kept, takes_own_backward

_LARGE = 2**20  # bytes; what is smaller is sooner kept than looked at


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps)` over the last axis, without a learned weight unless asked for.

    Without a weight, and in other dtypes than float32, the result is kept for the backward pass and not the input:
    whatever multiplies the result keeps it anyway, so the norm costs no memory. To change that result in place is an
    error in the backward pass.

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
    """Return what `F.rms_norm` returns over the last axis, to the bit, and keep the result for the backward pass.

    Not in float32, where torch's own backward pass is taken: its roundings are those of other implementations, and
    others show after a few steps in the scalars.
    """
    fused = x.dtype != torch.float32 and hasattr(torch.ops.aten, "_fused_rms_norm")
    if fused and x.requires_grad and takes_own_backward():
        normed: Tensor = _RMSNorm.apply(x, eps)[0]  # type: ignore[no-untyped-call]
        return normed
    return _norm(x, None, eps)


def norm_keeps_input(x: Tensor, weight: Tensor | None = None) -> bool:
    """Return whether autograd keeps the input of this norm, and a large one, so that the result may be made again."""
    if not takes_own_backward() or others_choose_what_is_kept():  # first: under the compiler sizes may be symbols
        return False
    return x.requires_grad and (x.dtype == torch.float32 or weight is not None) and x.nbytes >= _LARGE


def norm_made_again(
    normed: Tensor,
    make: Callable[[], Tensor],
    *,
    of: Sequence[Tensor],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> AbstractContextManager[object]:
    """Return a context in which the result of a norm is not kept: `made_again`, where `make` makes the norm's input."""
    if normed.dtype != of[0].dtype:  # that of an autocast, which is over by then
        return nullcontext()
    of = [*of] if weight is None else [*of, weight]
    return made_again(normed, lambda: _norm(make(), weight, eps), of=of)


def _norm(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    """Norm and its factor `(..., 1)`: `y = factor * x`, and `dx = factor * (dy - y * mean(dy * y))`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
        y, factor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], None, eps)
        ctx.save_for_backward(y, factor)
        ctx.set_materialize_grads(False)
        return y, factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_factor: Tensor | None) -> tuple[Tensor | None, None]:
        y, factor = ctx.saved_tensors
        if grad is None and grad_factor is None:
            return None, None
        if y.is_cuda and grad is not None and grad_factor is None and not torch.is_grad_enabled():
            # The kernel of the plain norm, for an input that is normalized already; it sums in float32.
            ones = torch.ones_like(factor)
            dx: Tensor = torch.ops.aten._fused_rms_norm_backward(grad, y, [y.shape[-1]], ones, None, [True, False])[0]
            return dx.mul_(factor), None
        wide = factor.dtype
        result = torch.zeros_like(y, dtype=wide)
        if grad is not None:
            g, z = grad.to(wide), y.to(wide)
            result = torch.addcmul(g, z, (g * z).mean(dim=-1, keepdim=True), value=-1.0) * factor
        if grad_factor is not None:  # in the second of two backward passes alone
            result = result - grad_factor * factor.square() * y.to(wide) / y.shape[-1]
        return result.to(y.dtype), None
