"""When a checkpoint is due, and which of them stay."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.checkpoint import (
    checkpoint_folder,
    checkpoint_step,
    list_checkpoints,
    mark_latest,
    remove_old_checkpoints,
)
from tinygpt.errors import ConfigError

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer


def checked_evaluation(step: int, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what of an evaluation is kept to rank checkpoints by; `None` if it has no `bpb`.

    Raises:
        ConfigError: If `bpb` is not a number.
    """
    bpb = fields.get("bpb")
    if bpb is None:
        return None
    if isinstance(bpb, bool) or not isinstance(bpb, int | float) or not isinstance(step, int):
        raise ConfigError(f"an evaluation's bpb is {bpb!r} at step {step!r}; give a number.")
    data_hash = fields.get("data_hash")
    return {"step": step, "bpb": float(bpb), "data_hash": None if data_hash is None else str(data_hash)}


def with_evaluation(
    evaluations: Sequence[dict[str, Any]], step: int, fields: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the evaluations with what is kept of another one, which replaces an earlier one of its step."""
    found = checked_evaluation(step, fields)
    return [*evaluations] if found is None else [*(e for e in evaluations if e["step"] != step), found]


def best_steps(evaluations: Sequence[Mapping[str, Any]], steps: Collection[int], count: int) -> set[int]:
    """Return those of `steps` with the lowest bpb on the data that was evaluated last; others cannot be compared."""
    if not evaluations:
        return set()
    data_hash = evaluations[-1]["data_hash"]
    scores = {
        e["step"]: e["bpb"]
        for e in evaluations
        if e["data_hash"] == data_hash and e["step"] in steps and math.isfinite(e["bpb"])
    }
    return set(sorted(scores, key=lambda step: (scores[step], -step))[:count])


def due_checkpoint(trainer: "Trainer", *, asked: bool) -> Path | None:
    """Return the folder of the checkpoint that is due after the steps done so far, or that is `asked` for."""
    step, every = trainer.next_step, trainer.config.save_every
    due = step == trainer.config.num_steps or step in trainer.course.boundaries or (every and step % every == 0)
    return checkpoint_folder(trainer.checkpoint_dir, step) if trainer.checkpoint_dir and (due or asked) else None


def may_go_on_meanwhile(trainer: "Trainer", *, leaving: bool) -> bool:
    """Return whether a checkpoint is written while training goes on.

    The last one is waited for in any case: a copy would only cost, and a program that ends starts no thread.
    """
    return trainer.config.save_in_background and not leaving and trainer.next_step != trainer.config.num_steps


def tidier(trainer: "Trainer", folder: Path) -> Callable[[], None]:
    """Return what marks a checkpoint as the latest once it is complete, and deletes those that may go."""
    # As they are now: training goes on meanwhile.
    config, evaluations, protect = trainer.config, tuple(trainer.evaluations), set(trainer.protected_steps)

    def tidy() -> None:
        mark_latest(folder)
        if config.keep_last is not None:
            steps = {checkpoint_step(path) for path in list_checkpoints(folder.parent)}
            kept = {checkpoint_step(folder), *protect, *best_steps(evaluations, steps, config.keep_best or 0)}
            remove_old_checkpoints(
                folder.parent, keep_last=config.keep_last, keep_every=config.keep_every, protect=kept
            )

    return tidy
