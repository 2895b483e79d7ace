"""What kernels keep for the backward pass where the meta device would compute something else in their place."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class KernelsOf(TorchFunctionMode):
    """Count attention, and on a GPU the norm, as the kernels of a device and not as their formulas.

    Args:
        device_type: `"cuda"` or `"cpu"`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._fused = device_type != "cpu"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.rms_norm and self._fused:
            return self._norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Return attention that keeps what every fused kernel of torch keeps.

        Queries, keys, values, the result, and a float32 number a head and query: Dao et al.,
        [FlashAttention](https://arxiv.org/abs/2205.14135), 2022. A mask is kept as well, in the dtype of the queries.
        On a GPU the backward pass adds up the gradient of the queries in float32.
        """
        mask = None if attn_mask is None else query.new_empty(attn_mask.shape)
        out: Tensor = _FusedAttention.apply(query, key, value, mask, self._fused)  # type: ignore[no-untyped-call]
        return out

    def _norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:  # names as callers may write them
        out: Tensor = _FusedNorm.apply(input, weight)  # type: ignore[no-untyped-call]
        return out


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sums_in_float32: bool) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        if sums_in_float32:  # kernels of a GPU write the heads side by side, as the output projection reads them
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        ctx.sums_in_float32 = sums_in_float32
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        wide = torch.empty_like(q, dtype=torch.float32) if ctx.sums_in_float32 else None
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del wide
        return *grads, None, None


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
