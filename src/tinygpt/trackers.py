"""Sending a run's numbers elsewhere: one small protocol, and adapters for four well-known trackers.

None of them is needed or imported unless it is opened; `metrics.jsonl` is written without any.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tinygpt.errors import ConfigError, MissingDependencyError, TinyGPTError
from tinygpt.metrics import StepMetrics

__all__ = ["Tracker", "Tracking", "check_tracker", "open_tracker", "track"]

_logger = logging.getLogger("tinygpt")

# What all four accept as the name of a run, and what cannot leave a folder.
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Tracker(Protocol):
    """Anything that numbers can be sent to; a class of your own needs these two methods and no base."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name, at a step."""

    def close(self) -> None:
        """Write out what is still kept back; called once."""


def check_tracker(name: str, run: str | None = None) -> None:
    """Look whether a tracker can be opened, without importing or opening it.

    Args:
        name: As for `open_tracker`.
        run: As for `open_tracker`; `None` if it is not known yet.

    Raises:
        ConfigError: If it is not known, or the run's name does not fit.
        MissingDependencyError: If its package is not installed.
    """
    if name not in _OPENERS:
        raise ConfigError(f"tracker {name!r} is not known; choose {', '.join(sorted(_OPENERS))}.")
    if run is not None and not _RUN_NAME.fullmatch(run):
        raise ConfigError(
            f"run={run!r}: the name of a run in a tracker, for a recipe that of its folder, begins with a letter or "
            "digit and holds at most 128 letters, digits, dots, dashes and underscores."
        )
    spec = find_spec(name)  # each is called as its package is; a folder that wandb wrote is no package
    if spec is None or spec.origin is None:
        raise _missing(name, f"No module named {name!r}")


def open_tracker(
    name: str,
    project: str,
    run: str,
    *,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> Tracker:
    """Open a run in a tracker.

    Args:
        name: `"trackio"`, `"tensorboard"`, `"wandb"` or `"mlflow"`; each needs the extra of its name.
        project: What the tracker collects runs under; TensorBoard has a folder for it.
        run: Name of the run: letters, digits, dots, dashes and underscores.
        folder: Where files go. TensorBoard: the folder to point `--logdir` at, `runs` by default. MLflow: a SQLite
            database is made there; by default what `MLFLOW_TRACKING_URI` says. wandb: for what it keeps locally.
            trackio asks its own `TRACKIO_DIR` and takes none.
        settings: Settings to show beside the run, where the tracker can.
        resume: Go on with the run of this name if there is one. Without it such a run is an error, so that two runs are
            never drawn as one.

    Returns:
        The tracker; pass it to `track`.

    Raises:
        ConfigError: If the name, the run's name or the folder does not fit, the run is there already, or the tracker
            refuses, for want of a login for example.
        MissingDependencyError: If the tracker's package is not installed.

    Example:
        ```python no-run
        tracker = open_tracker("tensorboard", "my-project", "first-run")
        trainer.fit(track(tracker))
        ```
    """
    check_tracker(name, run)
    if not project:
        raise ConfigError(f"project={project!r}: a project needs a name.")
    try:
        return _OPENERS[name](project, run, None if folder is None else Path(folder), dict(settings or {}), resume)
    except ImportError as error:
        raise _missing(name, str(error)) from None
    except TinyGPTError:
        raise
    except Exception as error:  # of the tracker itself: no network, no login, a version that it does not know
        raise ConfigError(f"the tracker {name!r} cannot be opened: {type(error).__name__}: {error}") from error


class Tracking:
    """The hook that `track` makes; as a context manager it closes its tracker when the block is left.

    Args:
        tracker: Where numbers go.
        every: Send every so many steps, and the last.
        prefix: Put before each name.

    Raises:
        ConfigError: If `every` is not positive.
    """

    def __init__(self, tracker: Tracker, *, every: int = 1, prefix: str = "train/") -> None:
        if every < 1:
            raise ConfigError(f"every={every} is not positive; choose 1 or more.")
        self._tracker = tracker
        self._every = every
        self._prefix = prefix
        self._entered = False
        self._closed = False
        self._lost = 0

    def __call__(self, trainer: Any, step: StepMetrics) -> None:
        """Send a step; close the tracker after the last one, unless a `with` block does."""
        last = step.index + 1 == trainer.config.num_steps
        if last or (step.index + 1) % self._every == 0:
            self.log(
                {f"{self._prefix}{key}": value for key, value in asdict(step).items() if key != "index"}, step.index
            )
        if last and not self._entered:
            self.close()

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Send numbers of your own, such as an evaluation; what is `None` or not finite is left out.

        A tracker that fails, for want of a network for example, does not end the training: the first failure is logged
        as a warning and all are counted.

        Raises:
            ConfigError: If the tracker was closed.
        """
        if self._closed:
            raise ConfigError("the tracker is closed; to log after the last step use `with track(...) as hook:`.")
        known = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        try:
            self._tracker.log(known, step)
        except Exception as error:
            if not self._lost:
                _logger.warning("the tracker failed at step %d, training goes on: %r", step, error)
            self._lost += 1

    def close(self) -> None:
        """Close the tracker; once is enough, twice is no error."""
        if self._closed:
            return
        self._closed = True
        if self._lost:
            _logger.warning("the tracker did not take %d of the logged steps; metrics.jsonl has them.", self._lost)
        try:
            self._tracker.close()
        except Exception as error:
            _logger.warning("the tracker could not be closed: %r", error)

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(tracker: Tracker, *, every: int = 1, prefix: str = "train/") -> Tracking:
    """Return a hook for `Trainer.fit` that sends each step's numbers to a tracker.

    The prefix keeps them apart from numbers of your own, such as `"validation/bpb"`. The tracker is closed after
    the last step; in a `with` block it is closed when the block is left, so also when training fails or is interrupted.

    Args:
        tracker: What `open_tracker` returned, or an object of your own.
        every: Send every so many steps, and the last.
        prefix: Put before each name.

    Raises:
        ConfigError: If `every` is not positive.

    Example:
        ```python no-run
        with track(open_tracker("wandb", "my-project", "first-run")) as hook:
            trainer.fit([hook, every(250, lambda trainer, step: hook.log({"validation/bpb": measure()}, step.index))])
        ```
    """
    return Tracking(tracker, every=every, prefix=prefix)


def _missing(name: str, reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f'the tracker {name!r} needs a package that is not installed ({reason}): pip install "tinygpt[{name}]".'
    )


def _taken(run: str) -> ConfigError:
    return ConfigError(f"there is a run {run!r} already: choose another name, or resume=True to go on with it.")


class _TensorBoard:
    def __init__(self, project: str, run: str, folder: Path | None, settings: dict[str, Any], resume: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = (folder or Path("runs")) / project / run
        self._there = any(self._folder.glob("events.out.tfevents.*"))
        if self._there and not resume:
            raise _taken(run)
        self._open: Callable[..., Any] = SummaryWriter
        self._writer: Any = None
        self._settings = settings

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            # Only now is it known from which step on a resumed run draws anew.
            self._writer = self._open(str(self._folder), purge_step=step if self._there else None)
            lines = "\n".join(f"    {key} = {value}" for key, value in self._settings.items())
            if lines:
                self._writer.add_text("settings", lines, step)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    def __init__(self, project: str, run: str, folder: Path | None, settings: dict[str, Any], resume: bool) -> None:
        import wandb

        # The server refuses a run that is there; offline only its folder can tell.
        if not resume and any((folder or Path()).glob(f"wandb/offline-run-*-{run}")):
            raise _taken(run)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=project,
            name=run,
            id=run,
            resume="allow" if resume else "never",
            dir=None if folder is None else str(folder),
            config=settings,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, project: str, run: str, folder: Path | None, settings: dict[str, Any], resume: bool) -> None:
        import trackio

        if folder is not None:
            raise ConfigError(f"folder={str(folder)!r}: trackio keeps its files where TRACKIO_DIR says; set that.")
        try:
            there = [known.name for known in trackio.Api().runs(project)]
        except ValueError:  # there is no such project yet
            there = []
        if run in there and not resume:
            raise _taken(run)
        # Its own samples of CPU and GPU would need a thread, and are not what was asked for.
        self._run: Any = trackio.init(
            project=project,
            name=run,
            config=settings,
            resume="allow" if resume else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, project: str, run: str, folder: Path | None, settings: dict[str, Any], resume: bool) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._metric: Callable[..., Any] = Metric
        self._client: Any = MlflowClient(
            tracking_uri=None if folder is None else f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        )
        found = self._client.get_experiment_by_name(project)
        if found is None:
            artifacts = None if folder is None else (folder / "artifacts").resolve().as_uri()
            experiment = self._client.create_experiment(project, artifact_location=artifacts)
        else:
            experiment = found.experiment_id
        there = self._client.search_runs([experiment], f"attributes.run_name = '{run}'", max_results=1)
        if there and not resume:
            raise _taken(run)
        if there:
            self._id = there[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, run_name=run).info.run_id
            for key, value in settings.items():
                self._client.log_param(self._id, re.sub(r"[^\w./ -]", "_", key), str(value)[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_Opener = Callable[[str, str, Path | None, dict[str, Any], bool], Tracker]
_OPENERS: dict[str, _Opener] = {
    "mlflow": _Mlflow,
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
