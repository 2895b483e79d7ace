"""Compiling what a training step runs."""

import warnings
from typing import Literal

import torch
from torch import nn

from tinygpt.compiler import compiler_problem
from tinygpt.losses import LossFunction

Compile = bool | Literal["auto", "block", "model"]
"""What `TrainerConfig.compile` may be."""


def compile_parts(model: nn.Module, loss_fn: LossFunction, setting: Compile, device: torch.device) -> LossFunction:
    """Prepare the compilation that a setting asks for, which happens at the first step; without a compiler warn.

    Neither way wraps the model or renames a parameter, so checkpoints are the same with and without.

    Args:
        model: Compiled block by block for `True`, `"block"` and, on CUDA, `"auto"`: equal blocks share their code, so
            that depth costs no compilation. A model without `blocks` is compiled as one.
        loss_fn: Compiled with all it calls for `"model"`.
        setting: As in `TrainerConfig`.
        device: Where the model is.

    Returns:
        What to call on each micro-batch.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return loss_fn
    if (problem := compiler_problem(device)) is not None:
        # Also for "auto": on a GPU it costs speed, and people do not expect it.
        warnings.warn(f"training runs uncompiled, compile=False says so silently: {problem}", stacklevel=3)
        return loss_fn
    if setting == "model":
        return torch.compile(loss_fn, dynamic=False)
    blocks = getattr(model, "blocks", [model])
    for block in blocks:
        block.compile(dynamic=False)
    return loss_fn
