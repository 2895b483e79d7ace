"""Keys and values of several texts of different lengths, which are read together and leave one by one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinygpt.errors import ConfigError
from tinygpt.layers._attend import one_query_attention
from tinygpt.layers._kv_cache import KVCache, LayerCache
from tinygpt.layers._rotary import RotaryEmbedding


class SlotCache:
    """A cache with a slot for each text; its memory is that of the cache it is made from and never grows.

    A text enters by `begin`, through which its prompt is read, and `commit`. `step` then reads one more token of each
    of the first slots at once.

    Args:
        cache: An empty cache with one row a slot, as `GPT.new_cache` makes it.

    Example:
        ```python
        import torch
        from tinygpt import GPT, GPTConfig
        from tinygpt.layers import SlotCache

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        slots = SlotCache(model.new_cache(2))
        with torch.inference_mode():
            for slot, prompt in enumerate([[256, 72, 105], [256, 79]]):
                text = slots.begin(slot)
                model(torch.tensor([prompt]), cache=text)
                slots.commit(slot, text)
            logits = model(torch.tensor([[33], [107]]), cache=slots.step(2))  # (2, 1, vocab)
        slots.lengths  # [4, 3]
        ```
    """

    def __init__(self, cache: KVCache) -> None:
        self._layers = cache.layers
        self._last_embedding: Tensor | None = None
        self.num_slots = cache.layers[0]._keys.shape[0]
        self.max_seq_len = cache.free
        self.lengths = [0] * self.num_slots
        self.nbytes = sum(layer.nbytes for layer in cache.layers)
        self._addresses_held = False

    def can_cut(self, slot: int, length: int) -> bool:
        """Return whether a slot's text can go on after its first `length` positions, be it all or fewer.

        Where a window has let go of positions, going back would need some of these.
        """
        held = self.lengths[slot]
        return length == held or 0 <= length < held <= min(layer._keys.shape[2] for layer in self._layers)

    def begin(self, slot: int, *, kept: int = 0) -> KVCache:
        """Return a cache of one row that writes into this slot; what was there is lost.

        Args:
            slot: Which.
            kept: First positions of the slot's text that are not lost. If fewer than all, a model with a smear needs
                `last_embedding` set to that of the last one kept.

        Raises:
            ConfigError: If they are not there, see `can_cut`.
        """
        if kept and not self.can_cut(slot, kept):
            raise ConfigError(
                f"slot {slot} holds {self.lengths[slot]} positions and cannot go on after {kept}; ask can_cut before."
            )
        text = KVCache([layer.row(slot, length=kept) for layer in self._layers])
        if kept and kept == self.lengths[slot] and self._last_embedding is not None:
            text.last_embedding = self._last_embedding[slot : slot + 1]
        self.lengths[slot] = 0
        return text

    def commit(self, slot: int, text: KVCache) -> None:
        """Take over what was read through `begin`."""
        self.lengths[slot] = text.length
        if text.last_embedding is not None:
            last = text.last_embedding
            if self._last_embedding is None:
                self._last_embedding = last.new_zeros(self.num_slots, *last.shape[1:])
                if self._addresses_held:
                    _hold_address(self._last_embedding)
            self._last_embedding[slot] = last[0]

    def copy(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""
        length = self.lengths[target] = self.lengths[source]
        for layer in self._layers:
            for kept in (layer._keys, layer._values):
                kept[target, :, :length] = kept[source, :, :length]
        if self._last_embedding is not None:
            self._last_embedding[target] = self._last_embedding[source]

    def hold_addresses(self) -> None:
        """Tell torch's compiler that the tensors stay where they are, so that CUDA graphs may write into them."""
        self._addresses_held = True
        for layer in self._layers:
            _hold_address(layer._keys)
            _hold_address(layer._values)

    def step(self, num_rows: int) -> KVCache:
        """Return a cache through which the model reads one token of each of the first `num_rows` slots.

        Raises:
            ConfigError: If there are not so many slots, or one of them is empty or full.
        """
        if not 1 <= num_rows <= self.num_slots:
            raise ConfigError(f"num_rows={num_rows} must lie between 1 and the {self.num_slots} slots.")
        lengths = self.lengths[:num_rows]
        if not 0 < min(lengths) <= max(lengths) < self.max_seq_len:
            raise ConfigError(f"slots hold {lengths} positions; each needs a text, and room in {self.max_seq_len}.")
        device = self._layers[0]._keys.device
        cache = self.step_at(torch.tensor(lengths, device=device), lengths)
        for slot in range(num_rows):
            self.lengths[slot] += 1
        return cache

    def step_at(self, positions: Tensor, lengths: Sequence[int] | None = None) -> KVCache:
        """Return a cache that reads one token of each first slot at given positions, and leave `lengths` alone.

        For compiled steps, whose shapes must not change: without `lengths` every step looks at all positions there are.

        Args:
            positions: `(rows,)` int64.
            lengths: The same numbers, where they are known without asking the device.
        """
        places = _Places(positions, lengths)
        layers: list[LayerCache] = [_StepLayer(layer, places) for layer in self._layers]
        previous = None if self._last_embedding is None else self._last_embedding[: len(positions)]
        return _StepCache(layers, previous)


def _hold_address(tensor: Tensor) -> None:
    torch._dynamo.mark_static_address(tensor)


class _Places:
    """Where the next token of each row goes and what it sees: worked out once a step, not once a layer."""

    def __init__(self, positions: Tensor, lengths: Sequence[int] | None) -> None:
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self._lengths = lengths
        self.common_length = lengths[0] if lengths is not None and min(lengths) == max(lengths) else None
        self._known: dict[int, tuple[Tensor, int, Tensor | None]] = {}
        self._rotations: dict[RotaryEmbedding, tuple[Tensor, Tensor]] = {}

    def of(self, kept: int) -> tuple[Tensor, int, Tensor | None]:
        """Return index to write, number of positions to look at and which of these are seen, in rings of this size."""
        if kept not in self._known:
            longest = kept if self._lengths is None else max(self._lengths) + 1
            looked_at = min(longest, kept)
            visible = None
            if self._lengths is None or min(self._lengths) + 1 < looked_at:
                visible = torch.arange(looked_at, device=self.positions.device) <= self.positions[:, None]
            self._known[kept] = (self.positions % kept, looked_at, visible)
        return self._known[kept]

    def rotation(self, rope: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """Return the tables of these positions; layers share one rotary embedding as a rule."""
        if rope not in self._rotations:
            self._rotations[rope] = rope.tables(self.positions, 1)
        return self._rotations[rope]


class _StepLayer(LayerCache):
    """One token a row, each at its own position."""

    def __init__(self, layer: LayerCache, places: _Places) -> None:
        rows = len(places.positions)
        self._keys, self._values = layer._keys[:rows], layer._values[:rows]
        self.max_seq_len, self.window_tokens = layer.max_seq_len, layer.window_tokens
        self._places = places

    @property
    def length(self) -> int:  # type: ignore[override]
        if self._places.common_length is None:
            raise ConfigError(
                "rows of this cache hold different numbers of positions, so it has no length, and append cannot say "
                "what a query sees: take cache.position, and call cache.attend(q, k, v, window_tokens=..., scale=...)."
            )
        return self._places.common_length

    @property
    def position(self) -> Tensor:
        return self._places.positions

    def rotation(self, rope: RotaryEmbedding, seq: int) -> tuple[Tensor, Tensor]:
        return self._places.rotation(rope)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._write(k, v, min(self.length + 1, self._keys.shape[2]))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window_tokens: int | None = None, scale: float | None = None
    ) -> Tensor:
        self._check_window(window_tokens)
        _, looked_at, visible = self._places.of(self._keys.shape[2])
        k, v = self._write(k, v, looked_at)
        return one_query_attention(q, k, v, visible=visible, scale=scale)

    def _write(self, k: Tensor, v: Tensor, looked_at: int) -> tuple[Tensor, Tensor]:
        rows, (index, _, _) = self._places.rows, self._places.of(self._keys.shape[2])
        self._keys[rows, :, index] = k[:, :, 0].detach()
        self._values[rows, :, index] = v[:, :, 0].detach()
        return self._keys[:, :, :looked_at], self._values[:, :, :looked_at]


class _StepCache(KVCache):
    """What `SlotCache.step` hands to the model: there is room for one token, and no more."""

    def __init__(self, layers: list[LayerCache], last_embedding: Tensor | None) -> None:
        super().__init__(layers)
        self.last_embedding = last_embedding

    @property
    def free(self) -> int:
        return 1

    def remember(self, embedding: Tensor) -> None:
        if self.last_embedding is not None:
            self.last_embedding.copy_(embedding.detach())
