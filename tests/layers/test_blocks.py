"""The smaller layers against their formulas."""

import copy

import pytest
import torch
from torch import nn

from tinygpt.errors import ConfigError
from tinygpt.layers import (
    Backout,
    Block,
    GeluMLP,
    KVCache,
    LayerCache,
    Linear,
    ReluSquaredMLP,
    RMSNorm,
    RotaryEmbedding,
    Smear,
    SwiGLU,
    TokenEmbedding,
    ValueEmbedding,
    init_weights,
)


def test_linear_multiplies_in_the_dtype_of_its_input_and_keeps_a_float32_weight() -> None:
    linear = Linear(8, 4, bias=True)
    x = torch.randn(2, 8)
    torch.testing.assert_close(linear(x), x @ linear.weight.T + linear.bias)
    y = linear(x.bfloat16())
    assert (y.dtype, linear.weight.dtype) == (torch.bfloat16, torch.float32)
    y.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "std"),
    [
        (Linear(400, 300), 400**-0.5),
        (TokenEmbedding(500, 300), 0.8),
        (ValueEmbedding(500, 300), 300**-0.5),
        (ReluSquaredMLP(400, 300).up_proj, 0.4 * 400**-0.5),
    ],
)
def test_first_weights_have_the_stated_spread(module: nn.Module, std: float) -> None:
    weight = next(module.parameters())
    assert float(weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert abs(float(weight.detach().mean())) < 0.02 * std


def test_rms_norm_equals_its_formula_and_torch() -> None:
    x = torch.randn(3, 16)
    torch.testing.assert_close(RMSNorm(16)(x), x / x.square().mean(-1, keepdim=True).sqrt())
    norm, reference = RMSNorm(16, weight=True, eps=1e-3), nn.RMSNorm(16, eps=1e-3)
    for each in (norm, reference):
        nn.init.constant_(each.weight, 1.5)
    torch.testing.assert_close(norm(x), reference(x))


@pytest.mark.parametrize(("clockwise", "sign"), [(True, -1.0), (False, 1.0)])
def test_rotation_is_a_complex_product_with_the_chosen_sign(clockwise: bool, sign: float) -> None:
    rope = RotaryEmbedding(6, 20, base=50.0, clockwise=clockwise)
    x = torch.randn(2, 3, 5, 6)
    angle = sign * (torch.arange(5) + 4)[:, None] * 50.0 ** (-torch.arange(3) / 3)
    pair = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rope(x, position=4), torch.cat((pair.real, pair.imag), -1), rtol=1e-5, atol=1e-5)


def test_rotation_keeps_scores_a_function_of_distance() -> None:
    rope = RotaryEmbedding(8, 100)
    q, k = torch.randn(2, 1, 1, 1, 8)
    near = (rope(q, position=7) * rope(k, position=3)).sum()
    far = (rope(q, position=64) * rope(k, position=60)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


def test_rotation_refuses_what_it_has_no_table_for() -> None:
    rope = RotaryEmbedding(8, 10)
    with pytest.raises(ConfigError, match="position 10 lies beyond the 10 positions"):
        rope(torch.zeros(1, 1, 3, 8), position=8)
    with pytest.raises(ConfigError, match="even, positive head_dim, got 7"):
        RotaryEmbedding(7, 10)
    with pytest.raises(ConfigError, match="positive max_seq_len and base"):
        RotaryEmbedding(8, 10, base=0.0)


def with_random_weights(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_feed_forward_layers_equal_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    relu, gelu, glu = (with_random_weights(layer(8, 16)) for layer in (ReluSquaredMLP, GeluMLP, SwiGLU))
    torch.testing.assert_close(relu(x), (x @ relu.up_proj.weight.T).clamp_min(0) ** 2 @ relu.down_proj.weight.T)
    hidden = x @ gelu.up_proj.weight.T
    exact = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(gelu(x), exact @ gelu.down_proj.weight.T)
    gate = x @ glu.gate_proj.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ glu.up_proj.weight.T)) @ glu.down_proj.weight.T
    torch.testing.assert_close(glu(x), expected)


@pytest.mark.parametrize("layer", [ReluSquaredMLP, GeluMLP, SwiGLU])
def test_feed_forward_layers_start_as_no_change_and_still_learn(layer: type[nn.Module]) -> None:
    mlp = layer(8, 16)
    x = torch.randn(2, 8)
    assert (mlp(x) == 0).all()
    (mlp(x) - torch.ones(2, 8)).square().sum().backward()
    assert mlp.down_proj.weight.grad.abs().max() > 0


def test_smear_adds_a_gated_share_of_the_predecessor() -> None:
    smear = with_random_weights(Smear(8, gate_channels=3))
    x = torch.randn(2, 5, 8)
    y = smear(x)
    torch.testing.assert_close(y[:, 0], x[:, 0])
    for t in range(1, 5):
        gate = torch.sigmoid(x[:, t, :3] @ smear.gate.weight.T)
        torch.testing.assert_close(y[:, t], x[:, t] + smear.scale * gate * x[:, t - 1])


def test_smear_in_pieces_equals_smear_at_once_and_starts_as_no_change() -> None:
    x = torch.randn(2, 5, 8)
    assert (Smear(8, gate_channels=3)(x) == x).all()
    smear = with_random_weights(Smear(8, gate_channels=3))
    pieces = [smear(x[:, :2]), smear(x[:, 2:3], previous=x[:, 1:2]), smear(x[:, 3:], previous=x[:, 2:3])]
    torch.testing.assert_close(torch.cat(pieces, 1), smear(x))
    with pytest.raises(ConfigError, match="gate_channels=9"):
        Smear(8, gate_channels=9)


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return 2 * x


def test_block_scales_mixes_and_adds_in_order() -> None:
    x, x0 = torch.randn(2, 1, 3, 8)
    block = Block(8, Doubling(), Doubling(), residual_scale=1.1, x0_scale=0.3)
    stream = 1.1 * x + 0.3 * x0
    stream = stream + 2 * RMSNorm(8)(stream)
    torch.testing.assert_close(block(x, x0=x0), stream + 2 * RMSNorm(8)(stream))
    plain = Block(8, Doubling(), Doubling())
    assert not list(plain.parameters())
    stream = x + 2 * RMSNorm(8)(x)
    torch.testing.assert_close(plain(x), stream + 2 * RMSNorm(8)(stream))
    with pytest.raises(ConfigError, match="call it with x0="):
        block(x)


def test_backout_takes_a_share_of_the_middle_out() -> None:
    x, middle = torch.randn(2, 1, 3, 8)
    torch.testing.assert_close(Backout(scale=0.25)(x, middle), x - 0.25 * middle)


def test_cache_length_is_that_of_its_layers() -> None:
    layer = LayerCache(1, 1, 4, 2)
    cache = KVCache([layer])
    layer.append(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    assert cache.length == 3


def test_init_weights_on_meta_gives_the_weights_of_direct_construction() -> None:
    torch.manual_seed(3)
    direct = SwiGLU(8, 16)
    with torch.device("meta"):
        later = SwiGLU(8, 16)
    later = later.to_empty(device="cpu")
    torch.manual_seed(3)
    init_weights(later)
    for a, b in zip(direct.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="in_features=0"):
        Linear(0, 4)
    with pytest.raises(ConfigError, match="positive dim, got 0"):
        RMSNorm(0)


def test_layers_survive_deepcopy() -> None:
    block = Block(8, Doubling(), SwiGLU(8, 16), residual_scale=1.1)
    assert torch.equal(copy.deepcopy(block).mlp.up_proj.weight, block.mlp.up_proj.weight)


def test_rotation_tables_stay_float32_and_follow_the_base() -> None:
    rope, exact = RotaryEmbedding(8, 50), RotaryEmbedding(8, 50)
    x = torch.randn(1, 1, 50, 8)
    assert torch.equal(rope.bfloat16().float()(x), exact(x))
    assert not torch.allclose(RotaryEmbedding(8, 50, base=10.0)(x), exact(x))
