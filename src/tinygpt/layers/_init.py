"""Drawing all weights of a model again."""

from torch import nn


def init_weights(module: nn.Module) -> None:
    """Call `reset_parameters` of every submodule, children before parents, so that a parent has the last word.

    A model built on the meta device becomes usable by `model.to_empty(device=...)` and then this; with the same torch
    seed the weights equal those of a model built directly.

    Example:
        ```python
        import torch
        from tinygpt.layers import SwiGLU, init_weights

        with torch.device("meta"):
            mlp = SwiGLU(768, 2048)
        init_weights(mlp.to_empty(device="cpu"))
        ```
    """
    module.apply(_reset)


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
