"""The loss at each position of a row: what the model gains from more context."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinygpt.data import ValidationSet
from tinygpt.errors import ConfigError, DataError
from tinygpt.evals._bpb import NO_TEXT, target_bytes, token_losses
from tinygpt.evals._scoring import device_of, evaluating


@dataclass(frozen=True)
class PositionCurve:
    """Loss by position; every field has one entry for each bucket of positions that holds a counted target.

    Attributes:
        starts: First position of each bucket; position 0 predicts the second token of a row.
        ends: Where it ends, not included.
        loss: Mean nats a token.
        loss_error: Standard error of that mean, which takes the tokens of one row as one observation.
        bpb: Bits a byte.
        bpb_error: Its standard error.
        num_tokens: Counted targets; special tokens and masked ones are not.
        data_hash: Hash of the validation set.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    loss: tuple[float, ...]
    loss_error: tuple[float, ...]
    bpb: tuple[float, ...]
    bpb_error: tuple[float, ...]
    num_tokens: tuple[int, ...]
    data_hash: str


def loss_by_position(model: nn.Module, validation: ValidationSet, *, num_buckets: int | None = None) -> PositionCurve:
    """Measure loss and bits per byte at each position of the rows of a validation set.

    A curve that still falls at its end says that a longer context would help; one that rises there, that the model
    handles late positions badly. Rows hold several documents, so a late position need not have a long past of its own.

    Args:
        model: As for `evaluate_bpb`.
        validation: The set.
        num_buckets: Put the positions into so many buckets of equal width; None takes each position by itself.

    Raises:
        ConfigError: If `num_buckets` is not between 1 and the number of positions.
        DataError: If the set has no text.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.data import ValidationSet, embedded_corpus
        from tinygpt.evals import loss_by_position
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(1, vocab_size=257, max_seq_len=64))
        source = embedded_corpus("validation")
        validation = ValidationSet.from_source(source, ByteTokenizer(), rows=8, seq_len=64, max_tokens=10_000)
        curve = loss_by_position(model, validation, num_buckets=8)
        print(curve.bpb)
        ```
    """
    seq_len = validation.token_rows.shape[1] - 1
    if num_buckets is not None and not 1 <= num_buckets <= seq_len:
        raise ConfigError(f"num_buckets={num_buckets} must lie between 1 and the {seq_len} positions of a row.")
    buckets = seq_len if num_buckets is None else num_buckets
    edges = [round(index * seq_len / buckets) for index in range(buckets + 1)]
    owner = torch.bucketize(torch.arange(seq_len), torch.tensor(edges[1:-1]), right=True)
    device = device_of(model)
    token_bytes = validation.token_bytes.to(device)
    sums: list[Tensor] = []
    with evaluating(model):
        for cpu_batch in validation:
            batch = cpu_batch.to(device)
            num_bytes = target_bytes(batch.targets, token_bytes)
            counted = num_bytes > 0
            nats = token_losses(model, batch) * counted
            found = torch.stack((nats.cpu().double(), counted.cpu().double(), num_bytes.cpu().double()))
            # (3, rows, seq) -> (3, rows, buckets)
            sums.append(found.new_zeros(*found.shape[:2], buckets).index_add_(2, owner, found))
    nats, tokens, num_bytes = torch.cat(sums, dim=1)
    kept = [index for index in range(buckets) if tokens[:, index].any()]
    if not kept:
        raise DataError(NO_TEXT)
    loss, loss_error = _ratios(nats[:, kept], tokens[:, kept])
    bpb, bpb_error = _ratios(nats[:, kept] / math.log(2), num_bytes[:, kept])
    return PositionCurve(
        starts=tuple(edges[index] for index in kept),
        ends=tuple(edges[index + 1] for index in kept),
        loss=loss,
        loss_error=loss_error,
        bpb=bpb,
        bpb_error=bpb_error,
        num_tokens=tuple(int(count) for count in tokens[:, kept].sum(dim=0)),
        data_hash=validation.hash,
    )


def _ratios(amounts: Tensor, weights: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return sum of amounts over sum of weights and its standard error, over the rows of `(rows, buckets)`.

    Neighbouring tokens are alike, so rows and not tokens are taken as independent: the error of a ratio of sums over
    clusters (Cochran, Sampling Techniques, 1977, section 6.4). One row alone has no error that could be known: NaN.
    """
    total = weights.sum(dim=0)
    ratio = amounts.sum(dim=0) / total
    residuals = (amounts - ratio * weights).square().sum(dim=0)
    rows = (weights > 0).sum(dim=0)
    error = (residuals * rows / (rows - 1)).sqrt() / total
    error[rows < 2] = math.nan
    return tuple(ratio.tolist()), tuple(error.tolist())
