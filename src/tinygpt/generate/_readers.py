"""The engine's view of a model: prompts in, one token more for every text, logits out."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from tinygpt.layers import KVCache, SlotCache
from tinygpt.model import GPT


class Reader(Protocol):
    """Reads texts in numbered slots; a text is everything that was read into its slot since `prefill`."""

    max_seq_len: int
    nbytes: int

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """Read the beginning of a text and return the logits after it, `(1, vocab)`."""

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """Read a token of each of the first slots and return the logits after them, `(len(token_ids), vocab)`."""

    def copy(self, source: int, target: int) -> None:
        """Let a slot hold the text of another one."""

    def length(self, slot: int) -> int:
        """Return how many tokens of the slot's text were read."""


class CachedReader:
    """Reads with keys and values of what was read before.

    Args:
        model: The model.
        num_slots: Texts at a time.
        max_seq_len: Longest text.
        compiled: Whether decoding runs compiled, at one shape: all slots, all positions.
    """

    def __init__(self, model: GPT, num_slots: int, max_seq_len: int, *, compiled: bool = False) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._slots = SlotCache(model.new_cache(num_slots, max_seq_len=max_seq_len))
        self.max_seq_len = max_seq_len
        self.nbytes = self._slots.nbytes
        self._compiled = _compiled_step(model, self._slots, self._device) if compiled else None

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        return self._read(slot, token_ids, self._slots.begin(slot))

    def _read(self, slot: int, token_ids: Sequence[int], cache: KVCache) -> Tensor:
        with _eagerly():
            logits = _next_logits(self._model, self._tensor([token_ids]), cache)
        self._slots.commit(slot, cache)
        return logits

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        if self._compiled is not None:
            return self._decode_compiled(self._compiled, token_ids)
        with _eagerly():
            cache = self._slots.step(len(token_ids))
            return _next_logits(self._model, self._tensor(token_ids)[:, None], cache)

    def _decode_compiled(self, step: Callable[[Tensor, Tensor], Tensor], token_ids: Sequence[int]) -> Tensor:
        lengths = self._slots.lengths
        idle = self._slots.num_slots - len(token_ids)
        # Idle slots read a token at position 0, which the next prefill writes over.
        positions = [*lengths[: len(token_ids)], *([0] * idle)]
        for slot in range(len(token_ids)):
            lengths[slot] += 1  # before the step, as without a compiler: an error leaves it half written
        logits = step(self._tensor([*token_ids, *([0] * idle)])[:, None], self._tensor(positions))
        return logits[: len(token_ids)]

    def copy(self, source: int, target: int) -> None:
        self._slots.copy(source, target)

    def length(self, slot: int) -> int:
        return self._slots.lengths[slot]

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self._device)


class KeepingReader(CachedReader):
    """Has one slot, knows which tokens lie in it, and reads of the next text only what is not there already.

    Args:
        model: The model; its weights must stay as they are.
        max_seq_len: Longest text.
        compiled: As in `CachedReader`.
    """

    def __init__(self, model: GPT, max_seq_len: int, *, compiled: bool = False) -> None:
        super().__init__(model, 1, max_seq_len, compiled=compiled)
        self._text: list[int] = []  # what was read without an error, while the slot may hold a token more

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        text, self._text = self._text, []  # until this is read whole
        # All but one token at most: the logits after it are not kept.
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, token_ids[:-1], strict=False)))
        if not self._slots.can_cut(slot, kept):
            kept = 0
        cache = self._slots.begin(slot, kept=kept)
        if kept and cache.last_embedding is None and self._model.smear is not None:
            cache.last_embedding = self._embedding(token_ids[kept - 1])
        logits = self._read(slot, token_ids[kept:], cache)
        self._text = list(token_ids)
        return logits

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        logits = super().decode(token_ids)
        self._text += token_ids
        return logits

    def _embedding(self, token_id: int) -> Tensor | None:
        """Return what a smear mixes into the next token: it depends on this one alone, wherever it stands."""
        cache = self._model.new_cache(1, max_seq_len=1)
        with _eagerly():
            self._model.hidden_states(self._tensor([[token_id]]), cache=cache)
        return cache.last_embedding


class UncachedReader:
    """Reads each text from its beginning for every token: slow, and all that a model without caches can do.

    Args:
        model: The model.
        num_slots: Texts at a time.
        max_seq_len: Longest text.
    """

    def __init__(self, model: GPT, num_slots: int, max_seq_len: int) -> None:
        self._model = model
        self._texts: list[list[int]] = [[] for _ in range(num_slots)]
        self.max_seq_len = max_seq_len
        self.nbytes = 0

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        self._texts[slot] = list(token_ids)
        device = next(self._model.parameters()).device
        with _eagerly():
            return _next_logits(self._model, torch.tensor([token_ids], device=device), None)

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        return torch.cat([self.prefill(slot, [*self._texts[slot], token]) for slot, token in enumerate(token_ids)])

    def copy(self, source: int, target: int) -> None:
        self._texts[target] = list(self._texts[source])

    def length(self, slot: int) -> int:
        return len(self._texts[slot])


def _eagerly() -> AbstractContextManager[object]:
    """Leave compiled blocks uncompiled.

    Every new length would be compiled anew, until torch gives up and runs training eagerly as well. Where the compiler
    was never imported nothing is compiled, and importing it here would take seconds.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _next_logits(model: GPT, token_ids: Tensor, cache: object) -> Tensor:
    # Only the last position is needed: the head, a third of a small model, runs on one token.
    return model.head(model.hidden_states(token_ids, cache=cache)[:, -1])  # type: ignore[arg-type]


def _compiled_step(model: GPT, slots: SlotCache, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a compiled `(token_ids, positions) -> logits` over all slots."""

    def step(token_ids: Tensor, positions: Tensor) -> Tensor:
        return _next_logits(model, token_ids, slots.step_at(positions))

    if device.type != "cuda":
        return torch.compile(step, dynamic=False)
    slots.hold_addresses()
    graph = torch.compile(step, dynamic=False, mode="reduce-overhead")  # replays a CUDA graph

    def replay(token_ids: Tensor, positions: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return graph(token_ids, positions)

    return replay
