"""Measuring a step: its time, its share of the device's peak, and the rates it was made with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tinygpt import metrics
from tinygpt.metrics import StepMetrics, Stopwatch
from tinygpt.trainer._step import StepResult


class Meter:
    """Turns what a step did into a `StepMetrics`.

    Args:
        model: Asked for its FLOPs per token, if it has `flops_per_token`.
        device: Where it computes.
        dtype: In what it computes.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.watch = Stopwatch()
        self._model = model
        self._device = device
        self._peak_flops = metrics.peak_flops(device, dtype)
        self._flops: dict[int, int | None] = {}

    def measure(
        self, index: int, result: StepResult, lead: Mapping[str, Any], *, tokens: int, epoch: int | None
    ) -> StepMetrics:
        """End the lap that the watch began with the step, and return everything about the step.

        Args:
            index: The step.
            result: What it did.
            lead: The options of the optimizer group whose rates are shown.
            tokens: Tokens of the run so far.
            epoch: Passes over the data so far.
        """
        speed = result.tokens / self.watch.stop()
        flops = self._flops_per_token(result.seq_len)
        return StepMetrics(
            index=index,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=float(lead["lr"]),
            weight_decay=float(lead.get("weight_decay", 0.0)),
            momentum=lead.get("momentum"),
            tokens=tokens,
            epoch=epoch,
            tokens_per_second=speed,
            mfu=None if flops is None or not self._peak_flops else speed * flops / self._peak_flops,
            peak_memory_bytes=metrics.peak_memory_bytes(self._device),
            elapsed_seconds=self.watch.elapsed,
        )

    def _flops_per_token(self, seq_len: int) -> int | None:
        if seq_len not in self._flops:
            count = getattr(self._model, "flops_per_token", None)
            self._flops[seq_len] = None if count is None else count(seq_len)
        return self._flops[seq_len]
