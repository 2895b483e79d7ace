"""Continuing a run from a checkpoint, after comparing the two."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tinygpt.checkpoint import load_state, load_tensors, verify
from tinygpt.data import BatchLoader
from tinygpt.errors import CheckpointError, TinyGPTError
from tinygpt.trainer._changes import Change, compare_rates, compare_values, format_changes, refuse_unaccepted
from tinygpt.trainer._random import restore_random_state
from tinygpt.trainer._saving import checked_evaluation
from tinygpt.trainer._state import WEIGHTS_FILE, environment, loader_state, model_config, plain_module, settings

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

_TOPICS = {"tokens of a step": "schedule", "loss": "model"}

logger = logging.getLogger("tinygpt")


def load(trainer: "Trainer", folder: Path, accept: Collection[str], *, verified: bool) -> list[Change]:
    """Compare, refuse what was not accepted, then load loader, optimizer, weights and random state, all or nothing."""
    if WEIGHTS_FILE not in verify(folder, hashes=not verified):
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}.")
    state = load_state(folder, verified=True)
    weights = load_tensors(folder / WEIGHTS_FILE)
    loader: Any = trainer.loader
    before = loader_state(trainer)
    try:
        was, now = state["optimizer_class"], type(trainer.optimizer).__name__
        if was != now:
            raise CheckpointError(f"{folder} was saved with {was}, and this run has {now}: build the same optimizer.")
        changes = _compare(trainer, state)
        refuse_unaccepted(changes, accept)
        progress = (int(state["next_step"]), int(state["tokens"]), float(state["elapsed_seconds"]))
        evaluations = [e for given in state.get("evaluations", []) if (e := checked_evaluation(given["step"], given))]
        _check_weights(plain_module(trainer.model), weights)
        _load_loader(trainer, state["loader"], accept)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.rates.restore_settings()
        plain_module(trainer.model).load_state_dict(weights, strict=True)
        restore_random_state(state["random"])
    except (TinyGPTError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        if before is not None:
            loader.load_state_dict(before)  # as if nothing had been tried
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} does not fit this run: {error}") from None
    trainer.set_progress(*progress)
    trainer.evaluations = evaluations
    if changes:
        logger.warning("going on from %s at step %d, with changes:\n%s", folder, progress[0], format_changes(changes))
    return changes


def _compare(trainer: "Trainer", state: dict[str, Any]) -> list[Change]:
    facts = model_config(plain_module(trainer.model))
    return [
        *compare_rates(state["rates"], trainer.rates.at(state["next_step"])),
        *compare_values(state["model_config"], facts, prefix="model ", topics="model"),
        *_compare_loader(state["loader"], loader_state(trainer)),
        *_known(compare_values(state["settings"], settings(trainer), topics=_TOPICS)),
        *compare_values(state["environment"], environment(trainer)),
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
