"""Losses: functions of a model and a batch that return a sum and a count, never a mean.

With masked targets the mean of micro-batch means is wrong; sums over the global count add up to the loss of one
big batch, and a micro-batch without a single target adds nothing instead of NaN.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt.data import IGNORE_INDEX, Batch
from tinygpt.errors import ConfigError


class LossSum(NamedTuple):
    """A loss before division.

    Attributes:
        total: Summed loss in nats, a scalar with gradients.
        count: Number of targets in the sum, an integer scalar.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


LossFunction = Callable[[nn.Module, Batch], LossSum]
"""What `Trainer` calls on each micro-batch."""


def next_token_loss(model: nn.Module, batch: Batch) -> LossSum:
    """Cross-entropy of every target that is not `IGNORE_INDEX`.

    A model with a method `loss(inputs, targets) -> (total, count)`, such as `GPT`, computes it itself without full
    logits; any other model is called as `model(inputs)` and must return logits `(batch, seq, vocab)`.

    Args:
        model: The model.
        batch: Inputs and targets, `(batch, seq)` int64 each.

    Returns:
        Sum in nats and count.

    Raises:
        ConfigError: If the model returns something else than logits for every target.
    """
    own_loss = getattr(model, "loss", None)
    if inspect.ismethod(own_loss):  # and not a module such as nn.CrossEntropyLoss that happens to have this name
        return LossSum(*own_loss(batch.inputs, batch.targets))
    logits: Tensor = model(batch.inputs)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != batch.targets.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ConfigError(
            f"{type(model).__name__} returned {found}, not logits (batch, seq, vocab) for targets "
            f"{tuple(batch.targets.shape)}; give a loss_fn that makes a LossSum of what it returns."
        )
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return LossSum(total, (batch.targets != IGNORE_INDEX).sum())
