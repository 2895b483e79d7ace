import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinygpt.errors import ConfigError
from tinygpt.layers import CausalSelfAttention, LayerCache, RotaryEmbedding, ValueEmbedding, causal_attention


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """One query at a time, straight from the formula, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    heads, kv_heads, q_seq, seq = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    out = torch.empty_like(q)
    for head in range(heads):
        group = head // (heads // kv_heads)
        for index in range(q_seq):
            position = seq - q_seq + index
            first = 0 if window is None else max(0, position - window)
            keys, values = k[:, group, first : position + 1], v[:, group, first : position + 1]
            scores = torch.einsum("bd,bsd->bs", q[:, head, index], keys) * scale
            out[:, head, index] = torch.einsum("bs,bsd->bd", scores.softmax(-1), values)
    return out


@given(
    q_seq=st.integers(1, 9),
    earlier=st.integers(0, 6),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(0, 12),
)
def test_causal_attention_equals_the_naive_loop(q_seq: int, earlier: int, kv_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(q_seq * 1000 + earlier)
    q = torch.randn(2, 4, q_seq, 8, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, q_seq + earlier, 8, generator=generator)
    result = causal_attention(q, k, v, window_tokens=window, scale=0.3)
    torch.testing.assert_close(result.double(), naive_attention(q, k, v, window, 0.3), rtol=1e-5, atol=1e-5)


def test_more_queries_than_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 3 queries for 2 keys"):
        causal_attention(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 3 query heads, not a multiple of 2"):
        causal_attention(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))


def test_a_negative_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="window_tokens=-1 is negative"):
        causal_attention(*torch.zeros(3, 1, 1, 2, 4), window_tokens=-1)


@pytest.mark.parametrize("q_seq", [1, 3])
def test_mixed_dtypes_are_refused_unless_autocast_gives_them_one(q_seq: int) -> None:
    k = torch.zeros(1, 1, 3, 4)
    q = k[:, :, -q_seq:].bfloat16()
    with pytest.raises(ConfigError, match=r"of one dtype, got bfloat16, float32, float32; convert them\."):
        causal_attention(q, k, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert causal_attention(q, k, k).dtype == torch.bfloat16


def attention_with_everything(window_tokens: int | None = None) -> CausalSelfAttention:
    torch.manual_seed(0)
    attention = CausalSelfAttention(
        32,
        4,
        num_kv_heads=2,
        rope=RotaryEmbedding(8, 64),
        window_tokens=window_tokens,
        value_embedding=ValueEmbedding(50, 16),
        value_gate_channels=12,
    )
    torch.nn.init.normal_(attention.o_proj.weight, std=0.2)
    return attention


def test_attention_equals_its_formula_written_out() -> None:
    attention = attention_with_everything()
    x, ids = torch.randn(1, 6, 32), torch.randint(50, (1, 6))

    def heads(y: Tensor) -> Tensor:
        return y.view(1, 6, -1, 8).transpose(1, 2)

    def normalized(y: Tensor) -> Tensor:
        return y / y.square().mean(-1, keepdim=True).sqrt()

    def turned(y: Tensor) -> Tensor:
        frequencies = 100_000.0 ** (-torch.arange(4) / 4)
        angle = -torch.arange(6)[:, None] * frequencies  # minus: clockwise
        pair = torch.complex(y[..., :4], y[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pair.real, pair.imag), dim=-1)

    q, k = (normalized(turned(heads(x @ proj.weight.T))) * 1.2 for proj in (attention.q_proj, attention.k_proj))
    gate = 3 / (1 + torch.exp(-(x[..., :12] @ attention.value_gate.weight.T)))
    table = attention.value_embedding.weight[ids].view(1, 6, 2, 8)
    v = heads(x @ attention.v_proj.weight.T) + (gate[..., None] * table).transpose(1, 2)
    mixed = naive_attention(q, k, v, None, 1 / math.sqrt(8)).float().transpose(1, 2).reshape(1, 6, 32)
    torch.testing.assert_close(attention(x, token_ids=ids), mixed @ attention.o_proj.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window_tokens", [None, 3])
def test_reading_in_pieces_equals_reading_at_once(window_tokens: int | None) -> None:
    attention = attention_with_everything(window_tokens)
    x, ids = torch.randn(2, 12, 32), torch.randint(50, (2, 12))
    cache = LayerCache(2, 2, 12, 8)
    pieces = [attention(x[:, a:b], token_ids=ids[:, a:b], cache=cache) for a, b in [(0, 5), (5, 6), (6, 11), (11, 12)]]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x, token_ids=ids))


def test_a_value_embedding_needs_token_ids() -> None:
    with pytest.raises(ConfigError, match="call it with token_ids"):
        attention_with_everything()(torch.zeros(1, 2, 32))


def test_sizes_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"num_heads=6 is not divisible by num_kv_heads=4; choose 1, 2, 3 or 6\."):
        CausalSelfAttention(48, 6, num_kv_heads=4)
    with pytest.raises(ConfigError, match=r"dim=50 is not divisible by num_heads=6"):
        CausalSelfAttention(50, 6)
    with pytest.raises(ConfigError, match="has 10 channels; 4 key/value heads of 8 need 32"):
        CausalSelfAttention(32, 4, value_embedding=ValueEmbedding(5, 10))
    with pytest.raises(ConfigError, match="value_gate_channels=40"):
        CausalSelfAttention(32, 4, value_embedding=ValueEmbedding(5, 32), value_gate_channels=40)


def test_a_full_cache_says_how_many_positions_are_needed() -> None:
    cache = LayerCache(1, 1, 2, 4)
    with pytest.raises(ConfigError, match="holds 2 positions and 3 are needed"):
        cache.append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))


def test_flops_count_windows() -> None:
    assert CausalSelfAttention(32, 4).flops_per_token(100) == 12 * 32 * 100
    assert CausalSelfAttention(32, 4, window_tokens=10).flops_per_token(100) == 12 * 32 * 10


def test_a_cache_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"for 4 rows, 1 heads and 4 channels; got keys \(1, 1, 2, 4\)"):
        LayerCache(4, 1, 8, 4).append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(ConfigError, match="positive sizes"):
        LayerCache(1, 1, 0, 4)
    with pytest.raises(ConfigError, match="which do not fit"):
        causal_attention(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4))
    with pytest.raises(ConfigError, match="window_tokens=-1"):
        CausalSelfAttention(8, 2, window_tokens=-1)


def test_a_large_norm_eps_makes_queries_and_keys_vanish_and_every_position_an_average() -> None:
    torch.manual_seed(0)
    attention = CausalSelfAttention(8, 2, norm_eps=1e12)
    torch.nn.init.eye_(attention.o_proj.weight)
    x = torch.randn(1, 5, 8)
    averages = attention.v_proj(x).cumsum(dim=1) / torch.arange(1, 6)[None, :, None]
    torch.testing.assert_close(attention(x), averages)
