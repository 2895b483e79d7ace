"""A training run of seconds, for tests of what becomes of runs."""

from collections.abc import Callable
from pathlib import Path

import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import BatchLoader, ValidationSet, embedded_corpus
from tinygpt.evals import evaluate_bpb
from tinygpt.metrics import StepMetrics
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer
from tinygpt.trainer import every


def train(
    out: Path,
    num_steps: int,
    *,
    accept: tuple[str, ...] = (),
    save_every: int = 2,
    keep_last: int | None = None,
    on_save: Callable[[Path], None] | None = None,
) -> Trainer:
    """Train, or go on, with an evaluation and a checkpoint every second step."""
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=32))
    loader = BatchLoader(embedded_corpus(), tokenizer, rows=2, seq_len=32, overflow="carry")
    config = TrainerConfig(num_steps=num_steps, out_dir=str(out), save_every=save_every, keep_last=keep_last)
    schedule = {"lr": warmup_stable_decay(num_steps, warmup_steps=1, decay_fraction=0.5, final=0.05)}
    trainer = Trainer(model, MuonAdamW.for_model(model), loader, config, schedules=schedule, on_save=on_save)
    validation = ValidationSet.from_source(embedded_corpus("validation"), tokenizer, rows=2, seq_len=32, max_tokens=512)

    def evaluate(trainer: Trainer, step: StepMetrics) -> None:
        report = evaluate_bpb(trainer.model, validation)
        trainer.record("evaluation", bpb=report.bpb, data_hash=report.data_hash)

    trainer.resume(accept=accept)
    trainer.fit(every(2, evaluate), progress=False, report=False)
    return trainer
