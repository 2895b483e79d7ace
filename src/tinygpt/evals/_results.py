"""What an evaluation has found so far, on disk, so that a killed one goes on."""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinygpt._disk import write_text
from tinygpt.errors import ConfigError, DataError
from tinygpt.evals._scoring import LogitsModel

_FORMAT_VERSION = 1
_SECONDS_BETWEEN_WRITES = 20.0


class TaskResults:
    """Which items of one task are answered, and how: `True` right, `False` wrong, `None` not yet.

    Args:
        folder: Where the task's file lies; None keeps everything in memory.
        label: The task.
        key: What the answers depend on; a file with another key is refused.
        num_items: Items of the task that are asked.

    Raises:
        DataError: If the folder is a file, or the task's file is damaged or of another model, bundle or setting.
    """

    def __init__(self, folder: Path | None, label: str, key: dict[str, Any], num_items: int) -> None:
        self.correct: list[bool | None] = [None] * num_items
        self.num_cropped = 0
        self._key = key
        self._written = time.monotonic()
        # A label is any text: only what every file system takes goes into the name, and a hash tells the rest apart.
        name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', label)[:60]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.json"
        if folder is not None and folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file, and results are kept in a folder; choose another name.")
        self._path = None if folder is None else folder / name
        if self._path is not None and self._path.exists():
            self._read(self._path)

    @property
    def missing(self) -> list[int]:
        """Items that are not answered yet."""
        return [index for index, correct in enumerate(self.correct) if correct is None]

    def write(self, *, now: bool = False) -> None:
        """Write the file, complete or not at all; unless `now`, only if the last time is a while ago."""
        if self._path is None or (not now and time.monotonic() - self._written < _SECONDS_BETWEEN_WRITES):
            return
        marks = "".join("." if correct is None else str(int(correct)) for correct in self.correct)
        record = {
            "format_version": _FORMAT_VERSION,
            "key": self._key,
            "correct": marks,
            "num_cropped": self.num_cropped,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(record, indent=1))
        self._written = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            record = json.loads(path.read_text("utf-8"))
            version, key, marks, cropped = (record[k] for k in ("format_version", "key", "correct", "num_cropped"))
            self.num_cropped = int(cropped)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error!r}); delete it to ask these items again.") from None
        if version != _FORMAT_VERSION or not isinstance(key, dict):
            raise DataError(f"{path} has format version {version}; this tinygpt reads version {_FORMAT_VERSION}.")
        differing = sorted(name for name in {*key, *self._key} if key.get(name) != self._key.get(name))
        if differing:
            raise DataError(f"{path} was written with another {', '.join(differing)}; give results another folder.")
        if not isinstance(marks, str) or len(marks) != len(self.correct) or set(marks) - set("01."):
            raise DataError(f"{path} is damaged: its answers do not fit the task; delete it to ask these items again.")
        self.correct = [None if mark == "." else mark == "1" for mark in marks]


def model_fingerprint(model: LogitsModel) -> str:
    """Return a SHA-256 hex digest of a model's class, dtype of computation and weights.

    Raises:
        ConfigError: If the model is a plain function, which has no weights to tell it from another.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "results are kept for an nn.Module alone: a function has no weights to tell it by; wrap it in one."
        )
    digest = hashlib.sha256(f"{type(model).__qualname__} {getattr(model, 'compute_dtype', None)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
