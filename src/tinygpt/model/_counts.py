"""How many parameters a model has, by role."""

from typing import NamedTuple


class ParameterCounts(NamedTuple):
    """Number of parameters by role."""

    token_embedding: int
    value_embeddings: int
    head: int
    matrices: int
    scalars: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)
