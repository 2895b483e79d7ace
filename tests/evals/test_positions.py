import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinygpt import GPT
from tinygpt.data import Batch, TextDocuments, ValidationSet
from tinygpt.errors import ConfigError, DataError
from tinygpt.evals import evaluate_bpb, loss_by_position
from tinygpt.tokenizer import ByteTokenizer

TEXTS = ["hello there", "general text, a little longer than a row of tokens", "déjà vu", "x" * 30]


@pytest.fixture
def validation() -> ValidationSet:
    return ValidationSet.from_source(TextDocuments(TEXTS), ByteTokenizer(), rows=2, seq_len=16)


class Positional(nn.Module):
    """Its loss is 1 at the first position, 2 at the second, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def token_losses(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        return (torch.arange(token_ids.shape[1]) + 1.0).expand(token_ids.shape)


def test_each_position_has_its_own_loss(validation: ValidationSet) -> None:
    curve = loss_by_position(Positional(), validation)
    assert curve.starts == tuple(range(16))
    assert curve.ends == tuple(range(1, 17))
    assert curve.loss == pytest.approx(range(1, 17))
    assert curve.bpb == pytest.approx([loss / math.log(2) for loss in range(1, 17)])
    assert curve.loss_error == pytest.approx([0.0] * 16, abs=1e-9)
    assert curve.data_hash == validation.hash


def test_the_curve_weighted_by_tokens_is_the_whole_loss(byte_model: GPT, validation: ValidationSet) -> None:
    whole = evaluate_bpb(byte_model, validation)
    for buckets in (None, 1, 5, 16):
        curve = loss_by_position(byte_model, validation, num_buckets=buckets)
        total = sum(loss * count for loss, count in zip(curve.loss, curve.num_tokens, strict=True))
        assert total / sum(curve.num_tokens) == pytest.approx(whole.loss, rel=1e-5)
        assert sum(curve.num_tokens) == whole.num_tokens
        assert (curve.starts[0], curve.ends[-1]) == (0, 16)
        assert curve.starts[1:] == curve.ends[:-1]
    assert loss_by_position(byte_model, validation, num_buckets=1).bpb == pytest.approx([whole.bpb], rel=1e-5)


def test_masked_and_special_targets_are_left_out(byte_model: GPT, validation: ValidationSet) -> None:
    curve = loss_by_position(byte_model, validation)
    counts = [0] * 16
    for batch in validation:
        assert isinstance(batch, Batch)
        for row in batch.targets.tolist():
            for position, token in enumerate(row):
                counts[position] += 0 <= token < 256
    assert curve.num_tokens == tuple(count for count in counts if count)
    assert min(counts) < max(counts)


def test_the_standard_error_is_that_of_rows_drawn_again(byte_model: GPT) -> None:
    generator = np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(97, 123, size=8))) for _ in range(300)]
    validation = ValidationSet.from_source(TextDocuments(texts), ByteTokenizer(), rows=50, seq_len=8)
    curve = loss_by_position(byte_model, validation, num_buckets=2)
    losses = np.concatenate([byte_model.token_losses(*batch).numpy() for batch in validation])
    for bucket, part in enumerate((losses[:, :4], losses[:, 4:])):
        means = part.mean(axis=1)[generator.integers(0, 300, size=(4000, 300))].mean(axis=1)
        assert curve.loss[bucket] == pytest.approx(part.mean(), rel=1e-5)
        assert curve.loss_error[bucket] == pytest.approx(means.std(), rel=0.1)
        assert curve.bpb_error[bucket] == pytest.approx(means.std() / math.log(2), rel=0.1)


def test_one_row_has_no_error_that_could_be_known(byte_model: GPT) -> None:
    validation = ValidationSet.from_source(TextDocuments(["hello there"]), ByteTokenizer(), rows=1, seq_len=16)
    assert all(map(math.isnan, loss_by_position(byte_model, validation).loss_error))


def test_what_cannot_be_is_refused(byte_model: GPT, validation: ValidationSet) -> None:
    for buckets in (0, 17):
        with pytest.raises(ConfigError, match=f"num_buckets={buckets} must lie between 1 and the 16 positions"):
            loss_by_position(byte_model, validation, num_buckets=buckets)
    empty = ValidationSet(torch.full_like(validation.token_rows, 256), 2, 256, validation.token_bytes, 0)
    with pytest.raises(DataError, match="has no text"):
        loss_by_position(byte_model, empty)
