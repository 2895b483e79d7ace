"""How many rows of a batch are computed at a time."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tinygpt.data import Batch
from tinygpt.errors import ConfigError

logger = logging.getLogger("tinygpt")


class MicroBatchRows:
    """How many rows of the loader's batches are computed at a time.

    Args:
        setting: A number, `"auto"`, or `None` for as many as the loader gives.
        plan: Called with rows and tokens of a row of the first batch; returns how many rows are expected to fit.
        on_change: Called with the rows and why, when `"auto"` has chosen.

    Attributes:
        rows: The number; `None` for as many as the loader gives, and for `"auto"` before it has chosen.
    """

    def __init__(
        self, setting: int | str | None, plan: Callable[[int, int], int], on_change: Callable[[int, str], None]
    ) -> None:
        self.auto = setting == "auto"
        self.rows = setting if isinstance(setting, int) else None
        self._plan = plan
        self._on_change = on_change
        self._planned = False
        self._shape: tuple[int, int] | None = None

    def choose_for(self, loader: Any) -> None:
        """Plan for a loader that tells the shape of its batches, as a run or a phase begins."""
        if shape := _shape_of(loader):
            self._choose(*shape)

    def go_on_with(self, rows: int | None, loader: Any = None) -> None:
        """Take over what a checkpoint's run ended with, so that this one repeats it; it read from such a loader."""
        if self.auto:
            self.rows = rows if type(rows) is int and rows > 0 else None
            self._shape, self._planned = _shape_of(loader), False

    def split(self, batch: Batch) -> Iterator[Batch]:
        """Yield the micro-batches of a batch; the last one may have fewer rows."""
        if not self._planned:
            self._choose(*batch.inputs.shape[:2])
        if self.rows is None or self.rows >= len(batch.inputs):
            yield batch
            return
        for parts in zip(*(torch.split(part, self.rows) for part in batch), strict=True):
            yield Batch(*parts)

    def step_down(self, used: int, index: int) -> None:
        """Halve the rows after memory ran out with so many.

        Raises:
            ConfigError: If it was one row.
        """
        if used <= 1:
            raise ConfigError(
                f"step {index}: memory runs out with a single row. Set activation_checkpointing='mlp' or 'block', a "
                "smaller chunk of the loss (LMHead.chunk_tokens, loss_chunk_tokens in a recipe), shorter rows, or "
                "take a smaller model; tinygpt plan tells what fits."
            )
        logger.warning("step %d: out of memory with %d rows at a time; going on with %d", index, used, used // 2)
        self._set(used // 2, f"out of memory with {used}")

    def _choose(self, rows: int, seq_len: int) -> None:
        """Plan for batches of this shape, once; fewer rows that a checkpoint brought for the same shape stay."""
        if not self.auto or (self._planned and self._shape == (rows, seq_len)):
            return
        same = self._shape in (None, (rows, seq_len))
        self._planned, self._shape = True, (rows, seq_len)
        planned = self._plan(rows, seq_len)
        if self.rows is None or not same or planned < self.rows:
            self._set(planned, "planned for the memory there is")

    def _set(self, rows: int, why: str) -> None:
        self.rows = rows
        self._on_change(rows, why)


def _shape_of(loader: Any) -> tuple[int, int] | None:
    rows, seq_len = (getattr(loader, name, None) for name in ("rows", "seq_len"))
    return (rows, seq_len) if isinstance(rows, int) and isinstance(seq_len, int) else None
