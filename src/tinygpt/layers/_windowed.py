"""Attention within a window on a CPU, by blocks of queries, so that keys outside the window cost nothing."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Queries that share a mask. Measured at windows of 128 to 2,048: fewer queries lose to the overhead of a call, and with
# more of them too many keys are looked at that only some, or none, of a block can see.
BLOCK_QUERIES = 64

# Torch's fused kernel for CPUs, which F.scaled_dot_product_attention calls there as well. Called by name it hands out
# the log-sum-exp of the scores, and with it blocks can be differentiated without a copy of keys and values for each.
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"


def blocks_attention(q: Tensor, k: Tensor, v: Tensor, window_tokens: int | None, scale: float) -> Tensor:
    """Return causal attention in time and memory proportional to the window; shapes as in `causal_attention`.

    All tensors lie on a CPU, have one dtype and one head_dim, and none is empty. Without a window all is seen.
    """
    y, _ = torch.ops.tinygpt.windowed_attention(q, k, v, k.shape[2] if window_tokens is None else window_tokens, scale)
    return y


def blocks_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why blocks are out of the question, or `""`."""
    if device.type != "cpu":
        return "it is for CPUs"
    known = hasattr(torch.ops.aten, _FORWARD) and hasattr(torch.ops.aten, _BACKWARD)
    return "" if known else f"torch {torch.__version__} lacks the kernel it is made of"


def _blocks(q: Tensor, k: Tensor, window_tokens: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the queries of each block, the keys that some of them see, and the mask between the two.

    Masks are added to the scores. All are parts of one, as a mask depends on distances alone.
    """
    q_seq, seq = q.shape[2], k.shape[2]
    rows = min(BLOCK_QUERIES, q_seq)
    earlier = min(window_tokens, seq)
    distance = torch.arange(rows)[:, None] + earlier - torch.arange(earlier + rows)
    mask = torch.zeros(distance.shape, dtype=q.dtype).masked_fill_(
        (distance < 0) | (distance > window_tokens), float("-inf")
    )
    for start in range(0, q_seq, rows):
        stop = min(start + rows, q_seq)
        position = seq - q_seq + start
        first, last = max(0, position - earlier), seq - q_seq + stop
        cut = first - (position - earlier)
        yield slice(start, stop), slice(first, last), mask[: stop - start, cut : cut + last - first]


def _empty(batch: int, heads: int, seq: int, like: Tensor) -> Tensor:
    """Return memory in which the heads of a position lie side by side, as the projections around attention want it."""
    return like.new_empty(batch, seq, heads, like.shape[3]).transpose(1, 2)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors with rows that lie in one piece, as the kernel asks."""
    return [tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in tensors]


def _forward(q: Tensor, k: Tensor, v: Tensor, window_tokens: int, scale: float) -> tuple[Tensor, Tensor]:
    kernel = getattr(torch.ops.aten, _FORWARD)
    q, k, v = _rows(q, k, v)
    y, log_sums = _shapes(q, k, v, window_tokens, scale)
    for queries, keys, mask in _blocks(q, k, window_tokens):
        y[:, :, queries], log_sums[:, :, queries] = kernel(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=mask, scale=scale
        )
    return y, log_sums


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, window_tokens: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = getattr(torch.ops.aten, _BACKWARD)
    grad, q, k, v = _rows(grad, q, k, v)
    q_grad, k_grad, v_grad = _gradient_shapes(grad, q, k, v, y, log_sums, window_tokens, scale)
    # A key is seen by many blocks: in half precision their sum would be rounded at each.
    k_sum, v_sum = k_grad.to(log_sums.dtype).zero_(), v_grad.to(log_sums.dtype).zero_()
    for queries, keys, mask in _blocks(q, k, window_tokens):
        q_grad[:, :, queries], k_part, v_part = kernel(
            grad[:, :, queries],
            q[:, :, queries],
            k[:, :, keys],
            v[:, :, keys],
            y[:, :, queries],
            log_sums[:, :, queries],
            0.0,
            False,
            attn_mask=mask,
            scale=scale,
        )
        k_sum[:, :, keys] += k_part
        v_sum[:, :, keys] += v_part
        del k_part, v_part  # else they would still be there while the next block makes its own
    return q_grad, k_sum.to(k.dtype), v_sum.to(v.dtype)


def _shapes(q: Tensor, k: Tensor, v: Tensor, window_tokens: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return memory for the result and the log-sum-exp of each query."""
    batch, heads, q_seq, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty(batch, heads, q_seq, q), q.new_empty(batch, q_seq, heads, dtype=dtype).transpose(1, 2)


def _gradient_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, window_tokens: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the gradients."""
    q_grad, k_grad, v_grad = (_empty(x.shape[0], x.shape[1], x.shape[2], x) for x in (q, k, v))
    return q_grad, k_grad, v_grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window_tokens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.tinygpt.windowed_attention_backward
    return (*backward(grad, *ctx.saved_tensors, ctx.window_tokens, ctx.scale), None, None)


# Operators of our own are opaque to torch.compile, which would otherwise unroll the loops over blocks.
_LIBRARY: Any = torch.library.Library("tinygpt", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("windowed_attention(Tensor q, Tensor k, Tensor v, int window_tokens, float scale) -> (Tensor, Tensor)")
_LIBRARY.define(
    "windowed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor log_sums, "
    "int window_tokens, float scale) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("windowed_attention", _forward, "CPU")
_LIBRARY.impl("windowed_attention_backward", _backward, "CPU")
torch.library.register_fake("tinygpt::windowed_attention", _shapes, lib=_LIBRARY)
torch.library.register_fake("tinygpt::windowed_attention_backward", _gradient_shapes, lib=_LIBRARY)
torch.library.register_autograd("tinygpt::windowed_attention", _differentiate, setup_context=_keep, lib=_LIBRARY)
