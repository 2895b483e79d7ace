"""Compiling what a training step runs."""

import warnings
from typing import Literal

import torch
from torch import nn

from tinygpt.compiler import compiler_problem
from tinygpt.data import Batch
from tinygpt.losses import LossFunction, LossSum

Compile = bool | Literal["auto", "block", "model"]
"""What `TrainerConfig.compile` may be."""


def compile_parts(model: nn.Module, loss_fn: LossFunction, setting: Compile, device: torch.device) -> LossFunction:
    """Prepare the compilation that a setting asks for, which happens at the first step; without a compiler warn.

    Neither way wraps the model or renames a parameter, so checkpoints are the same with and without.

    Args:
        model: Compiled block by block for `True`, `"block"` and, on CUDA, `"auto"`: equal blocks share their code, so
            that depth costs no compilation. A model without `blocks` is compiled as one where it is asked for;
            `"auto"` leaves it alone, as nobody knows how a foreign model compiles, or to which lengths.
        loss_fn: Compiled with all it calls for `"model"`.
        setting: As in `TrainerConfig`.
        device: Where the model is.

    Returns:
        What to call on each micro-batch.
    """
    blocks = getattr(model, "blocks", None)
    parts = list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else []
    if setting is False or (setting == "auto" and (device.type != "cuda" or not parts)):
        return loss_fn
    if (problem := compiler_problem(device)) is not None:
        # Also for "auto": on a GPU it costs speed, and people do not expect it.
        warnings.warn(f"training runs uncompiled, compile=False says so silently: {problem}", stacklevel=3)
        return loss_fn
    if setting == "model":
        return _keeping_little(torch.compile(loss_fn, dynamic=False))
    for part in parts or [model]:
        part.compile(dynamic=False)
    return _keeping_little(loss_fn)


def _keeping_little(loss_fn: LossFunction) -> LossFunction:
    """Return a loss whose compiled parts keep for the backward pass what they keep without a compiler, or less.

    Left alone, the compiler keeps whatever a matrix product of the backward pass reads, though one pass over memory
    would make it again: the square beside the hidden layer it is made of, and weights in bfloat16. Of the documented
    model that would be 2.5 GiB more at 8 x 2,048.
    """
    import torch._functorch.config as choices  # part of the compiler, which is there by now

    private = "ban_recompute_materialized_backward"  # the same from torch 2.9 to 2.13; another may do without
    if not hasattr(choices, private):
        return loss_fn

    def compiled(model: nn.Module, batch: Batch) -> LossSum:
        with choices.patch({private: False}):  # read when a part is compiled, in its first call
            return loss_fn(model, batch)

    return compiled
