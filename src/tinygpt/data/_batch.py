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


def document_ids(token_ids: Tensor, bos_token_id: int) -> Tensor:
    """Return which document of its row each position belongs to, for those who keep attention inside documents.

    Every document in a packed row begins with `<|bos|>`, and so does a rest that `overflow="carry"` packed later;
    text never holds that id. With `overflow="concat"` a row may begin inside a document, which then has number 0.

    Args:
        token_ids: `(batch, seq)` inputs, on any device.
        bos_token_id: The tokenizer's `<|bos|>`.

    Returns:
        Numbers that rise by one at each document's start, `(batch, seq)` int64.

    Example:
        ```python
        import torch
        from tinygpt.data import document_ids

        ids = document_ids(torch.tensor([[9, 1, 2, 9, 3]]), bos_token_id=9)  # [[1, 1, 1, 2, 2]]
        mask = ids[:, :, None] == ids[:, None, :]  # (batch, seq, seq): True where both are of one document
        ```
    """
    return (token_ids == bos_token_id).cumsum(dim=1)
