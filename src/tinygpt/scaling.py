"""How long to train and with which batch, rates and weight decay, from the size of the model alone.

Everything is scaled from one reference that was tuned by hand: 12 layers of width 768 at 524,288 tokens a step and
12 tokens a parameter. `from_depth` applies all the rules; each is also a function of its own.
"""

import math
from dataclasses import dataclass

from tinygpt._numbers import check_real, check_whole, given
from tinygpt.errors import ConfigError

__all__ = [
    "REFERENCE_BATCH_TOKENS",
    "ScalingPlan",
    "from_depth",
    "lr_factor",
    "optimal_batch_tokens",
    "scaled_weight_decay",
    "scaling_parameters",
]

REFERENCE_BATCH_TOKENS = 524_288
_REFERENCE_DEPTH = 12
_REFERENCE_WEIGHT_DECAY = 0.28
_HEAD_DIM = 128
_DIM_PER_LAYER = 64
# The gate of a value embedding reads this many channels.
_GATE_CHANNELS = 12


@dataclass(frozen=True)
class ScalingPlan:
    """What the rules give for one model; written by `from_depth`.

    Args:
        depth: Number of layers.
        dim: Width of the residual stream.
        scaling_parameters: Parameters of matrices and head, which the horizon is counted by.
        horizon_tokens: Tokens to train on.
        batch_tokens: Tokens a step.
        num_steps: Steps, `horizon_tokens // batch_tokens`.
        lr_factor: Factor on every reference learning rate.
        weight_decay: Weight decay of the matrices.
    """

    depth: int
    dim: int
    scaling_parameters: int
    horizon_tokens: int
    batch_tokens: int
    num_steps: int
    lr_factor: float
    weight_decay: float


def from_depth(
    depth: int,
    *,
    vocab_size: int = 32_768,
    tokens_per_parameter: float = 12.0,
    batch_tokens: int | None = None,
) -> ScalingPlan:
    """Plan the training of a model of the documented family, which depth alone describes.

    The horizon is `tokens_per_parameter` for each matrix and head parameter.

    Args:
        depth: Number of layers.
        vocab_size: Entries of the vocabulary, padding included.
        tokens_per_parameter: Length of the training. The reference is a 12-layer model trained as long in proportion.
        batch_tokens: Tokens a step; by default what `optimal_batch_tokens` gives. Rates and weight decay follow it.

    Returns:
        The plan.

    Raises:
        ConfigError: If an argument is not positive, or the batch is larger than the horizon.

    References:
        Hoffmann et al., [Training Compute-Optimal Large Language Models](https://arxiv.org/abs/2203.15556), 2022, for
        a horizon proportional to size. They count every parameter and find about 20 tokens; without embeddings 12
        was measured in nanochat.

    Example:
        ```python
        plan = from_depth(12, batch_tokens=65_536)
        ```
    """
    check_real(tokens_per_parameter=tokens_per_parameter)
    check_whole(**given(batch_tokens=batch_tokens))
    if not 0 < tokens_per_parameter < math.inf:
        raise ConfigError(f"tokens_per_parameter={tokens_per_parameter} must be positive.")
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} must be at least 1; None lets the rules choose.")
    parameters = scaling_parameters(depth, vocab_size=vocab_size)
    horizon = int(tokens_per_parameter * parameters)
    reference = int(tokens_per_parameter * scaling_parameters(_REFERENCE_DEPTH, vocab_size=vocab_size))
    batch = optimal_batch_tokens(horizon, reference) if batch_tokens is None else batch_tokens
    if batch > horizon:
        raise ConfigError(f"batch_tokens={batch} is more than the horizon of {horizon} tokens; choose a smaller one.")
    return ScalingPlan(
        depth=depth,
        dim=_dim(depth),
        scaling_parameters=parameters,
        horizon_tokens=horizon,
        batch_tokens=batch,
        num_steps=horizon // batch,
        lr_factor=lr_factor(batch),
        weight_decay=scaled_weight_decay(batch, horizon, reference),
    )


def scaling_parameters(depth: int, *, vocab_size: int = 32_768) -> int:
    """Count the matrix and head parameters of the documented family, value-embedding gates included.

    Args:
        depth: Number of layers. The width is 64 a layer, rounded up to heads of 128.
        vocab_size: Entries of the vocabulary.

    Returns:
        The count: 84,935,088 + 25,165,824 for 12 layers.

    Raises:
        ConfigError: If an argument is not positive.
    """
    check_whole(depth=depth, vocab_size=vocab_size)
    if depth < 1 or vocab_size < 1:
        raise ConfigError(f"depth={depth} and vocab_size={vocab_size} must be at least 1.")
    dim = _dim(depth)
    # Four attention matrices of dim x dim and two of dim x 4 dim in the feed-forward layer.
    matrices = 12 * depth * dim**2
    # Value embeddings sit in every second layer, the last one included.
    gates = math.ceil(depth / 2) * _GATE_CHANNELS * (dim // _HEAD_DIM)
    return matrices + gates + vocab_size * dim


def optimal_batch_tokens(horizon_tokens: float, reference_horizon_tokens: float) -> int:
    """Return the batch for a horizon: it grows with its power 0.383, and is rounded to a power of two.

    Args:
        horizon_tokens: Tokens to train on.
        reference_horizon_tokens: Horizon for which 524,288 tokens a step is right.

    Raises:
        ConfigError: If a horizon is not positive.

    References:
        Bergsma et al., [Power Lines](https://arxiv.org/abs/2505.13738), 2025.
    """
    _check_horizons(horizon_tokens, reference_horizon_tokens)
    batch = REFERENCE_BATCH_TOKENS * (horizon_tokens / reference_horizon_tokens) ** 0.383
    return int(2 ** max(0, round(math.log2(batch))))


def lr_factor(batch_tokens: float) -> float:
    """Return the factor on reference learning rates at another batch: the root of the batch's ratio.

    Args:
        batch_tokens: Tokens a step. At 65,536 the factor is 0.354.

    Raises:
        ConfigError: If it is not positive.

    References:
        Malladi et al., [On the SDEs and Scaling Rules for Adaptive Gradient
        Algorithms](https://arxiv.org/abs/2205.10287), 2022. It is derived for Adam; for Muon it is an assumption
        that works.
    """
    check_real(batch_tokens=batch_tokens)
    if not 0 < batch_tokens < math.inf:
        raise ConfigError(f"batch_tokens={batch_tokens} must be positive.")
    return math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)


def scaled_weight_decay(batch_tokens: float, horizon_tokens: float, reference_horizon_tokens: float) -> float:
    """Return the weight decay that forgets over the same share of the training as in the reference.

    The time over which weights are averaged is `batch / (lr * weight_decay * horizon)` in units of the training.
    With the rate following the root of the batch, holding it gives
    `0.28 * sqrt(batch / reference batch) * reference horizon / horizon`.

    Args:
        batch_tokens: Tokens a step.
        horizon_tokens: Tokens to train on.
        reference_horizon_tokens: Horizon for which 0.28 is right at 524,288 tokens a step.

    Raises:
        ConfigError: If an argument is not positive.

    References:
        Wang and Aitchison, [How to set AdamW's weight decay as you scale model and dataset
        size](https://arxiv.org/abs/2405.13698), 2024. Derived for AdamW, applied to Muon.
    """
    _check_horizons(horizon_tokens, reference_horizon_tokens)
    return _REFERENCE_WEIGHT_DECAY * lr_factor(batch_tokens) * reference_horizon_tokens / horizon_tokens


def _dim(depth: int) -> int:
    return math.ceil(_DIM_PER_LAYER * depth / _HEAD_DIM) * _HEAD_DIM


def _check_horizons(horizon_tokens: float, reference_horizon_tokens: float) -> None:
    check_real(horizon_tokens=horizon_tokens, reference_horizon_tokens=reference_horizon_tokens)
    if not (0 < horizon_tokens < math.inf and 0 < reference_horizon_tokens < math.inf):
        raise ConfigError(
            f"horizon_tokens={horizon_tokens} and reference_horizon_tokens={reference_horizon_tokens} must be positive."
        )
