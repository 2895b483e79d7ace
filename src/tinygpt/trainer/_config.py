"""The settings of a training run that are saved with it."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from tinygpt.config import Config

Positive = Annotated[int, Field(ge=1)]


class TrainerConfig(Config):
    """How long to train, in which precision, and what to write where.

    Args:
        num_steps: Optimizer steps of the whole run, those before a resume included.
        batch_tokens: Tokens of one step; a multiple of the loader's batch, which is then one micro-batch of several.
            `None` for one micro-batch a step.
        precision: Dtype of activations and matrix products. `"auto"` takes bfloat16 on a GPU that multiplies it fast
            and float32 elsewhere, and leaves a model alone that was given a compute dtype already.
        grad_clip: Largest norm of the gradient; a larger one is scaled down to it. `None` for no clipping.
        out_dir: Folder for `metrics.jsonl` and `checkpoints/`; `None` writes nothing.
        save_every: Save a checkpoint whenever the number of finished steps is a multiple of this, and at the end;
            `None` saves at the end alone. Needs `out_dir`.
        keep_last: How many checkpoints to keep, the newest; `None` for all.
        compile: Compile each block with `torch.compile` at its first use.

    Raises:
        ConfigError: If a field is out of range.
    """

    num_steps: Positive
    batch_tokens: Positive | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    out_dir: str | Path | None = None
    save_every: Positive | None = None
    keep_last: Positive | None = 3
    compile: bool = False


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `precision` means on a device."""
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
