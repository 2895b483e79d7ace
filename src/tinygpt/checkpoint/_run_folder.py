"""Whose folder a run's folder is: which run's, and which process's."""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from tinygpt._disk import remove, write_text
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.manifest import read_json

RUN_FILE = "run.json"
"""What makes a run the run it is, in its folder."""
_LOCK_FILE = ".lock"
_HOLDER_FILE = ".lock-holder.json"
_WRITTEN = (_LOCK_FILE, _HOLDER_FILE, "checkpoints", "metrics.jsonl")


class RunLock:
    """A run's folder for one process at a time, as a context manager that may be entered more than once.

    The system holds the lock, so that of a process that died is free again.

    Args:
        folder: The run's folder; it may be a link, since its owner named it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        # Not of one thread: a loop may be left in another one than it was entered in.
        self._lock = FileLock(self.folder / _LOCK_FILE, thread_local=False)
        self._depth = 0

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            CheckpointError: If another process or another loop holds it, or something in the folder is a link.
            ConfigError: If the folder cannot be written.
        """
        if self._depth == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in _WRITTEN:
                    if (self.folder / name).is_symlink():
                        raise CheckpointError(
                            f"{self.folder / name} is a link, and a run does not write through one; "
                            "give the real folder as out_dir."
                        )
                checkpoints = self.folder / "checkpoints"
                if checkpoints.exists() and not checkpoints.is_dir():
                    raise ConfigError(f"{checkpoints} is not a folder; move it away, or choose another out_dir.")
                self._lock.acquire(timeout=0)
            except Timeout:
                raise CheckpointError(
                    f"{self.folder} is in use by {self._holder()}; wait until it ends, or choose another out_dir."
                ) from None
            except OSError as error:
                raise ConfigError(
                    f"out_dir={str(self.folder)!r} cannot be written: {error.strerror or error}; choose another "
                    "out_dir."
                ) from None
            with contextlib.suppress(OSError):  # only for the message above
                write_text(self.folder / _HOLDER_FILE, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lock back when the outermost one is left."""
        self._depth -= 1
        if self._depth == 0:
            with contextlib.suppress(OSError):
                remove(self.folder / _HOLDER_FILE)
            self._lock.release()

    def _holder(self) -> str:
        try:
            holder = read_json(self.folder / _HOLDER_FILE)
        except CheckpointError:
            return "another process"
        pid, host = holder.get("pid"), holder.get("host")
        if pid == os.getpid() and host == socket.gethostname():
            return "another Trainer of this process, whose loop was not left"
        return f"process {str(pid)[:20]} on {str(host)[:80]}"


def claim_run_folder(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Write what makes this run the run it is into the folder's `run.json`, or compare with what is there.

    A program that is run again with other settings then stops, instead of going on with or showing another run's
    results as its own.

    Args:
        folder: The run's folder.
        identity: JSON values by name, such as recipe, seed and data fingerprint.

    Raises:
        CheckpointError: If the folder belongs to a run with another identity, or cannot be written.
    """
    path = Path(folder) / RUN_FILE
    if path.parent.exists() and not path.parent.is_dir():
        raise CheckpointError(f"{folder} is a file; a run needs a folder of its own. Choose another name.")
    if path.exists():
        there = read_json(path)
        different = [
            f"{name} was {there.get(name)!r} and is {identity.get(name)!r}"
            for name in [*there, *(name for name in identity if name not in there)]
            if there.get(name) != identity.get(name)
        ]
        if different:
            raise CheckpointError(f"{folder} belongs to another run: {'; '.join(different)}. Choose another folder.")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(dict(identity), indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"the run's folder {folder} cannot be written: {error.strerror or error}; choose another folder."
        ) from None
