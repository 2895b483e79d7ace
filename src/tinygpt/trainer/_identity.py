"""What makes a run the run it is, written into every checkpoint and compared on resume."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from tinygpt.data import ValidationSet
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.optim import MuonAdamW
from tinygpt.trainer._changes import Change, judged

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

logger = logging.getLogger("tinygpt")


def run_state(trainer: "Trainer") -> dict[str, Any]:
    """Return what a checkpoint holds besides model, optimizer, current loader and settings."""
    course, rewarm = trainer.course, trainer.rates.rewarm
    return {
        "identity": {
            "groups": group_members(trainer),
            "loader": dealing(trainer.loader),
            "validation set": trainer.measured_on.data_hash,
        },
        "phases": [{"name": phase.name, "steps": phase.steps} for phase in course.phases],
        "other loaders": other_loader_states(trainer),
        "rewarm": None
        if rewarm is None or trainer.next_step >= rewarm.end
        else {"start": rewarm.start, "steps": rewarm.steps, "was": rewarm.was},
    }


def other_loader_states(trainer: "Trainer") -> dict[str, Any]:
    """Return position and dealing of loaders that earlier phases read from and the present does not, by first phase."""
    course = trainer.course
    now = course.first_user(course.index_at(trainer.next_step))
    begun = {course.first_user(i) for i, start in enumerate(course.starts) if start < trainer.next_step}
    return {
        str(index): {
            "position": loader.state_dict() if hasattr(loader := course.loaders[index], "state_dict") else None,
            "dealing": dealing(loader),
        }
        for index in sorted(begun - {now})
    }


def dealing(loader: Any) -> dict[str, Any]:
    """Return what a loader's state does not tell: how rows are dealt out, and the shares of a mixture."""
    return {
        "rows": getattr(loader, "rows", None),
        "ranks": getattr(loader, "world_size", None),
        "weights": getattr(getattr(loader, "source", None), "weights", None),
    }


def loader_facts(state: Mapping[str, Any], dealt: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that decides which batches come, from a loader's state and `dealing`."""
    settings = state.get("settings")
    own = settings.items() if isinstance(settings, Mapping) else ()
    return {
        **{key: state[key] for key in ("source_fingerprint", "tokenizer_fingerprint") if key in state},
        **{f"loader {key}": value for key, value in own if key not in ("rows", "world_size")},
        **{f"loader {key}": value for key, value in dealt.items()},
    }


def group_members(trainer: "Trainer") -> dict[str, list[str]]:
    """Return the names of the parameters of each optimizer group, in the order that decides whose moments are whose."""
    optimizer: Optimizer = trainer.optimizer
    model: nn.Module = getattr(trainer.model, "_orig_mod", trainer.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    if isinstance(optimizer, MuonAdamW):  # its state is by name
        members = [sorted(group) for group in members]
    return dict(zip(trainer.rates.labels, members, strict=True))


def compare_groups(was: Mapping[str, list[str]] | None, will_be: Mapping[str, list[str]]) -> list[Change]:
    """Compare which parameters are in which group; groups that only one side has are the business of their rates."""
    if was is None:
        return []
    changes = []
    for label in (label for label in was if label in will_be and was[label] != will_be[label]):
        came, gone = sorted({*will_be[label]} - {*was[label]}), sorted({*was[label]} - {*will_be[label]})
        parts = [f"{sign}{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                 for sign, names in (("+", came), ("-", gone)) if names]  # fmt: skip
        changes.append(judged(f"parameters of {label}", f"{len(was[label])}", " ".join(parts) or "another order"))
    return changes


class MeasuredOn:
    """Sees to it that one run measures on one validation set.

    Args:
        validation: The set, if it is known from the start.

    Attributes:
        data_hash: Hash of the set that this run measures on; `None` as long as nobody knows.

    Raises:
        ConfigError: If it is not a validation set.
    """

    def __init__(self, validation: ValidationSet | None) -> None:
        if validation is not None and not isinstance(validation, ValidationSet):
            raise ConfigError(f"validation is a {type(validation).__name__}, not a ValidationSet.")
        self.own = None if validation is None else validation.hash
        self.data_hash = self.own
        self._may_change = False

    def go_on_from(self, data_hash: str | None, *, may_change: bool) -> None:
        """Take over the hash of a checkpoint, unless this run has its own."""
        self.data_hash = self.own or data_hash
        self._may_change = may_change and self.own is None

    def check(self, found: str | None) -> None:
        """Look at the hash of an evaluation to be recorded.

        Raises:
            CheckpointError: If it was measured on another set than those before it.
        """
        known = self.data_hash
        if found is None or found == known:
            return
        if known is not None and not self._may_change:
            raise CheckpointError(
                f"this evaluation was measured on the validation set {str(found)[:12]}, and this run on {known[:12]} "
                "so far: their figures cannot be compared. Measure on the set of the run; resume with accept=['data'] "
                "to go on with the other; or record it as another event than 'evaluation'."
            )
        if known is not None:
            logger.warning("evaluations are on the validation set %s from now on, not %s", found[:12], known[:12])
        self.data_hash, self._may_change = found, False
