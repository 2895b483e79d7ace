"""How much memory there is to train in."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from tinygpt.errors import ConfigError

# Left alone on a GPU that is in use: 5 % for what the allocator cannot put together again, at least 256 MiB.
_SPARED_SHARE, _SPARED_LEAST = 0.05, 256 * 2**20


class _Version(NamedTuple):
    """Of control groups: the folder inside the mount, files, and what of the use is given up when memory is wanted."""

    inside: str
    limit: str
    use: str
    given_up: str


_CGROUPS = (
    _Version("", "memory.max", "memory.current", "inactive_file"),
    _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device | str) -> int:
    """Return the bytes on a device that this process can still take, what it keeps unused included.

    On a GPU what is free there, less a reserve of 5 % for fragmentation. On a CPU what Linux calls available, or what
    the limits of its control groups leave, whichever is less; elsewhere half of the machine's memory.

    Raises:
        ConfigError: If nobody tells.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + unused - max(_SPARED_LEAST, int(_SPARED_SHARE * total)))
    if device.type == "cpu":
        groups = Path("/proc/self/cgroup")
        group = _group_memory(Path("/sys/fs/cgroup"), groups.read_text() if groups.exists() else "")
        found = [size for size in (_system_memory(), group) if size is not None]
        if found:
            return min(found)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    raise ConfigError(f"how much memory {device} has is not told; give micro_batch_rows as a number.")


def _system_memory() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _group_memory(root: Path, own: str = "") -> int | None:
    """Return what the limits of this process's control groups leave; `None` without one.

    Args:
        root: Where they are mounted.
        own: Which they are, as `/proc/self/cgroup` says. In a container that is the root; a batch system as Slurm sets
            the limit further down, and each one above counts as well.
    """
    folders = {Path(line.split(":", 2)[-1].lstrip("/")) for line in own.splitlines()} | {Path()}
    folders |= {parent for folder in folders for parent in folder.parents}
    left = [
        size
        for version in _CGROUPS
        for folder in folders
        if (size := _left_in(root / version.inside / folder, version)) is not None
    ]
    return min(left, default=None)


def _left_in(folder: Path, version: _Version) -> int | None:
    try:
        limit, use = (folder / version.limit).read_text().strip(), int((folder / version.use).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if not limit.isdecimal() or int(limit) >= 2**60:  # "max", or version 1's number for none
        return None
    files = sum(int(line.split()[1]) for line in lines if line.startswith(f"{version.given_up} "))
    return max(0, int(limit) - use + files)
