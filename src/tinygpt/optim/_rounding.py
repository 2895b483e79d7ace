"""Rounding to bfloat16 by chance, up or down, so that small changes add up on average."""

import hashlib

import torch
from torch import Tensor

_LOST_BITS = 16  # of float32's 24 bits of precision bfloat16 keeps 8; sign and exponent are the same


def rounding_seed(name: str, step: int) -> int:
    """Return the seed of a parameter's noise at a step, which thus needs no state and is the same on every rank."""
    return int.from_bytes(hashlib.blake2b(f"{step} {name}".encode(), digest_size=7).digest())


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 numbers, each with the probability of its nearness.

    Args:
        values: Any shape. Not changed.
        generator: On their device.

    Returns:
        float32 of the same shape whose values bfloat16 holds exactly. What bfloat16 holds stays as it is, and so does
        what is not finite; beyond bfloat16's largest number the upper neighbour is infinity.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(0, 2**_LOST_BITS, generator=generator)
    # Noise carried through the bits of a NaN could end in a number.
    noise.masked_fill_(values.isfinite().logical_not_(), 0)
    # Magnitudes are ordered as their bits are: adding to these carries into the kept ones with the right probability.
    noise.add_(values.view(torch.int32)).bitwise_and_(-(2**_LOST_BITS))
    return noise.view(torch.float32)
