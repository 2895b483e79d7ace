"""What a training step is expected to need, counted before anything is allocated."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tinygpt.layers import LMHead


class TrainingMemory(NamedTuple):
    """Expected bytes of a training step.

    Attributes:
        weights: Parameters as they are stored.
        gradients: As large as the weights.
        optimizer: Moments, in float32: one number a weight under Muon, two under AdamW, none under other optimizers.
        activations: What the forward pass of one micro-batch keeps for the backward pass.
        loss: Logits of one chunk of tokens and what is computed from them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All together. The allocator and the backward pass's own intermediates come on top."""
        return sum(self)


def training_memory(model: nn.Module, optimizer: Optimizer, *, rows: int, seq_len: int) -> TrainingMemory:
    """Count what training with micro-batches of this size will need, without computing anything.

    The forward pass runs on torch's meta device, where tensors have shapes and no memory, and every tensor that
    autograd keeps is counted once. Blocks compiled later keep less than that.

    Args:
        model: A model with a method `loss(inputs, targets)`, as `GPT`; on any device, the meta device included.
        optimizer: Its optimizer.
        rows: Rows of a micro-batch.
        seq_len: Tokens of a row.

    Example:
        ```python
        import torch
        from tinygpt import GPT, GPTConfig
        from tinygpt.memory import training_memory
        from tinygpt.optim import MuonAdamW

        with torch.device("meta"):
            model = GPT.from_config(GPTConfig.from_depth(12))
        memory = training_memory(model, MuonAdamW.for_model(model), rows=8, seq_len=2048)
        print(f"{memory.total / 2**30:.1f} GiB")
        ```
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    moments = 0
    for group in optimizer.param_groups:
        numbers = 1 if group.get("kind") == "muon" else 2 if "betas" in group else 0
        moments += numbers * 4 * sum(parameter.numel() for parameter in group["params"])
    chunk = 0
    for head in model.modules():
        if isinstance(head, LMHead):
            # The logits, their tanh and two intermediates of the log-sum-exp and the gradient, in float32.
            chunk = 4 * 4 * head.vocab_size * min(rows * seq_len, head.chunk_size(next(model.parameters()).device))
    return TrainingMemory(weights, gradients, moments, _saved_bytes(model, rows, seq_len), chunk)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> Tensor:
        total: Tensor = self.model.loss(token_ids, token_ids)[0]  # type: ignore[operator]
        return total


def _saved_bytes(model: nn.Module, rows: int, seq_len: int) -> int:
    """Return the bytes that autograd keeps of one forward pass, weights and tables not counted."""
    tensors = {f"model.{name}": tensor.to("meta") for name, tensor in model.named_parameters()}
    tensors |= {f"model.{name}": tensor.to("meta") for name, tensor in model.named_buffers()}
    known = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    saved: dict[int, Tensor] = {}  # the tensors themselves, so that no storage is freed and its number used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in known:
            saved.setdefault(storage, tensor)
        return tensor

    token_ids = torch.zeros(rows, seq_len, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.func.functional_call(_Loss(model), tensors, (token_ids,))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
