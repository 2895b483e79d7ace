"""The transformer block, and the backout of its middle."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinygpt.errors import ConfigError
from tinygpt.layers._kept import (
    is_plain,
    made_again,
    others_choose_what_is_kept,
    takes_own_backward,
    with_its_parameters,
)
from tinygpt.layers._kv_cache import LayerCache
from tinygpt.layers._norm import RMSNorm, norm_keeps_input, norm_made_again


class Block(nn.Module):
    """Pre-norm residual block: `x = a * x + b * x0`, then `x += attention(norm(x))`, then `x += mlp(norm(x))`.

    `x0` is the embedding that entered the first block; `a` and `b` are learned scalars, each of which can be left out.

    Args:
        dim: Width of the residual stream.
        attention: Called as `attention(x, token_ids=..., cache=...)`; returns what is added to `x`.
        mlp: Called as `mlp(x)`; returns what is added to `x`.
        norm_weight: Whether the two norms have learned weights.
        norm_eps: `eps` of the two norms, as for `RMSNorm`.
        residual_scale: First value of `a`; `None` leaves the factor out.
        x0_scale: First value of `b`; `None` leaves the term out.

    Attributes:
        recompute_mlp: Whether the backward pass computes the inside of `mlp` again instead of keeping it, and, for next
            to nothing, the norm before the attention.

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
        x, normed, again = self._enter(x, x0)
        with again:
            x = x + self.attention(normed, token_ids=token_ids, cache=cache)
        normed = self.mlp_norm(x)
        if self.recompute_mlp and torch.is_grad_enabled():
            # It stops as soon as it has what was not kept, so the last product in `mlp` is not repeated.
            return x + checkpoint(with_its_parameters(self.mlp), normed, use_reentrant=False)
        if not _may_norm_again(self.mlp_norm, x):
            return x + self.mlp(normed)
        source = x.detach()
        norm = self.mlp_norm
        with norm_made_again(normed, lambda: source, of=[source], weight=norm.weight, eps=norm.eps):
            return x + self.mlp(normed)

    def _enter(self, x: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor, AbstractContextManager[object]]:
        """Return the stream with its share of `x0`, its norm, and the context in which the norm is read."""
        norm, scales = self.attention_norm, (self.residual_scale, self.x0_scale)
        again = _may_norm_again(norm, x)
        # Another norm in its place may draw random numbers, or follow an autocast that is over by then.
        repeatable = takes_own_backward() and type(norm) is RMSNorm and not others_choose_what_is_kept()
        if not again and not (self.recompute_mlp and repeatable):
            x = _mix(x, x0, *scales)
            return x, norm(x), nullcontext()
        entered = x.detach()
        of = [each for each in (entered, x0, *scales, *norm.parameters()) if each is not None]
        if again:
            mix = partial(_mix, entered, x0, *scales)
            x = _mix(x, x0, *scales)
            with made_again(x, mix, of=of):
                normed = norm(x)
            return x, normed, norm_made_again(normed, mix, of=of, weight=norm.weight, eps=norm.eps)

        def enter(x: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
            x = _mix(x, x0, self.residual_scale, self.x0_scale)
            return x, norm(x)

        enter = with_its_parameters(self, enter)
        x, normed = checkpoint(enter, x, x0, use_reentrant=False, preserve_rng_state=False)
        return x, normed, made_again(normed, lambda: enter(entered, x0)[1], of=of)


def _mix(x: Tensor, x0: Tensor | None, residual_scale: Tensor | None, x0_scale: Tensor | None) -> Tensor:
    if residual_scale is not None:
        x = residual_scale.to(x.dtype) * x
    if x0_scale is not None:
        if x0 is None:
            raise ConfigError("this Block has an x0_scale: call it with x0=(batch, seq, dim), the embedded input.")
        x = x + x0_scale.to(x.dtype) * x0
    return x


def _may_norm_again(norm: RMSNorm, x: Tensor) -> bool:
    """Return whether the norm is no more than an `RMSNorm`, keeps its input, and its result may be made again."""
    return is_plain(norm, RMSNorm) and norm_keeps_input(x, norm.weight)


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
