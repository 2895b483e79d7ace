"""Writing checkpoints behind the back of the training loop, and which of them stay."""

import atexit
import logging
import math
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygpt.checkpoint import SnapshotMemory, checkpoint_step, list_checkpoints, mark_latest, remove_old_checkpoints
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.trainer._config import TrainerConfig

logger = logging.getLogger("tinygpt")

Capture = Callable[[SnapshotMemory | None], Callable[[Path], Path]]
"""Takes the state, copied into memory or live, and returns what writes it into a folder."""


class Save:
    """One checkpoint on its way to the disk.

    Args:
        folder: Of the checkpoint.
        step: How many steps were done.
        write: Writes it.
        tidy: Called when it is complete; deletes older ones.
    """

    def __init__(self, folder: Path, step: int, write: Callable[[Path], Path], tidy: Callable[[], None]) -> None:
        self.folder, self.step = folder, step
        self.stall_seconds = 0.0
        self.write_seconds = 0.0
        self.bytes = 0
        self.complete = False
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self._write, self._tidy = write, tidy

    def record(self) -> dict[str, Any]:
        """Return what `metrics.jsonl` says of it."""
        return {
            "folder": str(self.folder),
            "bytes": self.bytes,
            "stall_seconds": round(self.stall_seconds, 4),
            "write_seconds": round(self.write_seconds, 4),
            "background": self.thread is not None,
        }

    def run(self) -> None:
        """Write, and keep an error for the thread that trains."""
        start = time.perf_counter()
        try:
            self._write(self.folder)
            self.complete = True
            self.bytes = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            self._tidy()
        except BaseException as error:  # raised again by Saver
            self.error = error
        self.write_seconds = time.perf_counter() - start


class Saver:
    """Writes one checkpoint at a time, in a thread if asked to, and reports each in the thread that trains.

    Args:
        on_complete: Called with each finished save, by `poll`, `wait` or `settle`.
    """

    def __init__(self, on_complete: Callable[[Save], None]) -> None:
        self.stall_seconds = 0.0
        self._on_complete = on_complete
        self._memory = SnapshotMemory()
        self._running: Save | None = None
        self._unreported: Exception | None = None
        self._warned = False

    def save(
        self,
        folder: Path,
        step: int,
        capture: Capture,
        *,
        tidy: Callable[[], None],
        background: bool = False,
        left: bool = False,
    ) -> None:
        """Take the state now and write it; an earlier save is waited for first.

        Args:
            folder: Where.
            step: How many steps were done.
            capture: Takes the state.
            tidy: Called when the checkpoint is complete.
            background: Whether to copy the state and write it in a thread.
            left: Whether the loop is being left by an error or `break`, so that a failure is kept as `settle` does.

        Raises:
            CheckpointError: If it failed, or the one before.
        """
        wait = self.settle if left else self.wait
        wait()
        start = time.perf_counter()
        write = self._capture(capture) if background else None
        save = Save(folder, step, write or capture(None), tidy)
        self._running = save
        if write is None:
            save.run()
        else:
            # Not a daemon: a program that ends waits for it.
            save.thread = threading.Thread(target=save.run, name=f"tinygpt writes {folder.name}")
            save.thread.start()
        self._stood_still(save, start)
        if write is None:
            wait()

    def poll(self) -> None:
        """Report a save that has finished meanwhile.

        Raises:
            CheckpointError: If it failed.
        """
        if self._running is None or self._running.thread is None or not self._running.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for a running save and report it.

        Raises:
            CheckpointError: If it failed, or one did that nobody could be told of.
        """
        if (error := self._unreported) is not None:
            self._unreported = None
            raise error
        if (save := self._running) is not None:
            start = time.perf_counter()
            if save.thread is not None:
                save.thread.join()
            self._stood_still(save, start)
            self._finish(save)

    def settle(self) -> None:
        """Wait as a loop is left by another error or by `break`: a failure is logged, and raised at the next use."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)
            self._unreported = error

    def _finish(self, save: Save) -> None:
        self._running = None
        if save.complete:
            self._on_complete(save)
        if save.error is None:
            return
        if isinstance(save.error, CheckpointError) or not isinstance(save.error, Exception):  # a second Ctrl-C
            raise save.error
        raise CheckpointError(f"the checkpoint {save.folder} could not be written: {save.error!r}.") from save.error

    def _capture(self, capture: Capture) -> Callable[[Path], Path] | None:
        try:
            return capture(self._memory)
        except MemoryError as error:
            if not self._warned:
                warnings.warn(
                    f"checkpoints are written while training waits, for want of memory for a copy: {error}; "
                    "save_in_background=False asks for that.",
                    stacklevel=2,
                )
            self._warned = True
            return None

    def _stood_still(self, save: Save, start: float) -> None:
        seconds = time.perf_counter() - start
        save.stall_seconds += seconds
        self.stall_seconds += seconds


def close_at_exit(steps: Generator[Any, None, None]) -> None:
    """Close a loop that is still open when the program ends, while there is still enough of Python left to save."""
    reference = weakref.ref(steps)

    def close() -> None:
        if (still_open := reference()) is not None:
            still_open.close()

    atexit.register(close)


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


def tidier(
    folder: Path, config: TrainerConfig, evaluations: Sequence[Mapping[str, Any]], protect: Collection[int]
) -> Callable[[], None]:
    """Return what marks a checkpoint as the latest once it is complete, and deletes those that may go."""
    evaluations, protect = tuple(evaluations), set(protect)  # as they are now: training goes on meanwhile

    def tidy() -> None:
        mark_latest(folder)
        if config.keep_last is not None:
            steps = {checkpoint_step(path) for path in list_checkpoints(folder.parent)}
            kept = {checkpoint_step(folder), *protect, *best_steps(evaluations, steps, config.keep_best or 0)}
            remove_old_checkpoints(
                folder.parent, keep_last=config.keep_last, keep_every=config.keep_every, protect=kept
            )

    return tidy
