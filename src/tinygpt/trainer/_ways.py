"""The error of a resume that would change a run unseen: what differs, and each way to go on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.checkpoint import list_checkpoints, load_state
from tinygpt.errors import CheckpointError
from tinygpt.trainer._changes import Change, compare_rates, format_changes
from tinygpt.trainer._rates import REWARMED

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer


class ResumeRefusedError(CheckpointError):
    """Going on would change a run unseen; nothing was loaded or changed. The message names the ways on.

    Attributes:
        folder: The checkpoint.
        changes: What differs and was not accepted.
        rates: Those of them that `rewarm_steps` takes over gradually.
        branch_from: The newest checkpoint beside it from which this run's rates do not jump; `None` if there is none,
            or no rate jumps.
        fits: Whether the checkpoint's weights have the shapes of this run's model; if not, nothing can be accepted.
    """

    def __init__(
        self, message: str, folder: Path, changes: Sequence[Change], branch_from: Path | None, *, fits: bool = True
    ) -> None:
        super().__init__(message)
        self.folder, self.changes, self.rates, self.branch_from = folder, tuple(changes), _rates(changes), branch_from
        self.fits = fits


def refusal(
    trainer: "Trainer", folder: Path, state: Mapping[str, Any], refused: list[Change], *, fits: bool
) -> ResumeRefusedError:
    """Return the error that refuses these changes; `fits` tells whether the weights have the model's shapes."""
    topics = sorted({change.topic for change in refused})
    rates_jump = bool(_rates(refused))
    earlier = _before_the_jump(trainer, folder, int(state["next_step"])) if rates_jump else None
    ways = []
    if "schedule" in topics:
        ways += _for_schedules(state, rates_jump, earlier)
    if "model" in topics:
        ways.append("keep the model: build it with the config, parts and loss of the checkpoint.")
    if "data" in topics:
        ways.append("keep the data: use the text, tokenizer, validation set and loader settings of the checkpoint.")
    if "optimizer" in topics:
        ways.append(
            "keep the optimizer: its moments belong to those parameters, so build the groups of the checkpoint."
        )
    elif fits:
        ways.append(f"accept it knowingly: accept={topics}.")
    lines = "\n".join(f"  - {way}" for way in ways)
    message = f"this run would go on differently from {folder}:\n{format_changes(refused)}\nWays to go on:\n{lines}"
    return ResumeRefusedError(message, folder, refused, earlier, fits=fits)


def _rates(changes: Sequence[Change]) -> tuple[Change, ...]:
    return tuple(change for change in changes if change.name.split(" (")[0] in REWARMED)


def _for_schedules(state: Mapping[str, Any], rates_jump: bool, earlier: Path | None) -> list[str]:
    saved = state.get("settings", {})
    texts = {key.removeprefix("schedule "): text for key, text in saved.items() if key.startswith("schedule ")}
    schedules = [f"{key}: {text}" for key, text in texts.items()]
    horizon = f"num_steps={saved.get('num_steps', 'unknown')}, schedules {{{', '.join(schedules)}}}"
    ways = [f"keep the schedule, horizon and batch of the checkpoint: {horizon}."]
    if not rates_jump:
        return ways
    ways.append("go over gradually: rewarm_steps=N takes the rates linearly from the old ones to the new, in N steps.")
    if earlier is not None:
        ways.append(
            "branch from before the decay, where these schedules do not jump: with another out_dir, "
            f"trainer.load_state({str(earlier)!r})."
        )
    else:
        ways.append("branch from before the decay: no checkpoint that is kept beside this one would do.")
    return ways


def _before_the_jump(trainer: "Trainer", folder: Path, step: int) -> Path | None:
    """Return the newest whole checkpoint beside a folder from which this run's rates go on without a jump."""
    for candidate in reversed(list_checkpoints(folder.parent)):
        try:
            state = load_state(candidate)
        except CheckpointError:
            continue
        saved, at = state.get("rates"), state.get("next_step")
        if not isinstance(saved, dict) or not isinstance(at, int) or at >= step:
            continue
        if not any(change.topic for change in compare_rates(saved, trainer.rates.at(at))):
            return candidate
    return None
