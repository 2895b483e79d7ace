"""How a model computes: in which dtype and products, and what it computes again."""

import warnings

import torch
from torch import nn

from tinygpt.errors import ConfigError
from tinygpt.layers import set_matmul_precision
from tinygpt.trainer._config import TrainerConfig


def prepare_model(model: nn.Module, config: TrainerConfig, device: torch.device) -> torch.dtype:
    """Make a model compute as the settings say, and return its dtype.

    Raises:
        ConfigError: If it cannot.
    """
    set_matmul_precision(model, config.matmul_precision)  # also None: an earlier trainer may have set something
    dtype = set_precision(model, config.precision, device)
    if config.activation_checkpointing is not None:
        setter = getattr(model, "set_activation_checkpointing", None)
        if setter is None:
            raise ConfigError(
                f"activation_checkpointing={config.activation_checkpointing!r} needs a model with "
                "set_activation_checkpointing(), as GPT has; in another model use torch.utils.checkpoint."
            )
        setter(config.activation_checkpointing)
    return dtype


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations and products that a setting means on a device.

    Args:
        precision: `"float32"`, `"bfloat16"`, or `"auto"` for bfloat16 where products of it are fast.
        device: The device.
    """
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    return torch.bfloat16 if multiplies_bfloat16_fast(device) else torch.float32


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Return whether bfloat16 products run on matrix units: on NVIDIA GPUs from Ampere on, and on ROCm.

    On CPUs without such units they are 20 to 40 times slower than float32 (measured on AVX2), on those with them
    float32 is still the safe choice; on Apple GPUs they bring little.
    """
    return device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    )


def set_precision(model: nn.Module, precision: str, device: torch.device) -> torch.dtype:
    """Give the model its compute dtype and return it."""
    setter = getattr(model, "set_compute_dtype", None)
    chosen = getattr(model, "compute_dtype", None)
    dtype = chosen if precision == "auto" and chosen is not None else resolve_precision(precision, device)
    if setter is not None:
        # Nothing to set for float32 on its own: the model then follows its embedding, also on another device later.
        # Unless that is stored in fewer bits, which says nothing of how to compute.
        narrow = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
        setter(None if precision == "auto" and chosen is None and dtype == torch.float32 and not narrow else dtype)
    elif precision == "bfloat16":
        raise ConfigError(
            "precision='bfloat16' needs a model with set_compute_dtype(), as GPT has; "
            "for another model use torch.autocast inside loss_fn and precision='auto'."
        )
    else:
        dtype = next(model.parameters()).dtype
    if dtype == torch.bfloat16 and not multiplies_bfloat16_fast(device):
        warnings.warn(f"bfloat16 products are slow on this {device.type} device; float32 is faster.", stacklevel=3)
    return dtype
