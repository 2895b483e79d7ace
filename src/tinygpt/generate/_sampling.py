"""From logits to tokens: filters, and a draw that depends on nothing but its own row."""

import torch
from torch import Tensor

from tinygpt.errors import ConfigError
from tinygpt.generate._config import GenerationConfig

# Sorting a whole vocabulary takes a CPU as long as several layers; these many best tokens nearly always reach top_p.
_CPU_CANDIDATES = 1024


def sample_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token of each row.

    Args:
        logits: `(batch, vocab)`.
        temperature: See `GenerationConfig`, as for the next three.
        top_k: Most tokens to keep.
        top_p: Probability to keep.
        min_p: Share of the best token's probability to reach.
        generator: Source of randomness on the device of `logits` (of the CPU for an Apple GPU); `None` for torch's
            global one.

    Returns:
        `(batch,)` int64.

    Raises:
        ConfigError: If an option is out of range, or `logits` have another shape.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ConfigError(
            f"logits must be floats of shape (batch, vocab), got {logits.dtype} of {tuple(logits.shape)}."
        )
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if config.greedy:
        return logits.argmax(dim=-1)
    device, logits = logits.device, where_float64_is(logits)
    draws = torch.rand(len(logits), dtype=torch.float64, device=logits.device, generator=generator)
    return choose(logits, config, draws).to(device)


def where_float64_is(logits: Tensor) -> Tensor:
    """Return logits on a device that has float64, in which probabilities are summed: Apple GPUs do not."""
    return logits.cpu() if logits.device.type == "mps" else logits


def choose(logits: Tensor, config: GenerationConfig, draws: Tensor, seen: Tensor | None = None) -> Tensor:
    """Return a token a row, `(batch,)`: a function of each row's own logits and draw.

    Args:
        logits: `(batch, vocab)`.
        config: The options of these rows.
        draws: `(batch,)` float64 in [0, 1); not looked at when greedy.
        seen: `(batch, vocab)` boolean, tokens that the repetition penalty is for.
    """
    if seen is not None and config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if config.greedy:
        return logits.argmax(dim=-1)
    # Shifted first, so that a small temperature makes the others vanish instead of everything overflow.
    scaled = (logits.float() - logits.amax(dim=-1, keepdim=True).float()) / config.temperature
    scaled = _keep_best(scaled, config.top_k, config.top_p)
    if config.min_p:
        scaled = scaled.masked_fill(scaled.exp() < config.min_p, float("-inf"))  # the best one's is exp(0)
    # One draw against the probabilities summed in the order of the ids: logits that differ in their last bits, as those
    # of a row alone and of the same row in a batch do, give another token only if the draw falls into that sliver.
    sums = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # A draw just below 1 must not round up to the whole sum, behind which there is no token.
    targets = draws[:, None] * sums[:, -1:] * (1 - 1e-12)
    return torch.searchsorted(sums, targets, right=True)[:, 0]


def log_probabilities(logits: Tensor, tokens: Tensor, alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability of each row's token `(batch,)`, and values and ids `(batch, n)` of the best tokens."""
    all_tokens = logits.float().log_softmax(dim=-1)
    best = all_tokens.topk(min(alternatives, all_tokens.shape[-1]), dim=-1)
    return all_tokens.gather(1, tokens[:, None])[:, 0], best.values, best.indices


def _keep_best(scaled: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set all but the best tokens to minus infinity; each row's best is at 0."""
    vocab = scaled.shape[-1]
    if top_k is not None and top_k < vocab:
        return _keep_first(scaled, top_k, top_p, scaled.topk(top_k, dim=-1).values.exp().sum(dim=-1, keepdim=True))[0]
    if top_p is None or top_p == 1:
        return scaled
    total = scaled.exp().sum(dim=-1, keepdim=True)
    if scaled.device.type == "cpu" and vocab > _CPU_CANDIDATES:
        kept, enough = _keep_first(scaled, _CPU_CANDIDATES, top_p, total)
        if enough:
            return kept
    return _keep_first(scaled, vocab, top_p, total)[0]


def _keep_first(scaled: Tensor, count: int, top_p: float | None, total: Tensor) -> tuple[Tensor, bool | Tensor]:
    """Keep those of the `count` best tokens that `top_p` of `total` needs, and say whether these were enough."""
    values, order = scaled.topk(count, dim=-1)
    enough: bool | Tensor = True
    if top_p is not None:
        weights = values.exp()
        # A token goes when those before it already reach p; the first one stays, also if p is 0 in these numbers.
        dropped = weights.cumsum(dim=-1) - weights >= top_p * total
        dropped[:, 0] = False
        values = values.masked_fill(dropped, float("-inf"))
        enough = dropped[:, -1].all()
    return torch.full_like(scaled, float("-inf")).scatter_(1, order, values), enough
