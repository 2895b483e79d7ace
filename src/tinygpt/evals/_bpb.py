"""Bits per byte: loss that can be compared across tokenizers."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt._numbers import check_whole, given
from tinygpt.data import IGNORE_INDEX, Batch, ValidationSet
from tinygpt.errors import ConfigError, DataError

NO_TEXT = "the validation set has no text: every target is a special token or ignored."


@dataclass(frozen=True)
class BpbReport:
    """Bits per byte, and on what it was measured.

    Attributes:
        bpb: Bits the model needs a byte of text.
        loss: The same sum as mean nats a token.
        num_tokens: Tokens counted; special tokens are not.
        num_bytes: UTF-8 bytes of those tokens.
        data_hash: Hash of the validation set; figures with different hashes cannot be compared.
    """

    bpb: float
    loss: float
    num_tokens: int
    num_bytes: int
    data_hash: str

    def compare(self, other: "BpbReport") -> float:
        """Return how many bits per byte `other` needs more than this; below 0 where it is better.

        Warns when the two were measured on different validation sets: the difference then says more about the texts
        than about the models.

        Example:
            ```python
            from tinygpt.evals import BpbReport

            before = BpbReport(bpb=1.02, loss=2.9, num_tokens=1000, num_bytes=4100, data_hash="5f1c")
            after = BpbReport(bpb=0.98, loss=2.8, num_tokens=1000, num_bytes=4100, data_hash="5f1c")
            before.compare(after)  # -0.04
            ```
        """
        if self.data_hash != other.data_hash:
            warnings.warn(
                f"bits per byte of different validation sets are compared: {self.data_hash[:12]} and "
                f"{other.data_hash[:12]}; measure both models on one set.",
                stacklevel=2,
            )
        return other.bpb - self.bpb

    def __str__(self) -> str:
        return f"{self.bpb:.4f} bits per byte on {self.num_bytes:,} bytes ({self.data_hash[:8]})"


@torch.no_grad()
def evaluate_bpb(model: nn.Module, validation: ValidationSet, *, micro_batch_rows: int | None = None) -> BpbReport:
    """Measure bits per byte on a frozen validation set.

    Targets without bytes, which are the special tokens, are not counted. The model is called in evaluation mode and
    its mode is put back.

    Args:
        model: A `GPT`, or any model that returns logits `(batch, seq, vocab)` for token ids `(batch, seq)`.
        validation: The set.
        micro_batch_rows: Rows that are computed at a time, such as `trainer.micro_batch_rows`: then an evaluation never
            needs more memory than a step. `None` for those of the set's batches.

    Returns:
        The figure with the hash of the set.

    Raises:
        ConfigError: If `validation` is no such set, or `micro_batch_rows` is not positive.
        DataError: If the set has no text.

    References:
        The measure of Gao et al., [The Pile](https://arxiv.org/abs/2101.00027), 2020.
    """
    if not isinstance(validation, ValidationSet):
        raise ConfigError(
            f"bits per byte are measured on a ValidationSet, not on a {type(validation).__name__}; make one with "
            "ValidationSet.from_source(source, tokenizer, rows=..., seq_len=...)."
        )
    check_whole(**given(micro_batch_rows=micro_batch_rows))
    if micro_batch_rows is not None and micro_batch_rows < 1:
        raise ConfigError(f"micro_batch_rows={micro_batch_rows} is no number of rows; choose 1 or more.")
    device = next(model.parameters()).device
    token_bytes = validation.token_bytes.to(device)
    sums: list[Tensor] = []  # stay on the device, so that no batch waits for the one before
    counted = torch.zeros(2, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        for cpu_batch in validation:
            for parts in zip(*(torch.split(part, micro_batch_rows or len(part)) for part in cpu_batch), strict=True):
                batch = Batch(*parts).to(device)
                num_bytes = target_bytes(batch.targets, token_bytes)
                losses = token_losses(model, batch)
                sums.append((losses * (num_bytes > 0)).sum())
                counted += torch.stack(((num_bytes > 0).sum(), num_bytes.sum()))
    finally:
        model.train(was_training)
    num_tokens, total_bytes = counted.tolist()
    if not total_bytes:
        raise DataError(NO_TEXT)
    nats = float(torch.stack(sums).cpu().double().sum())
    return BpbReport(
        bpb=nats / math.log(2) / total_bytes,
        loss=nats / num_tokens,
        num_tokens=num_tokens,
        num_bytes=total_bytes,
        data_hash=validation.hash,
    )


def unigram_bpb(training: Iterable[Batch], validation: ValidationSet) -> float:
    """Return the bits per byte of the model that knows token frequencies and nothing else.

    Every model worth its electricity lies well below. Counts come from the training targets, with one added to each.

    Args:
        training: Some batches of training data.
        validation: The set to measure on.

    Raises:
        DataError: If the validation set has no text.
    """
    token_bytes = validation.token_bytes
    counts = torch.ones(len(token_bytes), dtype=torch.float64)
    for batch in training:
        targets = batch.targets[batch.targets != IGNORE_INDEX]
        counts += torch.bincount(targets, minlength=len(token_bytes))
    # Special tokens are not counted below, so they take no share here either.
    counts[token_bytes == 0] = 0
    bits = -(counts / counts.sum()).log2()
    total_bits, total_bytes = 0.0, 0
    for batch in validation:
        num_bytes = target_bytes(batch.targets, token_bytes)
        total_bits += float(bits[batch.targets[num_bytes > 0]].sum())
        total_bytes += int(num_bytes.sum())
    if not total_bytes:
        raise DataError(NO_TEXT)
    return total_bits / total_bytes


def target_bytes(targets: Tensor, token_bytes: Tensor) -> Tensor:
    """Return the bytes of each target, 0 where ignored: `(batch, seq)`."""
    ignored = targets == IGNORE_INDEX
    return token_bytes[targets.masked_fill(ignored, 0)].masked_fill(ignored, 0)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each target in nats, by the model's own method if it has one: `(batch, seq)`."""
    own = getattr(model, "token_losses", None)
    if callable(own):
        return own(batch.inputs, batch.targets)
    logits: Tensor = model(batch.inputs)
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(), batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view(batch.targets.shape)
