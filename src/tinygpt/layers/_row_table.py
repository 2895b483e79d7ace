"""A table whose gradient on a CPU takes memory for the rows that were looked up alone."""

import contextlib
import math
import mmap
from typing import Any

import torch
from torch import Tensor, nn

from tinygpt._numbers import check_whole
from tinygpt.errors import ConfigError
from tinygpt.layers._kept import takes_own_backward

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
            except (OSError, ValueError, OverflowError, MemoryError, RuntimeError):
                pass  # no memory could be mapped, or there are several gradients at once (is_grads_batched)
        return torch.ops.aten.embedding_dense_backward(grad, token_ids, ctx.shape[0], -1, False), None


def _system_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU whose pages the system gives only when they are written."""
    # Private: reading a page of shared memory takes it too. Not in huge pages, of which one row takes 2 MiB.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel that has none
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def check_sizes(num_embeddings: int, embedding_dim: int) -> None:
    """Raise `ConfigError` unless a table has rows and channels."""
    check_whole(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
    if num_embeddings < 1 or embedding_dim < 1:
        raise ConfigError(f"a table needs positive sizes, got {num_embeddings=} and {embedding_dim=}.")
