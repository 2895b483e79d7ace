"""The micro-batches of a step: read, checked, moved to the device, and searched when their loss is not finite."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from tinygpt.data import Batch
from tinygpt.errors import ConfigError, DataError
from tinygpt.losses import LossFunction


def read_micro_batches(batches: Iterator[Batch], batch_tokens: int | None, step: int) -> Iterator[Batch]:
    """Yield the batches that make up one step, read one at a time so that reading overlaps with the GPU's work.

    Raises:
        ConfigError: If a whole number of the loader's batches does not make up `batch_tokens`.
        DataError: If the loader ends, or its batches differ in shape within the step.
    """
    shape: torch.Size | None = None
    left = 1
    while left:
        try:
            batch = next(batches)
        except StopIteration:
            raise DataError(
                f"the loader ended in step {step} with {left} micro-batches of the step to come; "
                "give one that goes on, such as BatchLoader or itertools.cycle(batches)."
            ) from None
        if not isinstance(batch, Batch):
            raise DataError(f"the loader gave a {type(batch).__name__}; it must give Batch(inputs, targets).")
        if shape is None:
            shape = batch.targets.shape
            wanted, tokens = batch_tokens or shape.numel(), shape.numel()
            if not tokens or wanted % tokens:
                size = " x ".join(map(str, shape))
                raise ConfigError(
                    f"batch_tokens={wanted} is not a multiple of the loader's batch of {size} = {tokens} tokens; "
                    f"{fitting(wanted, tokens)}."
                )
            left = wanted // tokens
        elif batch.targets.shape != shape:
            shapes = f"{tuple(shape)} and {tuple(batch.targets.shape)}"
            raise DataError(f"step {step} got micro-batches of shapes {shapes}; they must be alike.")
        left -= 1
        yield batch


def fitting(wanted: int, tokens: int) -> str:
    """Return what to choose instead of a number that is no multiple of the tokens of a micro-batch."""
    below = wanted - wanted % tokens if tokens else 0
    return f"choose {below} or {below + tokens}" if below else f"choose {tokens} or a multiple of it, or fewer rows"


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; to a GPU from pinned memory, since only then the copy does not wait for the GPU's earlier work."""
    if device.type != "cuda":
        return batch.to(device)
    return Batch(*(part.pin_memory() for part in batch)).to(device, non_blocking=True)


def find_non_finite(
    model: nn.Module, loss_fn: LossFunction, batches: list[Batch], totals: list[float], device: torch.device
) -> str:
    """Say in which micro-batches and rows the loss is not finite, by computing it row by row.

    Uncompiled, as single rows would be a new shape to compile, for minutes, before anything is said.
    """
    places = []
    for index, total in enumerate(totals):
        if math.isfinite(total):
            continue
        rows = []
        for row in range(len(batches[index].inputs)):
            single = Batch(*(part[row : row + 1] for part in batches[index]))
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                if not math.isfinite(float(loss_fn(model, to_device(single, device)).total)):
                    rows.append(str(row))
        places.append(f"micro-batch {index} " + (f"rows {', '.join(rows)}" if rows else "as a whole"))
    return "; ".join(places)
