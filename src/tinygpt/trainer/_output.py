"""The file of a run's metrics, and what is written into it at each start."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinygpt
from tinygpt.checkpoint import list_checkpoints
from tinygpt.errors import ConfigError
from tinygpt.metrics import MetricsFile
from tinygpt.run_record import describe_run
from tinygpt.trainer._state import loss_name

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer


def open_output(trainer: "Trainer", out_dir: str | Path) -> MetricsFile:
    """Open `metrics.jsonl` at the next step and write the record of the run.

    Raises:
        ConfigError: If there are checkpoints of another run, or the folder cannot be written.
    """
    assert trainer.checkpoint_dir is not None
    if trainer.next_step == 0 and (found := list_checkpoints(trainer.checkpoint_dir)):
        raise ConfigError(
            f"{out_dir} already holds a run, saved up to {found[-1].name}: "
            "continue it with trainer.resume(), or choose another out_dir."
        )
    try:
        output = MetricsFile(Path(out_dir) / "metrics.jsonl", next_step=trainer.next_step)
    except OSError as error:
        raise ConfigError(f"out_dir={str(out_dir)!r} cannot be written: {error}.") from None
    output.write("run", trainer.next_step - 1, **_record(trainer))
    return output


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
        world_size=getattr(trainer.loader, "world_size", 1),
    )
