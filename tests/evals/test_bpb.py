import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig
from tinygpt.data import Batch, BatchLoader, TextDocuments, ValidationSet
from tinygpt.errors import ConfigError, DataError
from tinygpt.evals import BpbReport, evaluate_bpb, unigram_bpb
from tinygpt.tokenizer import ByteTokenizer

TEXT = ["hello there", "general text, a little longer than a row of tokens", "déjà vu"]


def validation_set(texts: list[str] = TEXT) -> ValidationSet:
    return ValidationSet.from_source(TextDocuments(texts), ByteTokenizer(), rows=2, seq_len=16)


class Even(nn.Module):
    """Every token equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(257))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*token_ids.shape, 257)


def test_an_even_model_needs_the_log_of_the_vocabulary_for_each_byte() -> None:
    report = evaluate_bpb(Even(), validation_set())
    assert report.bpb == pytest.approx(math.log2(257), rel=1e-6)
    assert report.loss == pytest.approx(math.log(257), rel=1e-6)
    assert report.num_bytes == report.num_tokens == sum(len(text.encode()) for text in TEXT)


def test_the_figure_is_that_of_a_loop_over_targets_without_special_tokens() -> None:
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig.from_depth(1, vocab_size=257, max_seq_len=16))
    nn.init.normal_(model.head.weight, std=0.1)
    validation = validation_set()
    nats = 0.0
    for batch in validation:
        log_probabilities = model(batch.inputs).log_softmax(-1)
        for row, target_row in zip(log_probabilities, batch.targets.tolist(), strict=True):
            nats -= sum(float(p[t]) for p, t in zip(row.detach(), target_row, strict=True) if 0 <= t < 256)
    report = evaluate_bpb(model, validation)
    assert report.bpb == pytest.approx(nats / math.log(2) / validation.num_bytes, rel=1e-5)
    assert report.data_hash == validation.hash


def test_the_mode_of_the_model_is_put_back() -> None:
    model = Even().train()
    evaluate_bpb(model, validation_set())
    assert model.training


def test_the_unigram_baseline_is_the_cross_entropy_of_counted_bytes() -> None:
    loader = BatchLoader(TextDocuments(["aaab"]), ByteTokenizer(), rows=1, seq_len=4)
    batches = [next(loader)]
    counts = torch.ones(256)
    for token in batches[0].targets.flatten().tolist():
        if token < 256:
            counts[token] += 1
    probabilities = counts / counts.sum()
    text = "abba"
    expected = -sum(float(probabilities[byte].log2()) for byte in text.encode()) / 4
    assert unigram_bpb(batches, validation_set([text])) == pytest.approx(expected, rel=1e-5)


def test_a_set_without_text_is_refused() -> None:
    validation = validation_set()
    empty = ValidationSet(torch.full_like(validation.token_rows, 256), 2, 256, validation.token_bytes, 0)
    for measure in (lambda: evaluate_bpb(Even(), empty), lambda: unigram_bpb([], empty)):
        with pytest.raises(DataError, match="has no text"):
            measure()


def test_batches_with_ignored_targets_are_fine() -> None:
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[-1, 3]]))
    assert unigram_bpb([batch], validation_set()) > 0


def test_figures_on_one_set_are_compared_without_a_warning(tmp_path: Path) -> None:
    validation = validation_set()
    validation.save(tmp_path / "validation.safetensors")
    report = evaluate_bpb(Even(), validation)
    frozen = evaluate_bpb(Even(), ValidationSet.load(tmp_path / "validation.safetensors"))
    assert report.compare(frozen) == 0
    better = BpbReport(report.bpb - 0.5, report.loss, report.num_tokens, report.num_bytes, report.data_hash)
    assert report.compare(better) == pytest.approx(-0.5)


def test_comparing_figures_on_different_sets_warns_and_names_both() -> None:
    one, other = (evaluate_bpb(Even(), validation_set(texts)) for texts in (TEXT, TEXT[1:]))
    with pytest.warns(
        UserWarning, match=f"different validation sets .*{one.data_hash[:12]} and {other.data_hash[:12]}"
    ):
        assert one.compare(other) == other.bpb - one.bpb


def test_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="micro_batch_rows=0 is no number of rows"):
        evaluate_bpb(Even(), validation_set(), micro_batch_rows=0)
