"""Operations that leave less memory behind: fewer tensors on the way, fewer holes where tensors were."""

import torch
from torch import Tensor

_ROOM = 1024  # bytes


def empty_with_room(like: Tensor) -> Tensor:
    """Return memory for a result of this shape and dtype, on a CPU with a little to spare.

    Before glibc 2.38 an aligned block never fits into the place of a freed one of the same size, and next to what is
    kept for the backward pass each such place stays a hole.
    """
    if like.device.type != "cpu" or not like.is_contiguous():
        return torch.empty_like(like)
    # Made smaller, and not a part of it: autograd lets nobody change a view that a function returns.
    return like.new_empty(like.numel() + _ROOM // like.element_size()).resize_(like.shape)


def plus_product(x: Tensor, factor: Tensor, y: Tensor, *, in_place: bool = False) -> Tensor:
    """Return `x + factor * y`; in half precision the product is rounded first, as written and as others have it."""
    if x.dtype not in (torch.float32, torch.float64) or y.dtype != x.dtype:
        return x.add_(factor * y) if in_place else x + factor * y
    return x.addcmul_(factor, y) if in_place else torch.addcmul(x, factor, y)
