"""A copy of a state in the computer's memory, to be written while training goes on."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


class SnapshotMemory:
    """Memory that the tensors of a state are copied into, kept from one checkpoint to the next.

    Kept, because new memory costs several times the copy itself, and because what was there for the first checkpoint
    is then there for the last. Memory for tensors of a GPU is page-locked, which makes their transfer fast.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy all tensors to the CPU; the next call overwrites the copies.

        Raises:
            MemoryError: If there is no memory for them; what was kept is given back then.
        """
        lacking = {name: tensor for name, tensor in tensors.items() if not self._fits(name, tensor)}
        needed = sum(tensor.numel() * tensor.element_size() for tensor in lacking.values())
        try:
            free = free_memory()
            if free is not None and needed > 0.9 * free:  # the system would rather kill us than refuse
                raise MemoryError(f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} are free")
            self._buffers = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                if name in lacking
                else self._buffers[name]
                for name, tensor in tensors.items()
            }
        except (MemoryError, RuntimeError) as error:  # torch reports the lack of memory as a RuntimeError
            self._buffers = {}
            raise MemoryError(str(error)) from None
        for name, buffer in self._buffers.items():
            buffer.copy_(tensors[name], non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return dict(self._buffers)

    def _fits(self, name: str, tensor: Tensor) -> bool:
        buffer = self._buffers.get(name)
        return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


def free_memory() -> int | None:
    """Return the bytes of memory that can still be had, as far as Linux and its control groups tell; else `None`."""
    try:
        free = _number_after("MemAvailable:", Path("/proc/meminfo")) * 1024
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        cached = _number_after("inactive_file", group / "memory.stat")  # files read or written, given up when needed
    except (OSError, StopIteration, ValueError):  # no control group, or "max"
        return free
    return min(free, limit - used + cached)


def _number_after(word: str, path: Path) -> int:
    return next(int(line.split()[1]) for line in path.read_text("ascii").splitlines() if line.startswith(f"{word} "))
