"""The transformer block, and the backout of its middle."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinygpt.errors import ConfigError
from tinygpt.layers._kept import (
    computes_plainly,
    is_plain,
    made_again,
    others_choose_what_is_kept,
    takes_own_backward,
    with_its_parameters,
)
from tinygpt.layers._kv_cache import LayerCache
from tinygpt.layers._memory import plus_product
from tinygpt.layers._norm import (
    RMSNorm,
    may_be_made_again,
    norm_factor,
    norm_gradient,
    norm_made_again,
    normalized,
)


class Block(nn.Module):
    """Pre-norm residual block: `x = a * x + b * x0`, then `x += attention(norm(x))`, then `x += mlp(norm(x))`.

    `x0` is the embedding that entered the first block; `a` and `b` are learned scalars, each of which can be left out.

    Args:
        dim: Width of the residual stream.
        attention: Called as `attention(x, token_ids=..., cache=...)`; returns what is added to `x`.
        mlp: Called as `mlp(x)`; returns what is added to `x`. Neither may change its input in place.
        norm_weight: Whether the two norms have learned weights.
        norm_eps: `eps` of the two norms, as for `RMSNorm`.
        residual_scale: First value of `a`; `None` leaves the factor out.
        x0_scale: First value of `b`; `None` leaves the term out.

    Attributes:
        recompute_mlp: Whether the backward pass computes the inside of `mlp` again instead of keeping it.

    References:
        The two scalars are modded-nanogpt's residual and x0 lambdas.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        norm_weight: bool = False,
        norm_eps: float | None = None,
        residual_scale: float | None = None,
        x0_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, weight=norm_weight, eps=norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(dim, weight=norm_weight, eps=norm_eps)
        self.mlp = mlp
        self.recompute_mlp = False
        self._first_scales = (residual_scale, x0_scale)
        self.residual_scale = None if residual_scale is None else nn.Parameter(torch.empty(1))
        self.x0_scale = None if x0_scale is None else nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the two scalars to their first values."""
        for parameter, first in zip((self.residual_scale, self.x0_scale), self._first_scales, strict=True):
            if parameter is not None and first is not None:
                nn.init.constant_(parameter, first)

    def forward(
        self,
        x: Tensor,
        *,
        x0: Tensor | None = None,
        token_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: `(batch, seq, dim)`.
            x0: Shape of `x`, needed when the block has an `x0_scale`.
            token_ids: `(batch, seq)` int64, handed to the attention.
            cache: The cache of this layer, handed to the attention.

        Returns:
            `(batch, seq, dim)`.

        Raises:
            ConfigError: If `x0` is needed and missing.
        """
        x, normed, again, shared = self._enter(x, x0)
        with again:
            x = _plus(x, self.attention(normed, token_ids=token_ids, cache=cache), in_place=not shared)
        norm = self.mlp_norm
        normed = norm(x)
        plain = is_plain(norm, RMSNorm)
        if self.recompute_mlp and torch.is_grad_enabled():
            # It stops as soon as it has what was not kept, so the last product in `mlp` is not repeated.
            added = checkpoint(with_its_parameters(self.mlp), normed, use_reentrant=False)
        elif plain and norm.weight is not None and may_be_made_again(x):
            source = x.detach()
            with norm_made_again(normed, lambda: source, of=[source, norm.weight], weight=norm.weight, eps=norm.eps):
                added = self.mlp(normed)
        else:
            added = self.mlp(normed)
        # A plain norm without a weight keeps its result alone. With one it keeps the stream, and others may do so.
        return _plus(x, added, in_place=not shared and plain and norm.weight is None)

    def _enter(self, x: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor, AbstractContextManager[object], bool]:
        """Return stream and `x0` mixed, the norm, its context, and whether others know the sum."""
        norm, scales = self.attention_norm, (self.residual_scale, self.x0_scale)
        plain = is_plain(norm, RMSNorm) and takes_own_backward()
        # Without a factor the stream before is not kept anyway.
        at_once = plain and norm.weight is None and self.residual_scale is not None and _alike(x, x0, scales)
        if not at_once and not (plain and norm.weight is not None and may_be_made_again(x)):
            x = _mix(x, x0, *scales)
            return x, norm(x), nullcontext(), True
        before = x.detach()
        mix = partial(_mix, before, x0, *scales)
        of = [each for each in (before, x0, *scales, norm.weight) if each is not None]
        if at_once:
            x, normed = _MixAndNorm.apply(x, x0, *scales, norm.eps)  # type: ignore[no-untyped-call]
        else:
            x = _mix(x, x0, *scales)
            with made_again(x, mix, of=of):
                normed = norm(x)
        again = norm_made_again(normed, mix, of=of, weight=norm.weight, eps=norm.eps)
        return x, normed, again, not at_once or others_choose_what_is_kept()


def _alike(x: Tensor, x0: Tensor | None, scales: tuple[Tensor | None, ...]) -> bool:
    """Return whether the sum has the shape and dtype of `x`, and each factor is one number."""
    numbers = all(scale is None or scale.numel() == 1 for scale in scales)
    return numbers and not x.is_nested and (x0 is None or (x0.shape, x0.dtype) == (x.shape, x.dtype))


def _mix(x: Tensor, x0: Tensor | None, residual_scale: Tensor | None, x0_scale: Tensor | None) -> Tensor:
    scaled = x if residual_scale is None else residual_scale.to(x.dtype) * x
    if x0_scale is None:
        return scaled
    if x0 is None:
        raise ConfigError("this Block has an x0_scale: call it with x0=(batch, seq, dim), the embedded input.")
    fits = scaled is not x and (x0.shape, x0.dtype) == (x.shape, x.dtype)
    eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    in_place = fits and eager and not others_choose_what_is_kept()
    return plus_product(scaled, x0_scale.to(x.dtype), x0, in_place=in_place)


def _plus(x: Tensor, added: Tensor, *, in_place: bool) -> Tensor:
    fits = in_place and isinstance(added, Tensor) and (added.shape, added.dtype) == (x.shape, x.dtype)
    return x.add_(added) if fits else x + added


class _MixAndNorm(torch.autograd.Function):
    """The stream with its share of `x0`, and the norm of that; both are made again instead of kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x0: Tensor | None, residual_scale: Tensor, x0_scale: Tensor | None, eps: float | None
    ) -> tuple[Tensor, Tensor]:
        mixed = _mix(x, x0, residual_scale, x0_scale)
        normed, factor = normalized(mixed, eps)
        ctx.save_for_backward(x, x0, residual_scale, x0_scale, factor)
        ctx.eps = eps
        return mixed, normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        x, x0, residual_scale, x0_scale, factor = ctx.saved_tensors
        needs_x, needs_x0, *needs_scales, _ = ctx.needs_input_grad
        mixed = _mix(x, x0, residual_scale, x0_scale)
        plainly = computes_plainly(grad, grad_normed)
        if plainly:
            spare, factor = None, norm_factor(mixed, ctx.eps)
            normed = (mixed * factor).to(x.dtype)
        else:
            spare = normed = mixed.mul_(factor)
        through = norm_gradient(grad_normed, normed, factor).to(x.dtype)
        through = through + grad if plainly else through.add_(grad)
        grad_scales = [
            torch.mul(through, of, out=spare).sum(dtype=factor.dtype).view(scale.shape) if needed else None
            for of, scale, needed in zip((x, x0), (residual_scale, x0_scale), needs_scales, strict=True)
        ]
        grad_x0 = x0_scale.to(x.dtype) * through if needs_x0 and x0_scale is not None else None
        scale = residual_scale.to(x.dtype)
        grad_x = None if not needs_x else through * scale if plainly else through.mul_(scale)
        return grad_x, grad_x0, *grad_scales, None


class Backout(nn.Module):
    """Take a learned share of the mid-depth residual stream out of the last one: `x - scale * middle`.

    Args:
        scale: First value of the learned scalar.

    References:
        modded-nanogpt's backout, in nanochat's form.
    """

    def __init__(self, *, scale: float = 0.2) -> None:
        super().__init__()
        self._first_scale = scale
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scalar to its first value."""
        nn.init.constant_(self.scale, self._first_scale)

    def forward(self, x: Tensor, middle: Tensor) -> Tensor:
        """Combine two tensors of shape `(batch, seq, dim)` into one of the same shape and dtype."""
        return x - self.scale.to(x.dtype) * middle
