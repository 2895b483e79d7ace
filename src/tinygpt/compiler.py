"""Whether `torch.compile` works here, found out before a run depends on it."""

import functools
import warnings

import torch
from torch import Tensor

from tinygpt.errors import ConfigError


def compiler_problem(device: torch.device | str) -> str | None:
    """Say why `torch.compile` cannot be used on a device, or return `None` if it can.

    A tiny function is compiled and its result compared, once a process and device: that takes some seconds, of which
    most are the import of the compiler. torch needs a C++ compiler on a CPU, and Triton with a C compiler on a GPU;
    both are often missing on Windows.

    Args:
        device: Where the compiled code is to run.

    Returns:
        One line for people.

    Raises:
        ConfigError: If torch knows no such device.

    Example:
        ```python
        from tinygpt.compiler import compiler_problem

        print(compiler_problem("cpu") or "torch.compile works")
        ```
    """
    try:
        known = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device!r} is none that torch knows; choose cpu, cuda, cuda:1 or mps.") from None
    return _problem(str(known))


@functools.cache
def _problem(device: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler imports parts of torch that are deprecated
        try:
            _find_compiler(device)  # as the tiny function may come from the cache of an earlier process
            x = torch.linspace(-1, 1, 64, device=device)
            right = torch.allclose(torch.compile(_tiny, dynamic=False)(x), _tiny(x))
        except Exception as error:  # whatever goes wrong in there is a reason to do without
            lines = str(error).strip().splitlines() or [""]
            return f"torch.compile does not work on {device} here ({type(error).__name__}: {lines[0][:200]})."
    return None if right else f"torch.compile computes wrong numbers on {device} here."


def _tiny(x: Tensor) -> Tensor:
    return (x * 2 + 1).tanh() * x


def _find_compiler(device: str) -> None:
    """Raise if the program is missing that the compiler cannot do without; where torch does not tell, do nothing."""
    if device.startswith("cpu"):
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler
        except ImportError:
            return
        get_cpp_compiler()
