"""What torch.autocast asks of functions that it does not reach by itself."""

import torch
from torch import Tensor


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return what a tensor is computed in: its own dtype, or that of an autocast around, which leaves float64 alone."""
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)  # for the meta device it cannot even be asked
    return torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
