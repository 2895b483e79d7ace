"""Keys and values of a prefix that many rows begin with, computed once."""

import torch
from torch import Tensor

from tinygpt.errors import ConfigError
from tinygpt.layers import KVCache, LayerCache
from tinygpt.model import GPT


class _PrefixLayer(LayerCache):
    """What one layer keeps of the prefix: written by the first call, only read by later ones."""

    def __init__(self, max_seq_len: int) -> None:
        # No buffers of a fixed size, as the base class makes: a prefix is written once and has its own length.
        self.max_seq_len = max_seq_len
        self.window_tokens = None
        self.length = 0
        self._prefix: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._prefix is None:
            self._prefix, self.length = (k, v), k.shape[2]
            return k, v
        keys, values = self._prefix
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)

    def select(self, rows: Tensor) -> "_PrefixLayer":
        """Return the same prefix with other rows: `rows` are indices into those it was read with."""
        if self._prefix is None:
            raise ConfigError(
                "a block of this model keeps nothing in its cache, so what rows have in common cannot be read once: "
                "give share_prefixes=False."
            )
        selected = _PrefixLayer(self.max_seq_len)
        keys, values = self._prefix
        selected._prefix, selected.length = (keys[rows], values[rows]), self.length
        return selected


def read_prefix(model: GPT, prefixes: Tensor, rows: Tensor) -> KVCache:
    """Read prefixes once, and return a cache in which row `i` goes on from prefix `rows[i]`.

    The cache is good for one call: what is read with it is not added.

    Args:
        model: The model.
        prefixes: Token ids `(batch, seq)`, all of one length.
        rows: `(rows,)` int64, which prefix each row begins with.

    Raises:
        ConfigError: If a block makes no use of the cache.
    """
    length = model.max_seq_len or torch.iinfo(torch.int64).max
    layers = [_PrefixLayer(length) for _ in model.blocks]
    cache = KVCache(list[LayerCache](layers))
    model.hidden_states(prefixes, cache=cache)
    selected = KVCache([layer.select(rows) for layer in layers])
    if cache.last_embedding is not None:
        selected.last_embedding = cache.last_embedding[rows]
    return selected
