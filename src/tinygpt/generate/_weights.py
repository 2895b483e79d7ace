"""Copies of a model whose matrices are stored for reading: laid out for the processor, or in fewer bytes."""

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt.errors import ConfigError
from tinygpt.layers import Linear, LMHead
from tinygpt.model import GPT

Weights = Literal["float32", "bfloat16", "int8"]
"""How `reading_copy` stores matrices."""

_SMALLEST_WIDTH = 32  # gates stay as they are: they cost nothing, and scale what they gate
_LAYOUT_ROWS = 8  # rows that oneDNN lays a weight out for; measured best or level from 1 to 16
_INT8_KERNEL_ROWS = 16  # beyond it the product of int8 weights is slower than one with weights made floats again


def reading_copy(model: GPT, weights: Weights, *, for_compiler: bool = False) -> GPT:
    """Return a copy for inference that shares all tensors with the model but the matrices of its linear layers.

    Those are copied in the layout or the precision that `weights` names; a matrix product then reads fewer bytes, or
    reads them faster. Embedding tables, norms and parts that are no `Linear` are the model's own. The copy does not
    follow later training.

    Args:
        model: The model.
        weights: `"float32"` rounds nothing: on a CPU with oneDNN the matrices are laid out in its blocks, read about
            twice as fast; elsewhere this is a plain copy. `"bfloat16"` halves the bytes and rounds inputs of
            products as well. `"int8"` quarters them: each row of a matrix becomes integers and a scale.
        for_compiler: Whether the copy will be compiled: its matrices then keep the usual layout, which compilers know.

    Returns:
        The copy, in evaluation mode; its matrices cannot be trained.

    Raises:
        ConfigError: If `weights` is none of these.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.generate import reading_copy

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        small = reading_copy(model, "bfloat16")
        ```
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"weights={weights!r} is unknown; choose one of {', '.join(get_args(Weights))}.")
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    # What the model computes in it may see at parameters that the copy does not have.
    table = next(model.embedding.parameters(), None)
    if table is not None and (dtype := model._activation_dtype(table)) != table.dtype:
        twin.compute_dtype = dtype
    for name, module in list(twin.named_modules()):
        if type(module) in (Linear, nn.Linear, LMHead) and min(module.weight.shape) >= _SMALLEST_WIDTH:
            twin.set_submodule(name, _stored(module, weights, in_blocks=not for_compiler))
    return twin.eval()


def needs_no_compiler(model: GPT) -> bool:
    """Return whether matrices lie in a layout that compilers do not know."""
    return any(isinstance(module, _PackedLinear) and module.in_blocks for module in model.modules())


def _stored(module: Any, weights: Weights, *, in_blocks: bool) -> nn.Module:
    cap = None
    weight = module.weight.detach()
    if isinstance(module, LMHead):
        weight, cap = weight[: module.vocab_size], module.soft_cap
    stored: nn.Module
    if weights == "int8":
        stored = _Int8Linear(weight, module.bias)
    else:
        stored = _PackedLinear(weight.to(getattr(torch, weights)), module.bias, in_blocks=in_blocks)
    return _CappedHead(stored, cap) if isinstance(module, LMHead) else stored


class _CappedHead(nn.Module):
    """An `LMHead` without its loss."""

    def __init__(self, product: nn.Module, soft_cap: float | None) -> None:
        super().__init__()
        self.product = product
        self.soft_cap = soft_cap

    def forward(self, x: Tensor) -> Tensor:
        logits = self.product(x).float()
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


class _PackedLinear(nn.Module):
    """A product in the dtype of its weight, with input and output in the dtype of the input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, in_blocks: bool) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.bias = None if bias is None else bias.detach()
        packed = _in_blocks(weight) if in_blocks else None
        self.in_blocks = packed is not None
        self.weight: Tensor
        self.register_buffer("weight", weight.clone() if packed is None else packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.dtype)
        y = _block_product(y, self.weight) if self.in_blocks else F.linear(y, self.weight)
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _Int8Linear(nn.Module):
    """A product with a weight of integers and one scale an output channel."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
        self.bias = None if bias is None else bias.detach()
        self.weight: Tensor
        self.scale: Tensor
        self.ones: Tensor
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("ones", torch.ones_like(scale, dtype=torch.bfloat16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and len(flat) <= _INT8_KERNEL_ROWS and hasattr(torch, "_weight_int8pack_mm"):
            # The kernel's own scale would be rounded to bfloat16 before it is used.
            y = torch._weight_int8pack_mm(flat.to(torch.bfloat16), self.weight, self.ones)
        else:
            y = F.linear(flat, self.weight.to(flat.dtype))
        y = (y.float() * self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def _in_blocks(weight: Tensor) -> Tensor | None:
    """Return a weight `(out, in)` in oneDNN's layout; `None` where that cannot be had or does not compute the product.

    torch's compiler uses the same two operators when it freezes a model; they are no public API, so their result is
    compared before it is trusted.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _LAYOUT_ROWS)
        probe = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight.dtype)
        error = (_block_product(probe, packed) - F.linear(probe, weight)).abs().max()
        largest = weight.abs().amax() * weight.shape[1]
    except (AttributeError, RuntimeError):
        return None
    return packed if bool(error <= torch.finfo(weight.dtype).eps * 4 * largest) else None


def _block_product(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
