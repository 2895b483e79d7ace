"""Tables looked up by token id, and the smear that mixes each embedding with the one before it."""

import torch
from torch import Tensor, nn

from tinygpt._numbers import check_whole
from tinygpt.errors import ConfigError
from tinygpt.layers._linear import Linear, uniform_with_std_
from tinygpt.layers._row_table import RowTable, check_sizes


class TokenEmbedding(RowTable):
    """Table from token ids to the residual stream; starts normal with standard deviation `std`.

    Args:
        num_embeddings: Rows, one a token id.
        embedding_dim: Width of the residual stream.
        std: Standard deviation of the first values; 0.8 is nanochat's.

    Raises:
        ConfigError: If a size is not positive.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float = 0.8) -> None:
        check_sizes(num_embeddings, embedding_dim)
        self.std = std  # before super().__init__, which draws the weight
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the table."""
        nn.init.normal_(self.weight, std=self.std)


class ValueEmbedding(RowTable):
    """Table from token ids to attention values; starts uniform with standard deviation `std`.

    Args:
        num_embeddings: Rows, one a token id.
        embedding_dim: `num_kv_heads * head_dim` of the attention that adds it to its values.
        std: Standard deviation of the first values; `None` takes `embedding_dim ** -0.5`. nanochat takes
            `dim ** -0.5` of the model, which differs when there are fewer key/value heads than query heads.

    Raises:
        ConfigError: If a size is not positive.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float | None = None) -> None:
        check_sizes(num_embeddings, embedding_dim)
        self.std = embedding_dim**-0.5 if std is None else std  # before super().__init__, which draws the weight
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the table."""
        uniform_with_std_(self.weight, self.std)


class Smear(nn.Module):
    """Add a gated share of the previous token's embedding: `x[t] + scale * sigmoid(gate(x[t])) * x[t - 1]`.

    It gives the first layer word-pair information for almost nothing. The first token of a sequence has no
    predecessor and stays as it is. The scale starts at zero, so a new model starts without smear.

    Args:
        dim: Width of the residual stream.
        gate_channels: Leading channels of `x` that the gate reads.

    Raises:
        ConfigError: If the gate would read more channels than there are.

    References:
        modded-nanogpt's smear module, in nanochat's form.
    """

    def __init__(self, dim: int, *, gate_channels: int = 24) -> None:
        super().__init__()
        check_whole(dim=dim, gate_channels=gate_channels)
        if not 1 <= gate_channels <= dim:
            raise ConfigError(f"Smear gate_channels={gate_channels} must lie between 1 and dim={dim}.")
        self.gate = Linear(gate_channels, 1)
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the scale; draw the gate from [0, 0.02)."""
        nn.init.zeros_(self.scale)
        nn.init.uniform_(self.gate.weight, 0.0, 0.02)

    def forward(self, x: Tensor, *, previous: Tensor | None = None) -> Tensor:
        """Mix each position with its predecessor.

        Args:
            x: `(batch, seq, dim)`.
            previous: `(batch, 1, dim)`, the embedding before `x[:, 0]` as it was before smearing; `None` at the
                start of a sequence.

        Returns:
            Same shape and dtype as `x`.
        """
        if previous is None:
            return torch.cat((x[:, :1], self._mix(x[:, 1:], x[:, :-1])), dim=1)
        return self._mix(x, torch.cat((previous, x[:, :-1]), dim=1))

    def _mix(self, x: Tensor, before: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
        return x + self.scale.to(x.dtype) * gate * before
