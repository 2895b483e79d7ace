"""Writing checkpoints behind the back of the training loop."""

import atexit
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from tinygpt.checkpoint import SnapshotMemory
from tinygpt.errors import CheckpointError

_T = TypeVar("_T")

logger = logging.getLogger("tinygpt")

Capture = Callable[[SnapshotMemory | None], Callable[[Path], Path]]
"""Takes the state, copied into memory or live, and returns what writes it into a folder."""


class Save:
    """One checkpoint on its way to the disk.

    Args:
        folder: Of the checkpoint.
        step: How many steps were done.
        write: Writes it; `None` if it is there, written by a process that died before it could say so.
        tidy: Called when it is complete; deletes older ones.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        write: Callable[[Path], Path] | None = None,
        tidy: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.step = folder, step
        self.stall_seconds = 0.0
        self.write_seconds = 0.0
        self.complete = False
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self._write, self._tidy = write, tidy

    def record(self) -> dict[str, Any]:
        """Return what `metrics.jsonl` says of it; times are those that this process knows of."""
        return {
            "folder": str(self.folder),
            "bytes": sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()),
            "stall_seconds": round(self.stall_seconds, 4),
            "write_seconds": round(self.write_seconds, 4),
            "background": self.thread is not None,
        }

    def run(self) -> None:
        """Write, and keep an error for the thread that trains."""
        start = time.perf_counter()
        try:
            assert self._write is not None
            self._write(self.folder)
            self.complete = True
            if self._tidy is not None:
                self._tidy()
        except BaseException as error:  # raised again by Saver
            self.error = error
        self.write_seconds = time.perf_counter() - start


class Saver:
    """Writes one checkpoint at a time, in a thread if asked to, and reports each in the thread that trains.

    Args:
        on_complete: Called with each finished save, by `poll`, `wait` or `settle`.

    Attributes:
        stall_seconds: How long training stood still.
        owed: Whether a checkpoint was due that is not there, since it or the one before it failed.
    """

    def __init__(self, on_complete: Callable[[Save], None]) -> None:
        self.stall_seconds = 0.0
        self.owed = False
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
        tidy: Callable[[], None] | None = None,
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
        try:
            wait()
        except BaseException:
            self.owed = True
            raise
        start = time.perf_counter()
        write = self._capture(capture) if background else None
        save = Save(folder, step, write or capture(None), tidy)
        self.owed = False
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
        self.owed = not save.complete
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


def close_at_exit(steps: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Close a loop that is still open when the program ends, while there is still enough of Python left to save."""
    reference = weakref.ref(steps)

    def close() -> None:
        if (still_open := reference()) is not None:
            still_open.close()

    atexit.register(close)
    return steps
