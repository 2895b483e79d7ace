"""A run's folder: whose it is, the file of its metrics, and what is written into it at each start."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinygpt
from tinygpt.checkpoint import RunLock, checkpoint_folder, checkpoint_step, list_checkpoints
from tinygpt.errors import ConfigError
from tinygpt.metrics import MetricsFile, read_metrics
from tinygpt.run_record import describe_run
from tinygpt.trainer._state import loss_name

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer


def lock_of(out_dir: str | Path | None) -> contextlib.AbstractContextManager[object]:
    """Return what keeps a run's folder to this process; a run that writes nothing needs none."""
    return contextlib.nullcontext() if out_dir is None else RunLock(out_dir)


def open_output(trainer: "Trainer", out_dir: str | Path) -> MetricsFile:
    """Open `metrics.jsonl` at the next step and write the record of the run.

    Raises:
        ConfigError: If the folder cannot be written.
        DataError: If there is a damaged file.
    """
    try:
        output = MetricsFile(Path(out_dir) / "metrics.jsonl", next_step=trainer.next_step)
    except OSError as error:
        raise ConfigError(
            f"out_dir={str(out_dir)!r} cannot be written: {error.strerror or error}; choose another out_dir."
        ) from None
    output.write("run", trainer.next_step - 1, **_record(trainer))
    return output


def refuse_taken_folder(trainer: "Trainer", last_saved: Path | None) -> None:
    """Refuse to write where another run is, or where another process has gone on with this one meanwhile.

    Raises:
        ConfigError: If there are checkpoints that this trainer has not come from.
    """
    found = [] if trainer.checkpoint_dir is None else list_checkpoints(trainer.checkpoint_dir)
    if found and (checkpoint_step(found[-1]) > trainer.next_step or (trainer.next_step == 0 and last_saved is None)):
        raise ConfigError(
            f"{trainer.config.out_dir} already holds a run, saved up to {found[-1].name}: "
            "continue it with trainer.resume(), or choose another out_dir."
        )


def next_folder(trainer: "Trainer") -> Path:
    """Return where the state of the next step is saved to.

    Raises:
        ConfigError: If the run has no folder.
    """
    if trainer.checkpoint_dir is None:
        raise ConfigError("save_state needs a folder, or a TrainerConfig with out_dir.")
    return checkpoint_folder(trainer.checkpoint_dir, trainer.next_step)


def is_own(trainer: "Trainer", folder: Path) -> bool:
    """Return whether a checkpoint lies with those of the run."""
    own = trainer.checkpoint_dir
    return own is not None and folder.parent.resolve() == own.resolve()


def was_announced(output: MetricsFile, folder: Path) -> bool:
    """Return whether one of the run's own checkpoints was told of before the process that wrote it ended."""
    told = (Path(str(r.get("folder", ""))) for r in read_metrics(output.path) if r.get("event") == "save")
    return any(path.parts[-2:] == folder.parts[-2:] for path in told)  # the run's folder may have been moved


def _record(trainer: "Trainer") -> dict[str, Any]:
    phases = trainer.phases
    several = len(phases) > 1
    return describe_run(
        model=trainer.model,
        optimizer=trainer.optimizer,
        loader=trainer.loader,
        settings=trainer.config.model_dump(),
        schedules={
            f"{trainer.course.title(index)}: {key}" if several else key: schedule
            for index, phase in enumerate(phases)
            for key, schedule in phase.schedules.items()
        },
        precision=trainer.precision,
        version=tinygpt.__version__,
        next_step=trainer.next_step,
        step_tokens=trainer.step_tokens,
        loss=loss_name(trainer.loss_fn),
        micro_batch_rows=trainer.micro_batch_rows,
        world_size=getattr(trainer.loader, "world_size", 1),
    )
