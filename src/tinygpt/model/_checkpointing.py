"""What the backward pass computes again instead of keeping it."""

from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn

from tinygpt.errors import ConfigError
from tinygpt.layers import Block

ActivationCheckpointing = Literal["none", "mlp", "block"]
"""What `GPT.set_activation_checkpointing` takes; what costs less speed comes first."""


def let_mlps_recompute(blocks: Iterable[nn.Module], what: ActivationCheckpointing) -> None:
    """Tell the blocks whether they recompute their feed-forward layers.

    Raises:
        ConfigError: If the word is not known, or a block cannot.
    """
    if what not in get_args(ActivationCheckpointing):
        allowed = ", ".join(get_args(ActivationCheckpointing))
        raise ConfigError(f"activation checkpointing {what!r} is not known; choose {allowed}.")
    blocks = list(blocks)
    foreign = [index for index, block in enumerate(blocks) if not isinstance(block, Block)]
    if what == "mlp" and foreign:
        raise ConfigError(
            f"block {foreign[0]} is a {type(blocks[foreign[0]]).__name__}, of which nothing is known to recompute; "
            "choose 'block', which recomputes any block as a whole, or 'none'."
        )
    for block in blocks:
        if isinstance(block, Block):
            block.recompute_mlp = what == "mlp"
