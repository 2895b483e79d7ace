"""What a training step is expected to need, estimated before anything is allocated."""

from typing import NamedTuple

from torch.optim import Optimizer

from tinygpt.errors import ConfigError
from tinygpt.layers import LMHead
from tinygpt.model import GPT, GPTConfig


class TrainingMemory(NamedTuple):
    """Expected bytes of a training step.

    Attributes:
        weights: Parameters as they are stored.
        gradients: As large as the weights.
        optimizer: Moments, in float32: one number a weight under Muon, two under AdamW
            (one, and one a row, with `second_moment="row"`), none under other optimizers.
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
        """All together. What the allocator keeps back and the backward pass's own intermediates come on top."""
        return sum(self)


def training_memory(model: GPT, optimizer: Optimizer, *, rows: int, seq_len: int) -> TrainingMemory:
    """Estimate what training a standard model with micro-batches of this size will need.

    Weights, gradients and moments are exact. Activations are counted from the formulas of the standard blocks, run
    without `torch.compile`; parts of your own are taken for standard ones.

    Args:
        model: A model with a config; one on the meta device will do.
        optimizer: Its optimizer.
        rows: Rows of a micro-batch.
        seq_len: Tokens of a row.

    Raises:
        ConfigError: If the model has no config.

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
    if model.config is None:
        raise ConfigError("training_memory needs a model with a config.")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    moments = 0
    for group in optimizer.param_groups:
        by_rows = group.get("second_moment") == "row"
        numbers = 1 if group.get("kind") == "muon" or by_rows else 2 if "betas" in group else 0
        moments += numbers * 4 * sum(parameter.numel() for parameter in group["params"])
        moments += 4 * sum(len(parameter) for parameter in group["params"]) if by_rows else 0
    first = next(model.parameters())
    width = (model.compute_dtype or first.dtype).itemsize
    tokens = rows * seq_len
    loss = 0
    if isinstance(model.head, LMHead):
        # The logits, their tanh and two intermediates, in float32, and the gradient of the weight.
        loss = 4 * 4 * model.head.vocab_size * min(tokens, model.head.chunk_size(first.device))
        loss += model.head.weight.nbytes
    return TrainingMemory(weights, gradients, moments, tokens * width * _kept_numbers(model.config), loss)


def _kept_numbers(config: GPTConfig) -> int:
    """Return how many numbers a token leaves for the backward pass, over all layers."""
    dim, kv_dim = config.dim, (config.num_kv_heads or config.num_heads) * config.head_dim
    total = 6 * dim  # embedding, its norm, smear, final norm and its input, gradient of the hidden states
    for layer in range(config.num_layers):
        total += dim * (config.residual_scales or config.x0_scales)
        total += 2 * dim  # input and output of the norm before attention
        total += 2 * dim + 2 * kv_dim + kv_dim  # queries and keys before and after their norm, values
        total += 2 * dim  # result of attention, before and after the heads are merged
        total += kv_dim * config.has_value_embedding(layer)
        total += 2 * dim  # input and output of the norm before the feed-forward layer
        total += 2 * (config.hidden_dim or 4 * dim)  # relu and its square
    return total
