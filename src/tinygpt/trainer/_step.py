"""One optimizer step: micro-batches in, changed weights out."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from tinygpt.data import Batch
from tinygpt.errors import CheckpointError, DataError, NonFiniteError
from tinygpt.losses import LossFunction
from tinygpt.trainer._accumulate import accumulate, is_out_of_memory
from tinygpt.trainer._batches import find_non_finite
from tinygpt.trainer._micro_batches import MicroBatchRows


class StepResult(NamedTuple):
    """What a step did."""

    loss: float
    grad_norm: float
    tokens: int
    seq_len: int


class Update:
    """The optimizer's change of the weights, which an error or a second Ctrl-C can cut short.

    Attributes:
        torn: Whether that happened: some weights are changed and some are not.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.torn = False

    def __call__(self) -> None:
        self.torn = True
        try:
            self._optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                error.add_note(
                    "Memory ran out in the optimizer, whose state is made in the first step; fewer rows do not help "
                    "there. Take a smaller model, store the token tables in bfloat16, or leave more memory free."
                )
            raise
        self.torn = False

    def check(self) -> None:
        """Refuse to go on with weights, or to save them, of which some are changed and some are not.

        Raises:
            CheckpointError: If it happened.
        """
        if self.torn:
            raise CheckpointError(
                "the last step was cut short while the optimizer changed the weights, by an error or a second Ctrl-C: "
                "some are changed and some are not. Load the last checkpoint first, with resume() or load_state(), or "
                "build model, optimizer and trainer anew."
            )


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFunction,
    batches: Iterator[Batch],
    *,
    index: int,
    batch_tokens: int | None,
    rows: MicroBatchRows,
    grad_clip: float | None,
    update: Update,
    last_saved: Callable[[], Path | None],
) -> StepResult:
    """Add up the gradients of one step's micro-batches, check them, and let the optimizer change the weights.

    Args:
        model: What `loss_fn` is called with.
        optimizer: Its rates are those of this step already.
        loss_fn: Returns a sum and a count.
        batches: Where micro-batches come from.
        index: Number of the step, for messages.
        batch_tokens: Tokens of a step; `None` for one micro-batch.
        rows: How many rows are computed at a time.
        grad_clip: Largest norm of the gradient.
        update: Lets the optimizer change the weights.
        last_saved: Returns the last good checkpoint, for messages.

    Raises:
        ConfigError: If batches do not make up `batch_tokens`, `loss_fn` returns something else, or memory runs out with
            a single row.
        DataError: If the batches end or hold no target.
        NonFiniteError: If loss or gradient is not finite; weights and optimizer are as before.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = next(model.parameters()).device
    model.train()
    sums = accumulate(model, loss_fn, batches, index=index, batch_tokens=batch_tokens, rows=rows, device=device)
    expected, read = sums.expected, sums.batches
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).float()
    # The only wait for the device in a step: all numbers in one transfer. float32 counts exactly to 16.7 million.
    numbers = torch.stack([*sums.losses, *(count.float() for count in sums.counts), norm]).tolist()
    totals, count = numbers[: len(read)], sum(numbers[len(read) : -1])
    if count == 0:
        optimizer.zero_grad()
        raise DataError(f"step {index} has no target to train on: all of its batches are masked.")
    mean, grad_norm = sum(totals) / count, numbers[-1] * expected / count
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        where = find_non_finite(model, loss_fn, read, totals, device)
        what = f"the loss is not finite in {where}" if where else f"losses are finite, the gradient norm is {grad_norm}"
        raise NonFiniteError(
            f"step {index}: {what}. The weights were not changed. Last good checkpoint: "
            f"{last_saved() or 'none was saved'}. Lower the learning rate, set grad_clip, or look at those rows."
        )
    factor = expected / count
    if grad_clip is not None and grad_norm > grad_clip:
        factor *= grad_clip / grad_norm
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    update()
    optimizer.zero_grad()
    return StepResult(mean, grad_norm, expected, read[0].inputs.shape[1])
