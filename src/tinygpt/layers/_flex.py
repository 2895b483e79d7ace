"""FlexAttention on CUDA: a kernel compiled for a window, which passes over what no query sees."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# With less shared memory than this a block of threads has 99 KB (Ada, consumer Ampere and Blackwell) and not 163 (A100)
# or 227 (H100), and the tiles that FlexAttention chooses do not fit heads of 128.
_ROOMY_SHARED_MEMORY = 160_000
_MASK_BLOCK = 128
_MOST_MASKS = 32

# What the check below prepared, by `_kind`: the function as a compiler may trace it, and the same compiled.
_found: dict[str, Callable[..., Any]] = {}
_compiled: dict[str, Callable[..., Any]] = {}
_masks: dict[str, Any] = {}


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window_tokens: int | None, scale: float) -> Tensor:
    """Run FlexAttention on as many queries as keys."""
    seq = k.shape[2]
    mask = _masks[keep_mask(seq, seq if window_tokens is None else window_tokens, q.device)]
    kind = _kind(q.device, q.dtype, q.shape[3])
    run = (_found if torch.compiler.is_compiling() else _compiled)[kind]
    y: Tensor = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y


def flex_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why FlexAttention is out of the question, or `""`."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    try:
        from torch.nn.attention.flex_attention import flex_attention as function
    except ImportError as error:
        return f"torch.nn.attention.flex_attention cannot be imported: {error}"
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    options = None if shared >= _ROOMY_SHARED_MEMORY else small_tiles(dtype, head_dim)
    kind = _kind(device, dtype, head_dim)
    _found[kind] = functools.partial(function, kernel_options=options)
    _compiled[kind] = torch.compile(_found[kind], dynamic=False)
    return ""


def _kind(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return what tiles depend on: those of half precision would be twice as large in float32."""
    return f"{device} {dtype} {head_dim}"


_kind._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as for keep_mask below


def small_tiles(dtype: torch.dtype, head_dim: int = 128) -> dict[str, int]:
    """Return tiles that take at most 80 KB of shared memory.

    Forward a tile of queries lies there, and in each of two stages one of keys and one of values; backward it is two
    tiles of one side and two of the other in a single stage. What Triton 3.7 compiles for compute capability 8.9 takes
    56 and 48 KB with heads of 128 in half precision, 52 and 68 KB in float32, whose tiles are half as long, as they are
    for wider heads.
    """
    row = dtype.itemsize * head_dim
    side = 64 if row <= 256 else 32 if row <= 512 else 16
    short = min(side, 32)
    forward = {"fwd_BLOCK_M": side, "fwd_BLOCK_N": side, "fwd_num_stages": 2}
    backward = {"bwd_BLOCK_M1": short, "bwd_BLOCK_N1": side, "bwd_BLOCK_M2": side, "bwd_BLOCK_N2": short}
    return {**forward, **backward, "bwd_num_stages": 1}


def keep_mask(seq: int, window_tokens: int, device: torch.device) -> str:
    """Make the mask of a window unless it is there already, and return the key of `_masks` that it lies under."""
    key = f"{seq} {window_tokens} {device}"
    if key not in _masks:
        if len(_masks) >= _MOST_MASKS:
            _masks.clear()
        _masks[key] = window_mask(seq, window_tokens, device)
    return key


# torch.compiler.assume_constant_result without importing the compiler: a trace calls it and keeps what it returns.
keep_mask._dynamo_marked_constant = True  # type: ignore[attr-defined]


def window_mask(seq: int, window_tokens: int, device: torch.device) -> Any:
    """Return a window as FlexAttention's `BlockMask`, made from distances of blocks and not from `(seq, seq)`."""
    from torch.nn.attention.flex_attention import BlockMask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= window_tokens)

    starts = torch.arange(0, seq, _MASK_BLOCK, device=device)
    distance = starts[:, None] - starts[None, :]
    nearest, farthest = distance - (_MASK_BLOCK - 1), distance + (_MASK_BLOCK - 1)
    # As torch does, a last row of blocks that is not full of queries is masked.
    whole = (nearest >= 0) & (farthest <= window_tokens) & (starts[:, None] + _MASK_BLOCK <= seq)
    partly = (farthest >= 0) & (nearest <= window_tokens) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(whole), BLOCK_SIZE=_MASK_BLOCK, mask_mod=seen, seq_lengths=(seq, seq)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for batch and head of 1, how many blocks each row has and their numbers, those it has first."""
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], numbers.int()[None, None].contiguous()
