"""Causal attention over queries, keys and values."""

import operator

import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.errors import ConfigError
from tinygpt.layers import _backends
from tinygpt.layers._autocast import computed_dtype
from tinygpt.layers._windowed import BLOCK_QUERIES

# From this context on a window is worth a compiled kernel, and a mask in training worth a warning.
_LONG = 512


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_tokens: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention in which each query sees itself and what came before it.

    The queries are the last `q_seq` of the `seq` positions of the keys, so the same call serves training
    (`q_seq == seq`), a prompt continued on a cache, and one new token. Fewer key/value heads than query heads mean
    that groups of query heads share them.

    What it runs on is chosen by device, dtype and window; `attention_backends` tells what there is. On a CPU, and on
    CUDA with most backends, keys outside the window cost nothing.

    Args:
        q: `(batch, heads, q_seq, head_dim)`.
        k: `(batch, kv_heads, seq, head_dim)` with `seq >= q_seq`.
        v: Shape of `k`.
        window_tokens: How many tokens before its own a query sees; `None` for all of them.
        scale: Factor of the scores; `None` for `head_dim ** -0.5`.

    Returns:
        `(batch, heads, q_seq, head_dim)`.

    Raises:
        ConfigError: If a tensor has not four axes, dtypes differ, there are more queries than keys, heads are no
            multiple of kv_heads, or the window is negative.

    References:
        Vaswani et al., [Attention Is All You Need](https://arxiv.org/abs/1706.03762), 2017; grouped heads from Ainslie
        et al., [GQA](https://arxiv.org/abs/2305.13245), 2023. The window counts as in FlashAttention: a window of
        `w` lets a query see `w + 1` positions, its own included.
    """
    if not q.ndim == k.ndim == v.ndim == 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ConfigError(f"causal_attention takes (batch, heads, seq, head_dim) three times, got {shapes}.")
    # An autocast around gives them one dtype.
    if not q.dtype == k.dtype == v.dtype and not computed_dtype(q) == computed_dtype(k) == computed_dtype(v):
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ConfigError(f"causal_attention takes queries, keys and values of one dtype, got {dtypes}; convert them.")
    heads, kv_heads, q_seq, seq = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if v.shape[:3] != k.shape[:3]:
        raise ConfigError(f"causal_attention got keys {tuple(k.shape)} and values {tuple(v.shape)}, which do not fit.")
    if q_seq > seq:
        raise ConfigError(f"causal_attention got {q_seq} queries for {seq} keys; there must be a key for each query.")
    if heads % kv_heads:
        raise ConfigError(f"causal_attention got {heads} query heads, not a multiple of {kv_heads} key/value heads.")
    if window_tokens is not None:
        if window_tokens < 0:
            raise ConfigError(f"window_tokens={window_tokens} is negative; use None for no window.")
        # Keys that no query can see cost time for nothing: the first query sits at position seq - q_seq.
        visible = q_seq + window_tokens
        if visible < seq:
            k, v, seq = k[:, :, -visible:], v[:, :, -visible:], visible
        if window_tokens >= seq - 1:
            window_tokens = None
    if q_seq == 1:
        return one_query_attention(q, k, v, scale=scale)
    backend = _backend(q, k, v, window_tokens)
    if backend == "sdpa":
        return _sdpa(q, k, v, window_tokens, scale)
    dtype = computed_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return _backends.KERNELS[backend].attend(q, k, v, window_tokens, q.shape[3] ** -0.5 if scale is None else scale)


def _backend(q: Tensor, k: Tensor, v: Tensor, window_tokens: int | None) -> str:
    """Return the name of the backend for a call of more than one query."""
    q_seq, seq = q.shape[2], k.shape[2]
    # On a CPU blocks pay for windows, and for more than one of them: a single one is what is left to see anyway.
    if _backends.forced is None and q.device.type == "cpu" and (window_tokens is None or q_seq <= BLOCK_QUERIES):
        return "sdpa"
    # Values of another width, one row of keys for all queries, and tensors without content (meta, fake) or of another
    # kind, only torch's function knows; a kernel that is called by its name reads past the end of what does not fit.
    if type(q) is not Tensor or q.is_meta or q.numel() == 0 or v.shape != k.shape:
        return "sdpa"
    dtype = computed_dtype(q)
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]) or dtype != computed_dtype(k) or dtype != computed_dtype(v):
        return "sdpa"
    # Derivatives along a direction, and functions of functions: an operator of ours would leave them out unsaid.
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "sdpa"
    return _backends.choose(
        q.device,
        dtype,
        operator.index(q.shape[3]),
        grouped=_plain(q.shape[1] != k.shape[1]),
        full=_plain(window_tokens is None and q_seq == seq),
        long_training=_plain(q_seq == seq >= _LONG and torch.is_grad_enabled() and q.requires_grad),
        traced=torch.compiler.is_compiling(),
        demanded=_backends.forced,
    )


def _plain(condition: bool) -> bool:
    """Return a condition about sizes as a constant, as `choose` needs it, also in a trace where sizes are symbols."""
    return True if condition else False  # noqa: SIM210  (bool() would leave it a symbol)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window_tokens: int | None, scale: float | None) -> Tensor:
    """Run torch's own function; where `is_causal` does not say it all, with a mask, and then all keys cost time."""
    grouped, q_seq, seq = q.shape[1] != k.shape[1], q.shape[2], k.shape[2]
    if window_tokens is None and q_seq == seq:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = _band(q_seq, seq, window_tokens, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def one_query_attention(
    q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return the attention of one query a row over keys in any order; shapes as in `causal_attention`, `q_seq` 1.

    `visible` is boolean, `(batch, seq)`; `None` lets every query see all keys.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    # The query heads of a group become the queries of their key head: nothing is repeated for them.
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    if q.device.type == "cpu":
        # Twice as fast as the fused kernel there: the keys are read along their rows, as they lie in memory.
        scores = (k @ (grouped * (head_dim**-0.5 if scale is None else scale)).transpose(2, 3)).transpose(2, 3)
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        y = scores.softmax(dim=-1) @ v
    else:
        mask = None if visible is None else visible[:, None, None]
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return y.reshape(batch, heads, 1, v.shape[-1])


def _band(q_seq: int, seq: int, window_tokens: int | None, device: torch.device) -> Tensor:
    """Return the boolean mask `(q_seq, seq)` of what each of the last `q_seq` positions sees."""
    query = torch.arange(seq - q_seq, seq, device=device)[:, None]
    key = torch.arange(seq, device=device)[None, :]
    seen = key <= query
    return seen if window_tokens is None else seen & (query - key <= window_tokens)
