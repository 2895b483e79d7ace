"""Checkpoints of every released version keep loading, and training goes on from them as it did then."""

import json
from pathlib import Path

import pytest
import torch

import released_checkpoints
import tinygpt
from tinygpt import GPT
from tinygpt.checkpoint import verify
from tinygpt.tokenizer import ByteTokenizer, load_tokenizer

VERSIONS = sorted(path for path in released_checkpoints.FOLDER.iterdir() if path.is_dir())


def test_this_version_left_one_too() -> None:
    assert tinygpt.__version__ in {path.name for path in VERSIONS}, "run tests/released_checkpoints.py"


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_released_checkpoint_is_whole_and_training_goes_on_from_it(folder: Path) -> None:
    (checkpoint,) = (path for path in folder.iterdir() if path.is_dir())
    verify(checkpoint)
    expected = json.loads((folder / "losses.json").read_text("utf-8"))
    steps = released_checkpoints.STEPS_BEFORE + released_checkpoints.STEPS_AFTER
    trainer = released_checkpoints.make_trainer(steps, checkpoint)
    trainer.load_state(checkpoint)
    # Loosely: another version of torch adds up in another order.
    assert [step.loss for step in trainer] == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_released_checkpoint_is_a_model_with_its_tokenizer(folder: Path) -> None:
    (checkpoint,) = (path for path in folder.iterdir() if path.is_dir())
    assert load_tokenizer(checkpoint).fingerprint() == ByteTokenizer().fingerprint()
    logits = GPT.from_pretrained(checkpoint)(torch.tensor([[256, *b"the sea"]]))
    assert logits.argmax(-1)[0, -1] < 257
    assert torch.isfinite(logits).all()
