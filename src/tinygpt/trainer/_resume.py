"""Continuing a run from a checkpoint, after comparing the two."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tinygpt.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_state,
    load_tensors,
    mark_latest,
    set_aside,
    verify,
)
from tinygpt.errors import CheckpointError, ConfigError, TinyGPTError
from tinygpt.trainer._changes import Change, checked_accept, format_changes, judged, unaccepted
from tinygpt.trainer._random import random_state, restore_random_state
from tinygpt.trainer._resumption import Resumption
from tinygpt.trainer._retention import checked_evaluation
from tinygpt.trainer._state import WEIGHTS_FILE, plain_module
from tinygpt.trainer._ways import refusal

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

logger = logging.getLogger("tinygpt")

# What a state that was edited or belongs to another run makes the code below raise.
_DAMAGE = (TinyGPTError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError)


def resume_as_asked(
    trainer: "Trainer", resume: str | Path | None, accept: Collection[str] | str, rewarm_steps: int | None
) -> None:
    """Do what `Trainer.fit` was asked to do before it trains."""
    if resume is None:
        if accept or rewarm_steps is not None:
            raise ConfigError("accept and rewarm_steps are for going on from a checkpoint: give resume='auto' as well.")
    elif resume != "auto":
        trainer.load_state(resume, accept=accept, rewarm_steps=rewarm_steps)
    elif trainer.next_step == 0:  # else this object has trained already, and goes on where it stands
        trainer.resume(accept=accept, rewarm_steps=rewarm_steps)


def newest_whole(parent: Path | None) -> Path | None:
    """Return the newest whole checkpoint of a run and set damaged ones after it aside; `None` if there is none.

    Raises:
        ConfigError: If the run has no folder.
        CheckpointError: If there are checkpoints and none is whole.
    """
    if parent is None:
        raise ConfigError("resume looks into the out_dir of the TrainerConfig, and there is none.")
    if not parent.exists():
        return None
    folder = latest_checkpoint(parent)
    found = list_checkpoints(parent)
    if folder is None and found:
        raise CheckpointError(f"no checkpoint in {parent} is whole; choose another out_dir to start over.")
    if folder is None:
        return None
    for damaged in found[found.index(folder) + 1 :]:
        set_aside(damaged)
    mark_latest(folder)
    return folder


def refuse_another_course(folder: Path, own: Path | None) -> None:
    """Refuse to go on from anything but the newest checkpoint of the run's own folder, unless that is empty.

    Otherwise checkpoints and metrics of two courses would be mixed, and the next resume take either.
    """
    found = [] if own is None else list_checkpoints(own)
    if own is None or not found or folder.resolve() == found[-1].resolve():
        return
    if folder.parent.resolve() == own.resolve():
        raise CheckpointError(
            f"{own} goes on after {folder.name}, up to {found[-1].name}: "
            "to branch from an earlier step choose another out_dir; to go on use trainer.resume()."
        )
    raise CheckpointError(
        f"{own} holds a run already, up to {found[-1].name}, which going on from {folder} would mix with another: "
        "go on with it by trainer.resume(), or choose another out_dir."
    )


def load(
    trainer: "Trainer", folder: Path, accept: set[str], rewarm_steps: int | None, *, verified: bool
) -> list[Change]:
    """Compare, refuse what was not accepted, then load loaders, optimizer, weights and random state, all or nothing."""
    if WEIGHTS_FILE not in verify(folder, hashes=not verified):
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}.")
    state = load_state(folder, verified=True)
    weights = load_tensors(folder / WEIGHTS_FILE)
    loaders = {id(each): each for each in trainer.course.loaders if hasattr(each, "state_dict")}.values()
    before = [(each, each.state_dict()) for each in loaders]
    rewarm_before, random_before = trainer.rates.rewarm, random_state()
    rows_before = trainer.micro_batch_rows
    try:
        was, now = state["optimizer_class"], type(trainer.optimizer).__name__
        if was != now:
            raise CheckpointError(f"{folder} was saved with {was}, and this run has {now}: build the same optimizer.")
        progress = (int(state["next_step"]), int(state["tokens"]), float(state["elapsed_seconds"]))
        evaluations = [e for given in state.get("evaluations", []) if (e := checked_evaluation(given["step"], given))]
        read_last = trainer.course.loaders[trainer.course.index_at(max(0, progress[0] - 1))]
        trainer.rows.go_on_with(state.get("settings", {}).get("micro_batch_rows"), read_last)
        resumption = Resumption(trainer, state)
        changes = [*resumption.compare_rates(rewarm_steps), *resumption.compare_rest()]
        if resumption.begins_phase:
            accept = accept | checked_accept(trainer.phases[resumption.phase].accept)
        if refused := unaccepted(changes, accept):
            fits = not _misfits(plain_module(trainer.model), weights)
            raise refusal(trainer, folder, state, refused, fits=fits)
        changes += _compare_weights(plain_module(trainer.model), weights)
        restore_random_state(state["random"])
        resumption.load_loaders(accept)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.rates.restore_settings()
        plain_module(trainer.model).load_state_dict(weights, strict=True)  # last: nothing would take it back
    except BaseException as error:
        trainer.rates.rewarm = rewarm_before
        trainer.rows.go_on_with(rows_before)
        restore_random_state(random_before)
        for each, position in before:
            each.load_state_dict(position)  # as if nothing had been tried
        if isinstance(error, CheckpointError | ConfigError) or not isinstance(error, _DAMAGE):
            raise
        raise CheckpointError(f"{folder} does not fit this run: {error}") from None
    trainer.set_progress(*progress)
    trainer.evaluations = evaluations
    trainer.measured_on.go_on_from(state.get("identity", {}).get("validation set"), may_change="data" in accept)
    if changes:
        logger.warning("going on from %s at step %d, with changes:\n%s", folder, progress[0], format_changes(changes))
    return changes


def _misfits(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Return the weights that only one side has or that have two shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [f"{name} was {found.get(name)}, is {expected.get(name)}" for name in different]


def _compare_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Change]:
    """Refuse weights that do not fit before anything is loaded, and tell of those that are going to be rounded."""
    if misfits := _misfits(model, weights):
        raise CheckpointError(f"the checkpoint's weights do not fit the model: {'; '.join(misfits[:8])}")
    own = model.state_dict()
    dtypes: dict[tuple[str, str], list[str]] = {}
    for name in own:
        if weights[name].dtype != own[name].dtype:
            dtypes.setdefault((str(weights[name].dtype), str(own[name].dtype)), []).append(name)
    return [
        judged(f"dtype of {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""), was, will_be)
        for (was, will_be), names in dtypes.items()
    ]
