"""The numbers of a run, sent to the trackers that its recipe names."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.metrics import StepMetrics
from tinygpt.trackers import Tracking, open_tracker, track
from tinygpt.trainer import Hook, Trainer

if TYPE_CHECKING:
    from tinygpt.recipe._recipe import Recipe

PROJECT = "tinygpt"


@contextlib.contextmanager
def tracker_hooks(recipe: "Recipe", out_dir: Path, *, sent_to: Collection[str]) -> Iterator[list[Hook]]:
    """Open the trackers of a run, which is called there as its folder is, and close them at the end.

    Args:
        recipe: The recipe.
        out_dir: The run's folder. What TensorBoard and wandb keep on disk goes there, so that it moves with the run.
        sent_to: The trackers that have the run already and go on with it.

    Raises:
        ConfigError: If the folder's name is none that a tracker takes, or is that of another run there.
        MissingDependencyError: If a tracker's package is not installed.
    """
    folders = {"tensorboard": out_dir / "tensorboard", "wandb": out_dir}
    with contextlib.ExitStack() as stack:
        hooks = []
        for name in recipe.trackers:
            tracker = open_tracker(
                name,
                PROJECT,
                out_dir.resolve().name,
                folder=folders.get(name),
                settings=dict(_flat(recipe.model_dump(exclude_none=True))),
                resume=name in sent_to,
            )
            hooks.append(_with_evaluations(stack.enter_context(track(tracker))))
        yield hooks


def _with_evaluations(tracking: Tracking) -> Hook:
    def hook(trainer: Trainer, step: StepMetrics) -> None:
        tracking(trainer, step)
        newest = trainer.evaluations[-1:]
        if newest and newest[0]["step"] == trainer.next_step:
            tracking.log({"validation/bpb": newest[0]["bpb"]}, step.index)

    return hook


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
