"""One optimizer step: micro-batches in, changed weights out."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tinygpt.data import Batch
from tinygpt.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from tinygpt.losses import LossFunction, LossSum
from tinygpt.trainer._batches import find_non_finite, read_micro_batches, to_device


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
        self._optimizer.step()
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
        grad_clip: Largest norm of the gradient.
        update: Lets the optimizer change the weights.
        last_saved: Returns the last good checkpoint, for messages.

    Raises:
        ConfigError: If batches do not make up `batch_tokens`, or `loss_fn` returns something else.
        DataError: If the batches end or hold no target.
        NonFiniteError: If loss or gradient is not finite; weights and optimizer are as before.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = next(model.parameters()).device
    model.train()
    model.zero_grad()  # whatever a failed step or the user's own backward left there
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    read: list[Batch] = []
    expected = 0
    for batch in read_micro_batches(batches, batch_tokens, index):
        expected = batch_tokens or batch.targets.numel()
        read.append(batch)
        loss = loss_fn(model, to_device(batch, device))
        if not isinstance(loss, LossSum):
            raise ConfigError(f"loss_fn returned a {type(loss).__name__}; return LossSum(sum, count), not a mean.")
        # Divided by the number of positions here and by the number of targets below where they differ: one
        # global count over all micro-batches, without waiting for the device to count.
        (loss.total / expected).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.total.detach().float())
        counts.append(loss.count)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).float()
    # The only wait for the device in a step: all numbers in one transfer. float32 counts exactly to 16.7 million.
    numbers = torch.stack([*losses, *(count.float() for count in counts), norm]).tolist()
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
