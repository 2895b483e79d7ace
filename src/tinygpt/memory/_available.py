"""How much memory there is to train in."""

import os
from pathlib import Path

import torch

from tinygpt.errors import ConfigError

# Left alone on a GPU that is in use: 5 % for what the allocator cannot put together again, at least 256 MiB.
_SPARED_SHARE, _SPARED_LEAST = 0.05, 256 * 2**20

_CGROUPS = (
    # Limit, use, and in the statistics the files that are given up when memory is wanted: versions 2 and 1.
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory(device: torch.device | str) -> int:
    """Return the bytes on a device that this process can still take, what it keeps unused included.

    On a GPU what is free there, less a reserve of 5 % for fragmentation. On a CPU what Linux calls available, or what
    the limit of the control group leaves, whichever is less; elsewhere half of the machine's memory.

    Raises:
        ConfigError: If nobody tells.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + unused - max(_SPARED_LEAST, int(_SPARED_SHARE * total)))
    if device.type == "cpu":
        found = [size for size in (_system_memory(), _group_memory(Path("/sys/fs/cgroup"))) if size is not None]
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


def _group_memory(root: Path) -> int | None:
    """Return what the limit of the control group leaves; `None` without one."""
    for limit_file, use_file, statistics, given_up in _CGROUPS:
        try:
            limit, use = (root / limit_file).read_text().strip(), int((root / use_file).read_text())
            lines = (root / statistics).read_text().splitlines()
        except (OSError, ValueError):
            continue
        if not limit.isdecimal() or int(limit) >= 2**60:  # "max", or version 1's number for none
            continue
        files = sum(int(line.split()[1]) for line in lines if line.startswith(f"{given_up} "))
        return max(0, int(limit) - use + files)
    return None
