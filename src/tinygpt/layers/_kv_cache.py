"""Keys and values of the positions already read: a value handed to `forward`, never module state."""

import torch
from torch import Tensor

from tinygpt.errors import ConfigError


class LayerCache:
    """Keys and values of one layer, written once and read at every later step.

    Args:
        batch: Rows.
        num_kv_heads: Key/value heads.
        max_seq_len: Positions that fit.
        head_dim: Channels of a head.
        device: Where to keep them.
        dtype: Dtype of keys and values.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch, num_kv_heads, max_seq_len, head_dim)
        if min(shape) < 1:
            raise ConfigError(
                f"a cache needs positive sizes, got {batch=}, {num_kv_heads=}, {max_seq_len=}, {head_dim=}."
            )
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)
        self.max_seq_len = max_seq_len
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next positions and return all so far.

        Args:
            k: `(batch, kv_heads, seq, head_dim)`.
            v: Shape of `k`.

        Returns:
            Keys and values `(batch, kv_heads, length, head_dim)`, views into the cache.

        Raises:
            ConfigError: If they do not fit or have another number of rows, heads or channels.
        """
        rows, heads, _, channels = self._keys.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (rows, heads, channels) or k.shape != v.shape:
            raise ConfigError(
                f"this cache is for {rows} rows, {heads} heads and {channels} channels; "
                f"got keys {tuple(k.shape)} and values {tuple(v.shape)} of (batch, kv_heads, seq, head_dim)."
            )
        end = self.length + k.shape[2]
        if end > self._keys.shape[2]:
            raise ConfigError(
                f"the cache holds {self._keys.shape[2]} positions and {end} are needed; "
                "make it with a larger max_seq_len or generate fewer tokens."
            )
        # Detached: a cache is for reading text, and gradients through what is written in place would be wrong.
        self._keys[:, :, self.length : end] = k.detach()
        self._values[:, :, self.length : end] = v.detach()
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """The caches of all layers, and the last embedding for the smear. `GPT.new_cache` makes one that fits a model.

    Args:
        layers: One cache a layer.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self.last_embedding: Tensor | None = None

    @property
    def free(self) -> int:
        """Positions that can still be read."""
        return min((layer.max_seq_len - layer.length for layer in self.layers), default=0)

    @property
    def length(self) -> int:
        """Positions read so far."""
        return self.layers[0].length if self.layers else 0
