"""Feed-forward layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt.layers._kept import (
    computes_plainly,
    graph_stays,
    is_plain,
    made_again,
    others_choose_what_is_kept,
    takes_own_backward,
)
from tinygpt.layers._linear import Linear, uniform_with_std_
from tinygpt.layers._memory import empty_with_room


class ReluSquaredMLP(nn.Module):
    """Feed-forward layer `down(relu(up(x)) ** 2)`.

    The up projection starts at 0.4 of the usual spread and the down projection at zero, as in nanochat. For the
    backward pass `relu(up(x))` alone is kept, and squared again there.

    Args:
        dim: Width of the residual stream.
        hidden_dim: Width of the hidden layer; nanochat uses `4 * dim`.

    Raises:
        ConfigError: If a width is not positive.

    References:
        So et al., [Primer: Searching for Efficient Transformers](https://arxiv.org/abs/2109.08668), 2021.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = Linear(dim, hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the up projection with 0.4 of the usual spread; zero the down projection."""
        uniform_with_std_(self.up_proj.weight, 0.4 * self.up_proj.in_features**-0.5)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every position: `(batch, seq, dim)` -> same shape and dtype."""
        hidden = self.up_proj(x)
        if not hidden.requires_grad:
            hidden = F.relu(hidden)  # ours from here on
            return self.down_proj(hidden.square() if torch.compiler.is_compiling() else hidden.square_())
        if not takes_own_backward():
            return self.down_proj(F.relu(hidden).square())
        others = others_choose_what_is_kept()
        # Nobody else may look at what `up_proj` returned, or at the relu that the square is made of again.
        in_place = not others and is_plain(self.up_proj, Linear) and not hidden._is_view()
        overwrite = not others and is_plain(self.down_proj, Linear)
        relu, square = _ReluAndSquare.apply(hidden, in_place, overwrite)  # type: ignore[no-untyped-call]
        del hidden
        if others:
            return self.down_proj(square)
        kept = relu.detach()
        with made_again(square, lambda: _square(kept), of=[kept]):
            return self.down_proj(square)


def _square(x: Tensor) -> Tensor:
    return torch.square(x, out=empty_with_room(x))


class _ReluAndSquare(torch.autograd.Function):
    """`relu(x)` and its square, of which the first is kept: the derivative of the square is twice it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool, overwrite: bool) -> tuple[Tensor, Tensor]:
        ctx.overwrite = overwrite
        if in_place:
            ctx.mark_dirty(x)
        relu = x.relu_() if in_place else F.relu(x)
        ctx.save_for_backward(relu)
        ctx.set_materialize_grads(False)
        return relu, _square(relu)

    @staticmethod
    def backward(ctx: Any, grad_relu: Tensor | None, grad_square: Tensor | None) -> tuple[Tensor | None, None, None]:
        (relu,) = ctx.saved_tensors
        grad = None
        if grad_square is not None:
            last = ctx.overwrite and not graph_stays() and not computes_plainly(grad_square)
            grad = (relu.mul_(grad_square) if last and grad_relu is None else grad_square * relu).mul_(2.0)
        if grad_relu is not None:  # in the second of two backward passes alone
            through = grad_relu * (relu > 0)
            grad = through if grad is None else grad + through
        return grad, None, None


class GeluMLP(nn.Module):
    """Feed-forward layer `down(gelu(up(x)))`; the down projection starts at zero.

    Args:
        dim: Width of the residual stream.
        hidden_dim: Width of the hidden layer; GPT-2 uses `4 * dim`.

    Raises:
        ConfigError: If a width is not positive.

    References:
        Hendrycks and Gimpel, [Gaussian Error Linear Units](https://arxiv.org/abs/1606.08415), 2016, in the exact form;
        GPT-2 used the tanh approximation.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = Linear(dim, hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the down projection."""
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every position: `(batch, seq, dim)` -> same shape and dtype."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer `down(silu(gate(x)) * up(x))`; the down projection starts at zero.

    Args:
        dim: Width of the residual stream.
        hidden_dim: Width of the hidden layer. Llama uses about 8/3 of `dim`.

    Raises:
        ConfigError: If a width is not positive.

    References:
        Shazeer, [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202), 2020.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim)
        self.up_proj = Linear(dim, hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the down projection."""
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every position: `(batch, seq, dim)` -> same shape and dtype."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
