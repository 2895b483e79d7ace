"""The forward and backward passes of a step, with fewer rows at a time if memory runs out."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tinygpt.data import Batch
from tinygpt.errors import ConfigError
from tinygpt.losses import LossFunction, LossSum
from tinygpt.trainer._batches import read_micro_batches, to_device
from tinygpt.trainer._micro_batches import MicroBatchRows
from tinygpt.trainer._random import random_state, restore_random_state

# How torch says that memory is out where it has no exception of its own for it: on a CPU under Linux, under Windows,
# on Apple's GPUs, and on NVIDIA's where a library or the driver asks for it.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass
class Sums:
    """What the micro-batches of a step gave; gradients are in the parameters, divided by `expected`.

    Attributes:
        expected: Positions of the step.
        batches: The micro-batches as they were computed.
        losses: Sum of each.
        counts: Targets of each.
    """

    expected: int = 0
    batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)


def accumulate(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterator[Batch],
    *,
    index: int,
    batch_tokens: int | None,
    rows: MicroBatchRows,
    device: torch.device,
) -> Sums:
    """Add up the gradients of one step's micro-batches.

    Where memory runs out and the rows may be chosen, everything is done again from the first batch with half as many:
    nothing that was read is lost.

    Raises:
        ConfigError: If batches do not make up `batch_tokens`, `loss_fn` returns something else, a row does not fit, or
            the attention backend that was demanded cannot serve the model.
        DataError: If the batches end.
    """
    read: list[Batch] = []
    fresh = read_micro_batches(batches, batch_tokens, index)
    random = random_state() if rows.auto else None
    while True:
        model.zero_grad()  # whatever a failed step or the user's own backward left there
        sums = Sums()
        for whole, part in _parts(read, fresh, rows):
            sums.expected = batch_tokens or whole
            try:
                _add(sums, model, loss_fn, part, device)
            except (RuntimeError, MemoryError) as error:
                cause = error.__context__
                if isinstance(cause, ConfigError) and type(error).__name__ == "InternalTorchDynamoError":
                    raise ConfigError(str(cause).partition("\n")[0]) from None  # its rest is where the compiler stood
                if random is None and is_out_of_memory(error):
                    error.add_note("micro_batch_rows='auto' computes fewer rows at a time when memory runs out.")
                if random is None or not is_out_of_memory(error):
                    raise
                used = max(len(each.inputs) for each in [*sums.batches, part])  # the last part may be a smaller one
                break
        else:
            return sums
        # Not in the handler, where the traceback still holds what was computed.
        rows.step_down(used, index)
        sums = Sums()
        model.zero_grad()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        restore_random_state(random)


def _parts(read: list[Batch], fresh: Iterator[Batch], rows: MicroBatchRows) -> Iterator[tuple[int, Batch]]:
    """Yield the parts of what was read before, then of new batches, which are kept; with the positions of the whole."""
    for batch in _again(read, fresh):
        for part in rows.split(batch):
            yield batch.targets.numel(), part


def _again(read: list[Batch], fresh: Iterator[Batch]) -> Iterator[Batch]:
    yield from tuple(read)
    for batch in fresh:
        read.append(batch)
        yield batch


def _add(sums: Sums, model: nn.Module, loss_fn: LossFunction, part: Batch, device: torch.device) -> None:
    loss = loss_fn(model, to_device(part, device))
    if not isinstance(loss, LossSum):
        raise ConfigError(f"loss_fn returned a {type(loss).__name__}; return LossSum(sum, count), not a mean.")
    # Divided by the number of positions here and by the number of targets later where they differ: one global count
    # over all micro-batches, without waiting for the device to count.
    (loss.total / sums.expected).backward()  # type: ignore[no-untyped-call]
    sums.batches.append(part)
    sums.losses.append(loss.total.detach().float())
    sums.counts.append(loss.count)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that there is no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
