"""Keys and values of the positions already read: a value handed to `forward`, never module state."""

from typing import Self

import torch
from torch import Tensor

from tinygpt._numbers import check_whole, given
from tinygpt.errors import ConfigError
from tinygpt.layers._attend import causal_attention
from tinygpt.layers._rotary import RotaryEmbedding


class LayerCache:
    """Keys and values of one layer, written once and read at every later step.

    With a window only what the next position can see is kept, in a ring: the newest position takes the place of the
    one that left the window.

    Args:
        batch: Rows.
        num_kv_heads: Key/value heads.
        max_seq_len: Positions that can be read.
        head_dim: Channels of a head.
        window_tokens: How many tokens before its own a position sees; `None` keeps all.
        device: Where to keep them.
        dtype: Dtype of keys and values.

    Raises:
        ConfigError: If a size is not positive or the window is negative.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        *,
        window_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole(batch=batch, num_kv_heads=num_kv_heads, max_seq_len=max_seq_len, head_dim=head_dim)
        check_whole(**given(window_tokens=window_tokens))
        if min(batch, num_kv_heads, max_seq_len, head_dim) < 1:
            raise ConfigError(
                f"a cache needs positive sizes, got {batch=}, {num_kv_heads=}, {max_seq_len=}, {head_dim=}."
            )
        if window_tokens is not None and window_tokens < 0:
            raise ConfigError(f"window_tokens={window_tokens} is negative; use None for no window.")
        kept = max_seq_len if window_tokens is None else min(max_seq_len, window_tokens + 1)
        shape = (batch, num_kv_heads, kept, head_dim)
        # Zeros: where rows have different lengths, what lies beyond a row's end is multiplied by 0, and may not be NaN.
        self._keys = torch.zeros(shape, device=device, dtype=dtype)
        self._values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_seq_len = max_seq_len
        self.window_tokens = window_tokens
        self.length = 0

    @property
    def position(self) -> int | Tensor:
        """Position of the next token; `(batch,)` int64 where rows stand at different ones."""
        return self.length

    @property
    def nbytes(self) -> int:
        """Memory of keys and values in bytes."""
        return self._keys.nbytes + self._values.nbytes

    def rotation(self, rope: RotaryEmbedding, seq: int) -> tuple[Tensor, Tensor]:
        """Return what `rope.turn` needs for the next `seq` positions."""
        return rope.tables(self.position, seq)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window_tokens: int | None = None, scale: float | None = None
    ) -> Tensor:
        """Append keys and values and let the queries of the same positions attend to all that the window allows.

        Args:
            q: `(batch, heads, seq, head_dim)`.
            k: `(batch, kv_heads, seq, head_dim)`.
            v: Shape of `k`.
            window_tokens: As in `causal_attention`; a cache with a window needs the same here.
            scale: As in `causal_attention`.

        Returns:
            `(batch, heads, seq, head_dim)`.

        Raises:
            ConfigError: As in `append`, or if the windows differ.
        """
        self._check_window(window_tokens)
        k, v = self.append(k, v)
        return causal_attention(q, k, v, window_tokens=window_tokens, scale=scale)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next positions and return what their queries may see.

        Args:
            k: `(batch, kv_heads, seq, head_dim)`.
            v: Shape of `k`.

        Returns:
            Keys and values `(batch, kv_heads, length, head_dim)`. With a window these are at least the positions the
            new ones see, in order, or in any order when `seq` is 1 and all of them are seen.

        Raises:
            ConfigError: If they do not fit or have another number of rows, heads or channels.
        """
        rows, heads, _, channels = self._keys.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (rows, heads, channels) or k.shape != v.shape:
            raise ConfigError(
                f"this cache is for {rows} rows, {heads} heads and {channels} channels; "
                f"got keys {tuple(k.shape)} and values {tuple(v.shape)} of (batch, kv_heads, seq, head_dim)."
            )
        start, end = self.length, self.length + k.shape[2]
        if end > self.max_seq_len:
            raise ConfigError(
                f"the cache holds {self.max_seq_len} positions and {end} are needed; "
                "make it with a larger max_seq_len or generate fewer tokens."
            )
        self.length = end
        # Detached: a cache is for reading text, and gradients through what is written in place would be wrong.
        return _append(self._keys, k.detach(), start), _append(self._values, v.detach(), start)

    def row(self, index: int, *, length: int = 0) -> Self:
        """Return a cache of one row that writes into this row's memory, after its first `length` positions."""
        view = object.__new__(type(self))
        view._keys, view._values = self._keys[index : index + 1], self._values[index : index + 1]
        view.max_seq_len, view.window_tokens, view.length = self.max_seq_len, self.window_tokens, length
        return view

    def _check_window(self, window_tokens: int | None) -> None:
        if self.window_tokens is not None and window_tokens != self.window_tokens:
            raise ConfigError(
                f"this cache keeps a window of {self.window_tokens} tokens and cannot serve window_tokens="
                f"{window_tokens}; make it with the window of its layer."
            )


def _append(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """Write positions `start...` into a ring and return what they see, see `LayerCache.append`."""
    kept, seq = ring.shape[2], new.shape[2]
    end = start + seq
    if end <= kept:
        ring[:, :, start:end] = new
        return ring[:, :, :end]
    if seq == 1:
        ring[:, :, start % kept] = new[:, :, 0]
        return ring
    # What the first new position sees lies in the ring and would be overwritten by the last ones: read it before.
    earlier = torch.arange(max(0, start - kept + 1), start, device=ring.device) % kept
    seen = torch.cat((ring[:, :, earlier], new), dim=2)
    last = torch.arange(end - min(kept, seq), end, device=ring.device) % kept
    ring[:, :, last] = new[:, :, -len(last) :]
    return seen


class KVCache:
    """The caches of all layers, and the last embedding for the smear. `GPT.new_cache` makes one that fits a model.

    All rows stand at the same position; `SlotCache` holds texts of different lengths.

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

    def remember(self, embedding: Tensor) -> None:
        """Keep a copy of the last position's embedding, `(batch, 1, dim)`, for the smear of the next."""
        self.last_embedding = embedding.detach().clone()
