"""The smallest runs that have everything: a model, two kinds of groups, packed text, checkpoints."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.checkpoint import load_state
from tinygpt.data import BatchLoader, TextDocuments
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import Schedule
from tinygpt.tokenizer import ByteTokenizer

TEXTS = [f"document {number} " * (number % 7 + 1) for number in range(40)]


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16))


def make_loader(texts: Sequence[str] = TEXTS, **settings: Any) -> BatchLoader:
    options = {"rows": 2, "seq_len": 16, "buffer_documents": 8, "prefetch": 0, "num_workers": 0, **settings}
    return BatchLoader(TextDocuments(texts), ByteTokenizer(), **options)


def make_trainer(
    out: Path | None = None,
    *,
    schedules: Mapping[str, Schedule] | None = None,
    loader: Any = None,
    optimizer: Any = MuonAdamW.for_model,
    model: Any = None,
    arguments: Mapping[str, Any] | None = None,
    **config: Any,
) -> Trainer:
    """Make a trainer; `config` are fields of its TrainerConfig, `arguments` further ones of the Trainer."""
    model = make_model() if model is None else model
    fields = {"num_steps": 4, "out_dir": None if out is None else str(out), **config}
    if arguments and "phases" in arguments and "num_steps" not in config:
        fields["num_steps"] = sum(phase.steps for phase in arguments["phases"])
    loader = make_loader() if loader is None else loader
    return Trainer(
        model, optimizer(model), loader, TrainerConfig(**fields), schedules=schedules, **dict(arguments or {})
    )


def steps_of(trainer: Trainer, number: int) -> list[Any]:
    """Train so many steps and leave the loop, as if the process had been killed there."""
    return list(itertools.islice(trainer, number))


def everything(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint says about how the run goes on, for comparison; the clock may differ."""
    state = load_state(folder)
    return {
        "weights": (folder / "model.safetensors").read_bytes(),
        "optimizer": (folder / "optimizer.safetensors").read_bytes(),
        **{key: repr(state[key]) for key in ("next_step", "tokens", "rates", "settings", "loader", "other loaders")},
        "rewarm": state["rewarm"],
        "torch": state["random"]["torch"].tolist(),
    }
