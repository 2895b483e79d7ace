"""The checkpoint that every release leaves behind, so that later ones keep loading it.

    python tests/released_checkpoints.py

writes `tests/data_files/checkpoints/<version>/`: a checkpoint taken after six steps, and the losses of the six that
follow. Run it once when a version is released, and never change what it wrote.
"""

import json
from pathlib import Path

import torch

import tinygpt
from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import BatchLoader, TextDocuments
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import constant
from tinygpt.tokenizer import ByteTokenizer

FOLDER = Path(__file__).parent / "data_files" / "checkpoints"
STEPS_BEFORE, STEPS_AFTER = 6, 6


def make_trainer(num_steps: int, checkpoint: Path | None = None) -> Trainer:
    """Return the run that is saved or continued; its model has every part of the standard one, in small."""
    torch.manual_seed(0)
    if checkpoint is None:
        config = GPTConfig(
            vocab_size=257, max_seq_len=32, num_layers=2, num_heads=1, dim=12, hidden_dim=12, vocab_multiple=1,
            window_pattern="SL", short_window_tokens=8,
        )  # fmt: skip
        model = GPT.from_config(config)
    else:
        model = GPT.from_pretrained(checkpoint)
    texts = [f"line {number}: " + "the sea, the sea " * (number % 5 + 1) for number in range(30)]
    loader = BatchLoader(TextDocuments(texts), ByteTokenizer(), rows=4, seq_len=32, buffer_documents=8)
    optimizer = MuonAdamW.for_model(model, adamw_lr=0.01)
    return Trainer(model, optimizer, loader, TrainerConfig(num_steps=num_steps), schedules={"lr": constant(1.0)})


def main() -> None:
    folder = FOLDER / tinygpt.__version__
    if folder.exists():
        raise SystemExit(f"{folder} exists: what a release wrote is never changed.")
    trainer = make_trainer(STEPS_BEFORE)
    list(trainer)
    checkpoint = trainer.save_state(folder / f"step-{STEPS_BEFORE:06d}")
    again = make_trainer(STEPS_BEFORE + STEPS_AFTER)
    again.load_state(checkpoint)
    losses = [step.loss for step in again]
    (folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1024:.0f} KiB, losses {losses}")


if __name__ == "__main__":
    main()
