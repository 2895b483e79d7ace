"""Gathering the state of a run into a checkpoint, and continuing from one."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tinygpt
from tinygpt.checkpoint import load_state, save_state
from tinygpt.config import Config
from tinygpt.errors import CheckpointError, DataError
from tinygpt.model import GPT
from tinygpt.trainer._changes import Change, compare_rates, compare_values, refuse_unaccepted
from tinygpt.trainer._random import random_state, restore_random_state

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

_WEIGHTS = "model.safetensors"


def save(trainer: "Trainer", folder: Path) -> Path:
    """Write everything that decides what the run does next."""
    loader_state = trainer.loader.state_dict() if hasattr(trainer.loader, "state_dict") else None
    state = {
        "next_step": trainer.next_step,
        "tokens": trainer.tokens,
        "elapsed_seconds": trainer._watch.elapsed,
        "environment": _environment(trainer),
        "settings": _settings(trainer),
        "model_config": _model_config(trainer.model),
        "rates": trainer.rates.at(trainer.next_step),
        "loader": loader_state,
        "optimizer": trainer.optimizer.state_dict(),
        "random": random_state(),
    }

    def write_files(folder: Path) -> None:
        if isinstance(trainer.model, GPT) and trainer.model.config is not None:
            trainer.model.save_pretrained(folder)
        else:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in trainer.model.state_dict().items()}, folder / _WEIGHTS
            )
        if trainer.tokenizer is not None:
            trainer.tokenizer.save(folder)

    return save_state(folder, state, write_files=write_files)


def load(trainer: "Trainer", folder: Path, accept: Collection[str]) -> list[Change]:
    """Compare, refuse what was not accepted, then load loader, weights, optimizer and random state."""
    state = load_state(folder)
    try:
        changes = _compare(trainer, state)
        refuse_unaccepted(changes, accept)
        _load_loader(trainer, state["loader"], accept)
        weights = load_file(folder / _WEIGHTS)
        trainer.model.load_state_dict(weights, strict=True)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.rates.restore_settings()
        trainer.next_step = state["next_step"]
        trainer.tokens = state["tokens"]
        trainer._watch.elapsed = state["elapsed_seconds"]
        restore_random_state(state["random"])
    except DataError as error:
        raise CheckpointError(f"{folder} cannot be continued with this data: {error}") from None
    except (KeyError, RuntimeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} does not fit this run: {error}") from None
    return changes


def _compare(trainer: "Trainer", state: dict[str, Any]) -> list[Change]:
    step = state["next_step"]
    changes = compare_rates(state["rates"], trainer.rates.at(step))
    changes += compare_values(state["model_config"], _model_config(trainer.model), prefix="model ", topic="model")
    changes += _compare_loader(state["loader"], trainer)
    changes += compare_values(state["settings"], _settings(trainer))
    changes += compare_values(state["environment"], _environment(trainer))
    return changes


def _compare_loader(saved: dict[str, Any] | None, trainer: "Trainer") -> list[Change]:
    now = trainer.loader.state_dict() if hasattr(trainer.loader, "state_dict") else None
    if saved is None or now is None:
        same = saved is None and now is None
        return [] if same else [Change("loader position", saved is not None, now is not None, "data")]
    keys = ("source_fingerprint", "tokenizer_fingerprint")
    return compare_values({k: saved.get(k) for k in keys}, {k: now.get(k) for k in keys}, topic="data")


def _load_loader(trainer: "Trainer", saved: dict[str, Any] | None, accept: Collection[str]) -> None:
    if saved is None or not hasattr(trainer.loader, "load_state_dict"):
        return
    if "data" in accept:
        trainer.loader.load_state_dict(saved, allow_source_change=True)
    else:
        trainer.loader.load_state_dict(saved)
    trainer._batches = iter(trainer.loader)


def _settings(trainer: "Trainer") -> dict[str, Any]:
    """Return what shapes training besides model, data and rates; a change of these alone is harmless or wanted."""
    config = trainer.config
    return {
        "num_steps": config.num_steps,
        "batch_tokens": config.batch_tokens,
        "grad_clip": config.grad_clip,
        "precision": str(trainer.precision),
        "loss": getattr(trainer.loss_fn, "__name__", type(trainer.loss_fn).__name__),
        **{f"schedule {key}": repr(schedule) for key, schedule in trainer.rates.schedules.items()},
    }


def _environment(trainer: "Trainer") -> dict[str, Any]:
    return {
        "tinygpt version": tinygpt.__version__,
        "torch version": torch.__version__,
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
    }


def _model_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.model_dump() if isinstance(config, Config) else {}
