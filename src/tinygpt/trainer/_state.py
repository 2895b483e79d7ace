"""Gathering the state of a run into a checkpoint, and continuing from one."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tinygpt
from tinygpt.checkpoint import load_state, save_state, verify
from tinygpt.config import Config
from tinygpt.data import BatchLoader
from tinygpt.errors import CheckpointError, TinyGPTError
from tinygpt.model import GPT, describe_blocks, independent_tensors
from tinygpt.trainer._changes import Change, compare_rates, compare_values, format_changes, refuse_unaccepted
from tinygpt.trainer._random import random_state, restore_random_state

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

_WEIGHTS = "model.safetensors"
_TOPICS = {"tokens of a step": "schedule", "loss": "model"}

logger = logging.getLogger("tinygpt")


def save(trainer: "Trainer", folder: Path) -> Path:
    """Write everything that decides what the run does next."""
    model = _plain(trainer.model)
    state = {
        "next_step": trainer.next_step,
        "tokens": trainer.tokens,
        "elapsed_seconds": trainer.elapsed_seconds,
        "environment": _environment(trainer),
        "settings": _settings(trainer),
        "model_config": _model_config(model),
        "rates": trainer.rates.at(trainer.next_step),
        "loader": _loader_state(trainer),
        "optimizer_class": type(trainer.optimizer).__name__,
        "optimizer": trainer.optimizer.state_dict(),
        "random": random_state(),
    }

    def write_files(folder: Path) -> None:
        if isinstance(model, GPT) and model.config is not None:
            model.save_pretrained(folder)
        else:
            weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
            save_file(independent_tensors(weights), folder / _WEIGHTS)
        if trainer.tokenizer is not None:
            trainer.tokenizer.save(folder)

    return save_state(folder, state, write_files=write_files)


def load(trainer: "Trainer", folder: Path, accept: Collection[str]) -> list[Change]:
    """Compare, refuse what was not accepted, then load loader, optimizer, weights and random state, all or nothing."""
    state = load_state(folder)
    if _WEIGHTS not in verify(folder):
        raise CheckpointError(f"{folder} holds no {_WEIGHTS}.")
    weights = load_file(folder / _WEIGHTS)
    loader: Any = trainer.loader
    before = _loader_state(trainer)
    try:
        was, now = state["optimizer_class"], type(trainer.optimizer).__name__
        if was != now:
            raise CheckpointError(f"{folder} was saved with {was}, and this run has {now}: build the same optimizer.")
        changes = _compare(trainer, state)
        refuse_unaccepted(changes, accept)
        progress = (int(state["next_step"]), int(state["tokens"]), float(state["elapsed_seconds"]))
        _check_weights(_plain(trainer.model), weights)
        _load_loader(trainer, state["loader"], accept)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.rates.restore_settings()
        _plain(trainer.model).load_state_dict(weights, strict=True)
        restore_random_state(state["random"])
    except (TinyGPTError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if before is not None:
            loader.load_state_dict(before)  # as if nothing had been tried
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} does not fit this run: {error}") from None
    trainer.set_progress(*progress)
    if changes:
        logger.warning("going on from %s at step %d, with changes:\n%s", folder, progress[0], format_changes(changes))
    return changes


def _compare(trainer: "Trainer", state: dict[str, Any]) -> list[Change]:
    model_config = _model_config(_plain(trainer.model))
    return [
        *compare_rates(state["rates"], trainer.rates.at(state["next_step"])),
        *compare_values(state["model_config"], model_config, prefix="model ", topics="model"),
        *_compare_loader(state["loader"], _loader_state(trainer)),
        *_known(compare_values(state["settings"], _settings(trainer), topics=_TOPICS)),
        *compare_values(state["environment"], _environment(trainer)),
    ]


def _known(changes: list[Change]) -> list[Change]:
    """Leave out what one side does not know: a loader of one's own need not tell the size of its batches."""
    return [c for c in changes if c.name != "tokens of a step" or None not in (c.was, c.will_be)]


def _compare_loader(saved: dict[str, Any] | None, now: dict[str, Any] | None) -> list[Change]:
    if saved is None or now is None:
        # Without a position the data starts over, which nobody would see in the loss for a while.
        return [Change("loader position", "saved" if saved else "not saved", "starts over", "data")]
    keys = ("source_fingerprint", "tokenizer_fingerprint")
    return compare_values({k: saved.get(k) for k in keys}, {k: now.get(k) for k in keys}, topics="data")


def _loader_state(trainer: "Trainer") -> dict[str, Any] | None:
    return trainer.loader.state_dict() if hasattr(trainer.loader, "state_dict") else None


def _load_loader(trainer: "Trainer", saved: dict[str, Any] | None, accept: Collection[str]) -> None:
    if saved is None or not hasattr(trainer.loader, "load_state_dict"):
        return
    if isinstance(trainer.loader, BatchLoader):
        trainer.loader.load_state_dict(saved, allow_source_change="data" in accept)
    else:
        trainer.loader.load_state_dict(saved)


def _check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not fit before anything else is loaded."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if different := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        lines = [f"{name} was {found.get(name)}, is {expected.get(name)}" for name in different[:8]]
        raise CheckpointError(f"the checkpoint's weights do not fit the model: {'; '.join(lines)}")


def _settings(trainer: "Trainer") -> dict[str, Any]:
    """Return what shapes training besides model, data and rates."""
    config = trainer.config
    schedules = {key: repr(schedule) for key, schedule in trainer.rates.schedules.items()}
    return {
        "num_steps": config.num_steps,
        "tokens of a step": trainer.step_tokens,
        "grad_clip": config.grad_clip,
        "precision": str(trainer.precision),
        "loss": getattr(trainer.loss_fn, "__name__", type(trainer.loss_fn).__name__),
        # The default repr of a function names an address, which differs in every process.
        **{f"schedule {key}": "a function" if " at 0x" in text else text for key, text in schedules.items()},
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
    facts = config.model_dump() if isinstance(config, Config) else {}
    if isinstance(model, GPT):
        facts |= {f"block {layer}": text for layer, text in enumerate(describe_blocks(model.blocks))}
    return facts


def _plain(model: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile wrapped, whose parameters have their own names."""
    return getattr(model, "_orig_mod", model)
