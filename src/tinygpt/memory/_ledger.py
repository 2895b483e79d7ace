"""Counting what a computation allocates, allocation by allocation."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books every storage that operations inside of it allocate on a device, and when it is freed.

    Made for the meta device, where tensors have shapes and no numbers: kernels do nothing, but what autograd keeps
    lives exactly as long as it would elsewhere.

    Args:
        known: Tensors whose storages are there before and not booked.
        block: Sizes are rounded up to multiples of this, as allocators do.
        device_type: Of the tensors to book.
    """

    def __init__(self, known: Iterable[Tensor], *, block: int, device_type: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block = block
        self._device_type = device_type
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._numbers: dict[int, int] = {}
        self._sizes: dict[int, int] = {}  # of what is alive
        self._entries: list[tuple[int, int]] = []  # number and size, below zero when freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type == self._device_type:
                self._book(value.untyped_storage())
        return out

    def _book(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._numbers:
            return
        number, size = len(self._entries), -(-storage.nbytes() // self._block) * self._block
        self._numbers[key] = number
        self._sizes[number] = size
        self._entries.append((number, size))
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        number = self._numbers.pop(key)
        self._entries.append((number, -self._sizes.pop(number)))

    def shrink(self, tensor: Tensor, size: int) -> None:
        """Book a storage that is alive as this many bytes less, from its beginning on."""
        number = self._numbers[tensor.untyped_storage()._cdata]
        self._sizes[number] -= size
        self._entries[number] = number, self._entries[number][1] - size

    def alive(self) -> dict[int, int]:
        """Return number and size of every storage that is alive."""
        return dict(self._sizes)

    def numbers_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the numbers of those of the tensors that were booked."""
        keys = (tensor.untyped_storage()._cdata for tensor in tensors)
        return {self._numbers[key] for key in keys if key in self._numbers}

    def allocated(self, least: int, most: int) -> int:
        """Return the sum of everything that was ever allocated in sizes from `least` up to, not including, `most`."""
        return sum(size for _, size in self._entries if least <= size < most)

    def mark(self) -> int:
        """Return the present place in the book, for `highest`."""
        return len(self._entries)

    def highest(self, start: int, end: int) -> tuple[int, dict[int, int]]:
        """Return the highest sum of sizes between two marks, and number and size of what was alive then."""
        total = peak = sum(size for _, size in self._entries[:start])
        place = start
        for index, (_, size) in enumerate(self._entries[start:end], start=start + 1):
            total += size
            if total > peak:
                peak, place = total, index
        alive: dict[int, int] = {}
        for number, size in self._entries[:place]:
            if size < 0:
                del alive[number]
            else:
                alive[number] = size
        return peak, alive
