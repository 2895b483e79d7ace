"""FlashAttention on CUDA: torch's own for rows of several lengths, and the packages of its authors."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The package of each, and the compute capability from which on it has kernels.
PACKAGES = {"flash4": ("flash_attn.cute", 9), "flash3": ("flash_attn_interface", 9), "flash2": ("flash_attn", 8)}

# Functions that a check below found, so that a compiler that traces a call meets no imports or signatures.
_found: dict[str, Callable[..., Any]] = {}


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, window_tokens: int | None, scale: float) -> Tensor:
    """Run torch's `varlen_attn` on rows that are all equally long."""
    batch, heads, q_seq, head_dim = q.shape
    seq = k.shape[2]

    def starts(length: int) -> Tensor:
        return torch.arange(0, (batch + 1) * length, length, device=q.device, dtype=torch.int32)

    def joined(x: Tensor) -> Tensor:  # no copy where the heads of a position lie side by side
        x = x if x.stride(3) == 1 else x.contiguous()  # which torch's kernel asks for, and the packages see to
        return x.transpose(1, 2).reshape(-1, x.shape[1], head_dim)

    q_starts = starts(q_seq)
    k_starts = q_starts if seq == q_seq else starts(seq)
    window = (-1 if window_tokens is None else window_tokens, 0)
    y: Tensor = _found["varlen"](
        joined(q), joined(k), joined(v), q_starts, k_starts, q_seq, seq, scale=scale, window_size=window
    )
    return y.view(batch, q_seq, heads, head_dim).transpose(1, 2)


def varlen_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why torch's `varlen_attn` is out of the question, or `""`."""
    if reason := _unfit(device, dtype, head_dim):
        return reason
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return f"torch.nn.attention.varlen cannot be imported: {error}"
    options = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= options.keys():
        return f"varlen_attn of torch {torch.__version__} knows no windows"
    # Where the option is missing, heads are shared without saying so.
    sharing: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in options else {}
    _found["varlen"] = functools.partial(varlen_attn, **sharing)
    return ""


def package_attention(name: str, q: Tensor, k: Tensor, v: Tensor, window_tokens: int | None, scale: float) -> Tensor:
    """Run the `flash_attn_func` of an installed package; all versions share these arguments."""
    options: dict[str, Any] = {} if window_tokens is None else {"window_size": (window_tokens, 0)}
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    result = _found[name](q, k, v, softmax_scale=scale, causal=True, **options)
    y: Tensor = result[0] if isinstance(result, tuple) else result  # some versions add the log-sum-exp
    return y.transpose(1, 2)


def package_why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why a package is out of the question, or `""`."""
    if reason := _unfit(device, dtype, head_dim):
        return reason
    package, capability = PACKAGES[name]
    if torch.cuda.get_device_capability(device)[0] < capability:
        return f"it needs a GPU of compute capability {capability}.0"
    try:
        function = importlib.import_module(package).flash_attn_func
    except (ImportError, AttributeError) as error:
        return f"{package} cannot be imported: {error}"
    # A compiler cannot look into these packages, and a graph that ends here loses nothing it could have fused.
    _found[name] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return ""


def _unfit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"it takes heads of up to 256 channels in steps of 8, not of {head_dim}"
    return ""
