"""Which attention backend a call takes: an order of preference, and a small trial before one is trusted."""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from tinygpt.errors import ConfigError
from tinygpt.layers import _flash, _flex, _windowed

_Attend = Callable[[Tensor, Tensor, Tensor, int | None, float], Tensor]


class AttentionBackend(NamedTuple):
    """A way to compute attention, and whether it can be had.

    Attributes:
        name: As in `use_attention_backend`.
        available: Whether it works here.
        reason: Why it does not; empty if it does.
        fast_windows: Whether a window costs less with it than full attention.
    """

    name: str
    available: bool
    reason: str
    fast_windows: bool

    def __str__(self) -> str:
        return f"{self.name}: {'available' if self.available else 'not available, ' + self.reason}"


class Kernel(NamedTuple):
    """How a backend is called, and what rules it out before it is tried.

    Attributes:
        attend: Takes queries, keys and values as `causal_attention` does, a window that hides something or `None`, and
            the scale.
        why_not: Takes device, dtype and head_dim; returns why it cannot serve them, or `""` if it may.
        compiles: Whether it compiles itself for each shape. Then it is kept for training on long contexts, where shapes
            stay the same, and is not tried while something else is being compiled: it would not run as it does later.
    """

    attend: _Attend
    why_not: Callable[[torch.device, torch.dtype, int], str]
    compiles: bool = False


def _package(name: str) -> Kernel:
    return Kernel(functools.partial(_flash.package_attention, name), functools.partial(_flash.package_why_not, name))


# In order of preference; `sdpa`, torch's own function, comes after them and needs no trial.
KERNELS = {
    "flash4": _package("flash4"),
    "flash3": _package("flash3"),
    "varlen": Kernel(_flash.varlen_attention, _flash.varlen_why_not),
    "flash2": _package("flash2"),
    "flex": Kernel(_flex.flex_attention, _flex.flex_why_not, compiles=True),
    "blocks": Kernel(_windowed.blocks_attention, _windowed.blocks_why_not),
}
# Where nothing is hidden, torch's function is the fastest but for these.
_FOR_FULL_ATTENTION = ("flash4", "flash3")

# The name that use_attention_backend set. Attention reads it in every call, so that a compiler guards on it.
forced: str | None = None

_verdicts: dict[tuple[str, torch.device, torch.dtype, int, bool], str] = {}
_one_trial = threading.Lock()
_warned = False


def attention_backends(
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    head_dim: int = 128,
    grouped: bool = False,
) -> tuple[AttentionBackend, ...]:
    """Return what attention can run on, in order of preference, and why a backend cannot be had.

    Each backend that is not ruled out runs once, forward and backward, on a small example and is compared with the
    formula. On CUDA the first call may compile FlexAttention, which takes some seconds. A model that is compiled and
    needs it (windows in float32) should come after this call, as it is not tried while a compiler is at work.

    Args:
        device: Where attention runs; `None` for the current GPU if there is one, else the CPU.
        dtype: Of queries, keys and values; `None` for bfloat16 on a GPU, float32 on a CPU.
        head_dim: Width of a head.
        grouped: Whether query heads share key/value heads.

    Raises:
        ConfigError: If torch knows no such device or has none here, or `head_dim` is not positive.

    Example:
        >>> for backend in attention_backends("cpu"):
        ...     print(backend)
        flash4: not available, it needs a CUDA device
        flash3: not available, it needs a CUDA device
        varlen: not available, it needs a CUDA device
        flash2: not available, it needs a CUDA device
        flex: not available, it needs a CUDA device
        blocks: available
        sdpa: available
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if head_dim < 1:
        raise ConfigError(f"head_dim={head_dim} is not positive; choose 1 or more.")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device!r} is none that torch knows; choose cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={str(device)!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices.")
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reasons = {name: _why_not(name, device, dtype, head_dim, grouped=grouped) for name in KERNELS}
    found = [AttentionBackend(name, not reason, reason, fast_windows=True) for name, reason in reasons.items()]
    return (*found, AttentionBackend("sdpa", True, "", fast_windows=False))


@contextmanager
def use_attention_backend(name: str | None) -> Iterator[None]:
    """Let attention take one backend, whatever it would have chosen.

    One new token is always computed by itself, and what FlexAttention is not used for (prompts, evaluation, contexts
    below 512) goes to `sdpa`. The choice is for the whole process, all threads included.

    Args:
        name: A name from `attention_backends`; `None` for the usual choice.

    Raises:
        ConfigError: If the name is unknown; in attention, if the backend cannot serve a call. In code that you compile
            yourself, outside of a `Trainer`, the latter is an error of the compiler that begins with `ConfigError:`.

    Example:
        >>> with use_attention_backend("sdpa"):
        ...     y = causal_attention(q, k, v, window_tokens=128)
    """
    global forced
    if name is not None and name not in (*KERNELS, "sdpa"):
        raise ConfigError(f"there is no attention backend {name!r}; choose {', '.join(KERNELS)} or sdpa.")
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    grouped: bool,
    full: bool,
    long_training: bool,
    traced: bool,
    demanded: str | None,
) -> str:
    """Return the name of the backend for a call.

    Args:
        device: Of the call.
        dtype: Of the call.
        head_dim: Of the call.
        grouped: Whether query heads share keys.
        full: Whether every query sees all that came before it, and there are as many queries as keys.
        long_training: Whether gradients are wanted, for as many queries as keys, and so many that a window that costs
            more than it saves is worth a warning.
        traced: Whether a compiler is asking.
        demanded: What `use_attention_backend` says.

    Raises:
        ConfigError: If the demanded backend cannot serve the call.
    """
    global _warned
    names = [name for name in KERNELS if not full or name in _FOR_FULL_ATTENTION] if demanded is None else [demanded]
    reasons = {}
    for name in names:
        if name == "sdpa" or (KERNELS[name].compiles and not long_training):
            continue
        reasons[name] = _why_not(name, device, dtype, head_dim, grouped=grouped, traced=traced)
        if not reasons[name]:
            return name
        if demanded is not None:
            kind = str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"attention backend {name!r} was asked for and cannot serve {kind} heads of {head_dim} on "
                f"{device}: {reasons[name]}."
            )
    if demanded is None and not full and long_training and not _warned:
        _warned = True
        why = "; ".join(f"{name}: {reasons[name]}" for name in ("varlen", "flex"))  # which every torch has
        warnings.warn(
            f"attention with a window runs masked on {device.type} and costs more than without one, so window_pattern="
            f"'L' trains faster. What would be fast cannot be had ({why}); attention_backends() tells more.",
            stacklevel=3,
        )
    return "sdpa"


# torch.compiler.assume_constant_result without importing the compiler: a trace calls it and keeps what it returns, so
# no trial is ever traced.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, *, grouped: bool, traced: bool = False
) -> str:
    """Return why a backend cannot be had, or `""`; tried once in a process, so that the answer stays."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    kernel, key = KERNELS[name], (name, device, dtype, head_dim, grouped)
    if key not in _verdicts:
        reason = kernel.why_not(device, dtype, head_dim)
        if kernel.compiles and traced and not reason:
            return "it was not tried before compiling; call attention_backends() with this dtype and head_dim first"
        _verdicts[key] = reason or _trial(kernel, device, dtype, head_dim, grouped)
    return _verdicts[key]


def _trial(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str:
    """Run a kernel forward and backward, and return what went wrong, or `""`.

    In a thread of its own, where no mode, hook or autocast of the caller reaches: the first call of attention may come
    within activation checkpointing, inference mode or a trace.
    """
    reasons: list[str] = []
    # Not a pool, which takes no work any more once the main thread has come to its end.
    thread = threading.Thread(target=lambda: reasons.append(_try(kernel, device, dtype, head_dim, grouped)))
    # One at a time, as warnings are kept quiet for the whole process. What compiles cannot wait its turn: a trace that
    # asks in another thread may hold the lock of the compiler.
    with nullcontext() if kernel.compiles else _one_trial:
        thread.start()
        thread.join()
    return reasons[0]


def _try(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> str:
    # A window that is a token too long is wrong by far more than rounding, and no kernel's block has 200 positions.
    seq, window, scale = 200, 11, head_dim**-0.5
    calls = [(seq, window)] if kernel.compiles else [(seq, window), (70, window), (seq, None)]
    generator = torch.Generator().manual_seed(0)

    def rounded(heads: int, length: int) -> Tensor:  # so that both sides compute from the same numbers
        return torch.randn(1, heads, length, head_dim, generator=generator, dtype=torch.float32).to(dtype)

    inputs = [rounded(heads, seq) for heads in ((2, 1, 1) if grouped else (2, 2, 2))]
    try:
        with warnings.catch_warnings(action="ignore"), torch.cuda.device(device if device.type == "cuda" else -1):
            for q_seq, window_tokens in calls:
                grad = rounded(2, q_seq)
                sides = []
                for attend, where in ((kernel.attend, (device, dtype)), (_formula, ("cpu", torch.float64))):
                    q, k, v = (x.detach().to(*where).requires_grad_() for x in inputs)
                    y = attend(q[:, :, -q_seq:], k, v, window_tokens, scale)
                    sides.append([y, *torch.autograd.grad(y, (q, k, v), grad.to(*where))])
                for mine, right in zip(*sides, strict=True):
                    error = ((mine.double().cpu() - right).abs().max() / right.abs().max()).item()
                    if not error < 0.03:  # half precision leaves about 0.01
                        return f"its result on a small example is wrong by {error:.0%}"
    except Exception as error:  # whatever a foreign kernel or compiler throws, there is another backend
        text = str(error).strip().splitlines()
        return f"a small example failed with {type(error).__name__}: {text[0] if text else ''}"
    return ""


def _formula(q: Tensor, k: Tensor, v: Tensor, window_tokens: int | None, scale: float) -> Tensor:
    """Compute attention as it is defined."""
    seq, groups = k.shape[2], q.shape[1] // k.shape[1]
    distance = torch.arange(seq - q.shape[2], seq)[:, None] - torch.arange(seq)
    hidden = (distance < 0) | (distance > (seq if window_tokens is None else window_tokens))
    scores = q @ k.repeat_interleave(groups, dim=1).mT * scale
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v.repeat_interleave(groups, dim=1)
