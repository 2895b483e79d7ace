"""What layers may do about what autograd keeps for the backward pass."""

import torch
from torch.autograd import forward_ad


def takes_own_backward() -> bool:
    """Return whether a function with a backward pass of its own may stand here.

    Not without gradients; nor under the compiler, which sees the whole graph and chooses better; nor inside of
    `torch.func` and forward differentiation, which cannot take such functions.
    """
    # Private, so asked for: torch refuses such a function inside of torch.func by itself.
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not (transforms is not None and transforms())
        and getattr(forward_ad, "_current_level", -1) < 0
    )


def others_choose_what_is_kept() -> bool:
    """Return whether hooks into what autograd keeps are forbidden, or somebody's, as those of checkpointing."""
    # Private as well. Hooks inside of theirs take nothing from the result, but from what theirs save.
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)
    return not enabled() or (hooks is not None and hooks(True) is not None)
