"""Filters and draws against the rules written out in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.errors import ConfigError
from tinygpt.generate import GenerationConfig, sample_token
from tinygpt.generate._sampling import choose, log_probabilities


def expected_shares(logits: np.ndarray, config: GenerationConfig, seen: set[int] = frozenset()) -> np.ndarray:
    """Probabilities of one row, one rule after the other, in float64."""
    logits = logits.astype(np.float64).copy()
    for token in seen:
        penalty = config.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    scaled = logits / config.temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    if config.top_k is not None:
        shares[order[config.top_k :]] = 0
        shares /= shares.sum()
    if config.top_p is not None:
        reached = 0.0
        for token in order:
            if reached >= config.top_p:
                shares[token] = 0
            reached += shares[token]
    if config.min_p is not None:
        shares[shares < config.min_p * shares.max()] = 0
    return shares / shares.sum()


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 25),
    top_p=st.none() | st.sampled_from([0.05, 0.5, 0.77, 0.95, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 0.8, 1.7]),
)
def test_draws_spread_over_tokens_as_the_rules_say(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float
) -> None:
    config = GenerationConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=20).astype(np.float32) * 2
    seen = set(generator.integers(0, 20, size=4).tolist())
    shares = expected_shares(logits, config, seen)
    rows = 2000
    draws = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows  # evenly, so that counts are shares
    marked = torch.zeros(20, dtype=torch.bool)
    marked[list(seen)] = True
    tokens = choose(torch.tensor(logits).expand(rows, -1), config, draws, marked.expand(rows, -1))
    counts = np.bincount(tokens.numpy(), minlength=20) / rows
    assert np.abs(counts - shares).max() <= 1.5 / rows
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(shares))


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("top_k", [None, 1500])
def test_a_large_vocabulary_is_filtered_alike(spread: float, top_k: int | None) -> None:
    """With a small spread 0.9 of the probability needs far more than the best thousand tokens."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * spread
    config = GenerationConfig(top_p=0.9, top_k=top_k)
    shares = expected_shares(logits[0].numpy(), config)
    draws = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    tokens = choose(logits.expand(400, -1), config, draws)
    edges = np.searchsorted(shares.cumsum(), draws.numpy(), side="right")
    assert (tokens.numpy() == edges).mean() > 0.98  # rounding moves an edge now and then


def test_no_draw_reaches_past_the_last_likely_token() -> None:
    logits = torch.tensor([[0.0, 5.0, float("-inf"), float("-inf")]]).double()
    last = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, GenerationConfig(), last).tolist() == [1]
    assert choose(logits, GenerationConfig(), torch.zeros(1, dtype=torch.float64)).tolist() == [0]


def test_greedy_takes_the_penalized_best() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    config = GenerationConfig(temperature=0, repetition_penalty=1.2)
    assert choose(logits, config, torch.zeros(1), seen).tolist() == [1]
    assert choose(logits, config, torch.zeros(1)).tolist() == [0]


def test_log_probabilities_are_those_of_softmax() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    chosen, values, ids = log_probabilities(logits, torch.tensor([3, 8]), 4)
    reference = logits.double().softmax(-1).log()
    torch.testing.assert_close(chosen.double(), reference[[0, 1], [3, 8]], rtol=0, atol=1e-5)
    torch.testing.assert_close(values.double(), reference.sort(descending=True).values[:, :4], rtol=0, atol=1e-5)
    assert ids.tolist() == reference.argsort(descending=True)[:, :4].tolist()


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be floats of shape \(batch, vocab\), got torch.float32 of \(4,\)"):
        sample_token(torch.zeros(4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop_tokens", [-4]),
        ("stop_strings", [""]),
        ("stop_strings", "END"),
        ("logprobs", 101),
        ("overflow", "wrap"),
    ],
)
def test_options_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"GenerationConfig.{field}"):
        GenerationConfig(**{field: value})


def test_the_smallest_top_p_keeps_the_best_token() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    for top_k in (None, 7):
        assert torch.equal(sample_token(logits, top_p=1e-300, top_k=top_k), logits.argmax(dim=-1))
