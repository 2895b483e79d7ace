"""The loss of a head that only gives logits."""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -1  # the target that counts for nothing, as LMHead and tinygpt.data have it


def plain_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each target, 0 where ignored: `(batch, seq)`."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(targets.shape)
