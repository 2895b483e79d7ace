"""What the model trains on in one micro-step."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

IGNORE_INDEX = -1
"""A target that is not trained on and not counted."""


class Batch(NamedTuple):
    """Token ids and, at each position, the token that comes next.

    Attributes:
        inputs: Token ids, `(batch, seq)` int64.
        targets: Next token ids, `(batch, seq)` int64; `IGNORE_INDEX` where there is none.
    """

    inputs: Tensor
    targets: Tensor

    @classmethod
    def from_rows(cls, rows: Tensor, *, bos_token_id: int) -> Self:
        """Cut packed rows into inputs and targets.

        Args:
            rows: `(batch, seq + 1)` token ids, `IGNORE_INDEX` where a row is padded.
            bos_token_id: What the model reads in padded places.
        """
        tokens = rows.to(torch.int64)
        inputs = tokens[:, :-1]
        return cls(torch.where(inputs == IGNORE_INDEX, bos_token_id, inputs), tokens[:, 1:].contiguous())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device; `non_blocking` overlaps the copy when it starts from pinned memory."""
        return Batch(
            self.inputs.to(device, non_blocking=non_blocking), self.targets.to(device, non_blocking=non_blocking)
        )
