"""Rotary position embedding."""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tinygpt._numbers import check_real, check_whole
from tinygpt.errors import ConfigError
from tinygpt.layers._kept import computes_plainly, others_choose_what_is_kept, takes_own_backward


class RotaryEmbedding(nn.Module):
    """Rotate pairs of channels of queries and keys by an angle proportional to their position.

    Channel `i` is paired with channel `i + head_dim / 2`, and pair `i` turns by `base ** (-2 i / head_dim)` radians
    a position. The sine and cosine tables are buffers that are not saved; `reset_parameters` rebuilds them.

    Args:
        head_dim: Channels of one head; even.
        max_seq_len: Number of positions in the tables.
        base: Ratio between the slowest and the fastest rotation. nanochat takes 100,000, the paper 10,000.
        clockwise: Rotate by minus the angle, as nanochat does. `False` is the sign of the paper and of Llama.
            Scores depend on angle differences alone, so either sign trains alike, but weights trained with one
            need the same one later.

    Raises:
        ConfigError: If `head_dim` is odd or not positive, or `max_seq_len` or `base` is not positive.

    References:
        Su et al., [RoFormer: Enhanced Transformer with Rotary Position Embedding](https://arxiv.org/abs/2104.09864),
        2021. The paper pairs neighbouring channels; pairing the two halves is the layout of GPT-NeoX.
    """

    def __init__(self, head_dim: int, max_seq_len: int, *, base: float = 100_000.0, clockwise: bool = True) -> None:
        super().__init__()
        check_whole(head_dim=head_dim, max_seq_len=max_seq_len)
        check_real(base=base)
        if head_dim < 2 or head_dim % 2:
            raise ConfigError(f"RotaryEmbedding needs an even, positive head_dim, got {head_dim}.")
        if max_seq_len < 1 or not 0 < base < float("inf"):
            raise ConfigError(f"RotaryEmbedding needs positive max_seq_len and base, got {max_seq_len} and {base}.")
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.clockwise = clockwise
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device, but stay in float32: `model.to(bfloat16)` must not round the angles."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("cos", "sin"):
            table = cast(Tensor, getattr(self, name))
            if table.dtype != torch.float32:
                setattr(self, name, torch.empty_like(table, dtype=torch.float32))
        if not cast(Tensor, self.cos).is_meta:
            self.reset_parameters()
        return self

    def reset_parameters(self) -> None:
        """Fill the tables on the device where the buffers live."""
        cos, sin = cast(Tensor, self.cos), cast(Tensor, self.sin)
        if cos.is_meta:
            return
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=cos.device) / self.head_dim
        positions = torch.arange(self.max_seq_len, dtype=torch.float32, device=cos.device)
        angles = torch.outer(positions, 1.0 / self.base**exponents)
        sign = -1.0 if self.clockwise else 1.0
        cos.copy_(angles.cos())
        sin.copy_(sign * angles.sin())

    def forward(self, x: Tensor, *, position: int | Tensor = 0) -> Tensor:
        """Rotate queries or keys.

        Args:
            x: `(batch, heads, seq, head_dim)`.
            position: Position of the first element of `x` in its sequence; `(batch,)` int64 where rows stand at
                different ones.

        Returns:
            Same shape and dtype.

        Raises:
            ConfigError: As `tables`.
        """
        return self.turn(x, *self.tables(position, x.shape[-2]))

    def tables(self, position: int | Tensor, seq: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of `seq` positions from `position` on, for `turn`.

        Returns:
            Two tensors `(seq, head_dim / 2)`, or `(batch, 1, seq, head_dim / 2)` where `position` is `(batch,)`.

        Raises:
            ConfigError: If the last position lies beyond `max_seq_len`. Positions in a tensor are not looked at, which
                would make a GPU wait.
        """
        cos, sin = cast(Tensor, self.cos), cast(Tensor, self.sin)
        if isinstance(position, Tensor):
            index = (position[:, None] + torch.arange(seq, device=position.device))[:, None]
            return cos[index], sin[index]
        end = position + seq
        if end > self.max_seq_len:
            raise ConfigError(
                f"position {end - 1} lies beyond the {self.max_seq_len} positions of this RotaryEmbedding; "
                "shorten the sequence or build the model with a larger max_seq_len."
            )
        return cos[position:end], sin[position:end]

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `(batch, heads, seq, head_dim)` by what `tables` returned."""
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        # Not with learned tables, nor with those of several positions, which may make more rows of one.
        tables_alone = cos.ndim == 2 and not (cos.requires_grad or sin.requires_grad)
        if x.requires_grad and tables_alone and takes_own_backward() and not others_choose_what_is_kept():
            turned: Tensor = _Turn.apply(x, cos, sin)  # type: ignore[no-untyped-call]
            return turned
        return _turned(x, cos, sin)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.max_seq_len}, base={self.base:g}, clockwise={self.clockwise}"


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _turned_into(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the same, in a fourth of the memory for what lies between."""
    turned = torch.empty_like(x)
    (first, second), (new_first, new_second) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first)
    part = second * sin
    new_first.sub_(part)
    torch.mul(first, sin, out=new_second)
    new_second.add_(torch.mul(second, cos, out=part))
    return turned


class _Turn(torch.autograd.Function):
    """The rotation; its derivative is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned_into(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turn = _turned if computes_plainly(grad) else _turned_into
        return turn(grad, cos, -sin), None, None
