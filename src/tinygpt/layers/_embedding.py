"""Tables looked up by token id, and the smear that mixes each embedding with the one before it."""

import math
import mmap
from typing import Any

import torch
from torch import Tensor, nn

from tinygpt.errors import ConfigError
from tinygpt.layers._kept import takes_own_backward
from tinygpt.layers._linear import Linear, uniform_with_std_

_MAPS = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANON")  # not on Windows
_LARGE = 32 * 2**20  # bytes; what is smaller, allocators give out again without asking the system


class RowTable(nn.Embedding):
    """An `nn.Embedding` whose gradient on a CPU takes memory for the rows that were looked up, and for no others.

    It is the same dense gradient to the last bit. In a large table most of its rows are zeros, as memory from the
    system is before anyone writes to it: pages that nobody writes are never taken.
    """

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look up rows: ids of any shape -> `(*shape, embedding_dim)`."""
        weight = self.weight
        own = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.requires_grad
        if own and takes_own_backward() and self.unwritten_gradient(token_ids.numel()):
            rows: Tensor = _Rows.apply(weight, token_ids)  # type: ignore[no-untyped-call]
            return rows
        return super().forward(token_ids)

    def unwritten_gradient(self, num_tokens: int) -> int:
        """Return the bytes of the gradient for so many tokens that on a CPU take no memory."""
        weight, special = self.weight, self.max_norm is not None or self.scale_grad_by_freq or self.sparse
        if not _MAPS or special or self.padding_idx is not None or weight.nbytes < _LARGE:
            return 0
        row = self.embedding_dim * weight.element_size()
        return max(0, weight.nbytes - num_tokens * (row + mmap.PAGESIZE))


class _Rows(torch.autograd.Function):
    """Rows of a table by their ids."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, token_ids: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.shape = weight.shape
        return nn.functional.embedding(token_ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (token_ids,) = ctx.saved_tensors
        if not torch.is_grad_enabled():  # with them a second derivative is wanted
            try:
                whole = _system_zeros(ctx.shape, grad.dtype)
                ids, order = token_ids.unique(return_inverse=True)
                whole[ids] = torch.ops.aten.embedding_dense_backward(grad, order, len(ids), -1, False)
                return whole, None
            except (OSError, RuntimeError):  # no memory mapped, or of several gradients at once (is_grads_batched)
                pass
        return torch.ops.aten.embedding_dense_backward(grad, token_ids, ctx.shape[0], -1, False), None


def _system_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU whose pages the system gives only when they are written."""
    # Private: reading a page of shared memory takes it too. Not in huge pages, of which one row takes 2 MiB.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class TokenEmbedding(RowTable):
    """Table from token ids to the residual stream; starts normal with standard deviation `std`.

    Args:
        num_embeddings: Rows, one a token id.
        embedding_dim: Width of the residual stream.
        std: Standard deviation of the first values; 0.8 is nanochat's.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float = 0.8) -> None:
        self.std = std  # before super().__init__, which draws the weight
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the table."""
        nn.init.normal_(self.weight, std=self.std)


class ValueEmbedding(RowTable):
    """Table from token ids to attention values; starts uniform with standard deviation `std`.

    Args:
        num_embeddings: Rows, one a token id.
        embedding_dim: `num_kv_heads * head_dim` of the attention that adds it to its values.
        std: Standard deviation of the first values; `None` takes `embedding_dim ** -0.5`. nanochat takes
            `dim ** -0.5` of the model, which differs when there are fewer key/value heads than query heads.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float | None = None) -> None:
        self.std = embedding_dim**-0.5 if std is None else std  # before super().__init__, which draws the weight
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the table."""
        uniform_with_std_(self.weight, self.std)


class Smear(nn.Module):
    """Add a gated share of the previous token's embedding: `x[t] + scale * sigmoid(gate(x[t])) * x[t - 1]`.

    It gives the first layer word-pair information for almost nothing. The first token of a sequence has no
    predecessor and stays as it is. The scale starts at zero, so a new model starts without smear.

    Args:
        dim: Width of the residual stream.
        gate_channels: Leading channels of `x` that the gate reads.

    Raises:
        ConfigError: If the gate would read more channels than there are.

    References:
        modded-nanogpt's smear module, in nanochat's form.
    """

    def __init__(self, dim: int, *, gate_channels: int = 24) -> None:
        super().__init__()
        if not 1 <= gate_channels <= dim:
            raise ConfigError(f"Smear gate_channels={gate_channels} must lie between 1 and dim={dim}.")
        self.gate = Linear(gate_channels, 1)
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the scale; draw the gate from [0, 0.02)."""
        nn.init.zeros_(self.scale)
        nn.init.uniform_(self.gate.weight, 0.0, 0.02)

    def forward(self, x: Tensor, *, previous: Tensor | None = None) -> Tensor:
        """Mix each position with its predecessor.

        Args:
            x: `(batch, seq, dim)`.
            previous: `(batch, 1, dim)`, the embedding before `x[:, 0]` as it was before smearing; `None` at the
                start of a sequence.

        Returns:
            Same shape and dtype as `x`.
        """
        if previous is None:
            return torch.cat((x[:, :1], self._mix(x[:, 1:], x[:, :-1])), dim=1)
        return self._mix(x, torch.cat((previous, x[:, :-1]), dim=1))

    def _mix(self, x: Tensor, before: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
        return x + self.scale.to(x.dtype) * gate * before
