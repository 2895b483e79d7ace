"""Evaluation and sampling need no more memory than a training step, counted allocation by allocation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinygpt import GPT, GPTConfig
from tinygpt.data import ValidationSet, embedded_corpus
from tinygpt.evals import evaluate_bpb
from tinygpt.generate import stream_text
from tinygpt.memory._ledger import Ledger
from tinygpt.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def peak_of(model: GPT, work: Callable[[], Any]) -> int:
    ledger = Ledger([*model.parameters(), *model.buffers()], block=64, device_type="cpu")
    with ledger:
        work()
        end = ledger.mark()
    return ledger.highest(0, end)[0]


def step(model: GPT, rows: int) -> Callable[[], None]:
    ids = torch.randint(256, (rows, 128))

    def work() -> None:
        (model.loss(ids, ids)[0] / ids.numel()).backward()
        model.zero_grad()

    return work


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "block"])
@pytest.mark.parametrize("layers", [1, 4])
def test_evaluation_and_sampling_stay_below_a_step(layers: int, checkpointing: Any) -> None:
    config = GPTConfig(num_layers=layers, dim=64, num_heads=2, vocab_size=257, max_seq_len=128)
    model = GPT.from_config(config).set_activation_checkpointing(checkpointing)
    trained = peak_of(model, step(model, 4))
    held_out = embedded_corpus("validation")
    validation = ValidationSet.from_source(held_out, TOKENIZER, rows=4, seq_len=128, max_tokens=2048)
    assert peak_of(model, lambda: evaluate_bpb(model, validation)) <= trained
    written = peak_of(model, lambda: list(stream_text(model, TOKENIZER, "The ", max_new_tokens=100, seed=0)))
    assert written <= trained


def test_evaluation_follows_the_rows_of_training() -> None:
    model = GPT.from_config(GPTConfig(num_layers=2, dim=64, num_heads=2, vocab_size=257, max_seq_len=128))
    trained = peak_of(model, step(model, 1))
    held_out = embedded_corpus("validation")
    validation = ValidationSet.from_source(held_out, TOKENIZER, rows=8, seq_len=128, max_tokens=4096)
    reports = []
    split = peak_of(model, lambda: reports.append(evaluate_bpb(model, validation, micro_batch_rows=1)))
    whole = peak_of(model, lambda: reports.append(evaluate_bpb(model, validation)))
    assert split <= trained < whole
    assert reports[0].bpb == pytest.approx(reports[1].bpb, rel=1e-6)
    assert reports[0].num_tokens == reports[1].num_tokens
