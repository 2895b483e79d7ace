"""Rings and slots against attention over everything that was read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.layers import KVCache, LayerCache, RotaryEmbedding, SlotCache, causal_attention


@given(
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    window=st.integers(0, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_a_ring_read_in_any_pieces_equals_attention_over_everything(
    pieces: list[int], window: int, kv_heads: int
) -> None:
    seq = sum(pieces)
    generator = torch.Generator().manual_seed(seq)
    q = torch.randn(2, 4, seq, 8, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, seq, 8, generator=generator)
    cache = LayerCache(2, kv_heads, seq, 8, window_tokens=window)
    found, start = [], 0
    for size in pieces:
        part = slice(start, start + size)
        found.append(cache.attend(q[:, :, part], k[:, :, part], v[:, :, part], window_tokens=window))
        start += size
    expected = causal_attention(q, k, v, window_tokens=window)
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=1e-4, atol=1e-5)
    assert cache.nbytes == 2 * 4 * 2 * kv_heads * 8 * min(seq, window + 1)


def test_a_window_the_cache_does_not_keep_is_refused() -> None:
    cache = LayerCache(1, 1, 8, 4, window_tokens=3)
    with pytest.raises(ConfigError, match="keeps a window of 3 tokens and cannot serve window_tokens=None"):
        cache.attend(*torch.zeros(3, 1, 1, 1, 4))
    with pytest.raises(ConfigError, match="window_tokens=-1 is negative"):
        LayerCache(1, 1, 8, 4, window_tokens=-1)


def test_rotations_at_positions_of_their_own_are_those_at_whole_ones() -> None:
    rope, x = RotaryEmbedding(8, 32), torch.randn(3, 2, 4, 8)
    turned = rope(x, position=torch.tensor([0, 5, 28]))
    for row, position in enumerate([0, 5, 28]):
        torch.testing.assert_close(turned[row : row + 1], rope(x[row : row + 1], position=position))


@pytest.fixture
def slots() -> SlotCache:
    model = GPT.from_config(GPTConfig.from_depth(2, head_dim=16, width_per_layer=16, vocab_size=50, max_seq_len=8))
    return SlotCache(model.new_cache(3))


def read(slots: SlotCache, slot: int, length: int) -> None:
    text = slots.begin(slot)
    for layer in text.layers:
        layer.append(*torch.randn(2, 1, 2, length, 16))
    slots.commit(slot, text)


def test_a_step_needs_texts_with_room(slots: SlotCache) -> None:
    with pytest.raises(ConfigError, match="num_rows=4 must lie between 1 and the 3 slots"):
        slots.step(4)
    read(slots, 0, 3)
    with pytest.raises(ConfigError, match=r"slots hold \[3, 0\] positions; each needs a text, and room in 8"):
        slots.step(2)
    read(slots, 1, 8)
    with pytest.raises(ConfigError, match=r"slots hold \[3, 8\] positions"):
        slots.step(2)
    assert slots.lengths == [3, 8, 0]
    slots.step(1)
    assert slots.lengths == [4, 8, 0]


def test_a_text_goes_on_after_what_is_still_there(slots: SlotCache) -> None:
    read(slots, 0, 5)
    assert [slots.can_cut(0, length) for length in (-1, 0, 3, 5, 6)] == [False, True, True, True, False]
    with pytest.raises(ConfigError, match="slot 0 holds 5 positions and cannot go on after 6; ask can_cut before"):
        slots.begin(0, kept=6)
    text = slots.begin(0, kept=3)
    assert (text.length, text.free, slots.lengths[0]) == (3, 5, 0)
    windows = SlotCache(KVCache([LayerCache(1, 1, 8, 4), LayerCache(1, 1, 8, 4, window_tokens=3)]))
    for length, can in [(4, [True, True, True]), (5, [False, False, False, True])]:
        windows.lengths[0] = length
        assert [windows.can_cut(0, cut) for cut in range(2, length + 1)] == can


def test_rows_at_different_positions_have_no_one_length(slots: SlotCache) -> None:
    read(slots, 0, 3)
    keys, _ = slots.step(1).layers[0].append(*torch.ones(2, 1, 2, 1, 16))
    assert keys.shape == (1, 2, 4, 16)
    assert bool((keys[:, :, 3] == 1).all())
    read(slots, 1, 3)
    layer = slots.step(2).layers[0]
    with pytest.raises(ConfigError, match=r"take cache\.position, and call cache\.attend\(q, k, v"):
        layer.append(*torch.zeros(2, 2, 2, 1, 16))


def test_slots_of_rows_are_made_from_any_cache() -> None:
    slots = SlotCache(KVCache([LayerCache(2, 1, 6, 4), LayerCache(2, 1, 6, 4, window_tokens=1)]))
    assert (slots.num_slots, slots.max_seq_len, slots.lengths) == (2, 6, [0, 0])
    assert slots.nbytes == 2 * 4 * 4 * 2 * (6 + 2)
