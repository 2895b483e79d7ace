"""Root-mean-square normalization."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt.errors import ConfigError


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps)` over the last axis, without a learned weight unless asked for.

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
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (self.dim,), weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, weight={self.weight is not None}"
