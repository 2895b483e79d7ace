"""Activation checkpointing: the same loss and gradients, in less memory, for the work it says."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.layers import SwiGLU

CONFIG = GPTConfig(num_layers=3, dim=32, num_heads=2, vocab_size=99, max_seq_len=16, window_pattern="SL")
IDS = torch.arange(32).view(2, 16)


def make_model(config: GPTConfig = CONFIG, **parts: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT.from_config(config, **parts)
    for parameter in model.parameters():  # zero projections would hide mistakes
        nn.init.normal_(parameter, std=0.1)
    return model


def trained(model: GPT) -> list[torch.Tensor]:
    model.zero_grad()
    total, _ = model.loss(IDS, IDS + 1)
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["mlp", "block"])
def test_loss_and_gradients_are_the_same_to_the_bit(what: Any, dtype: torch.dtype) -> None:
    model = make_model().set_compute_dtype(dtype)
    expected = trained(model)
    found = trained(model.set_activation_checkpointing(what))
    assert len(found) == len(expected) > 20
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("what", ["mlp", "block"])
def test_parts_of_ones_own_and_dropout_are_recomputed_alike(what: Any) -> None:
    def mlp(config: GPTConfig, layer: int) -> nn.Module:
        return nn.Sequential(SwiGLU(config.dim, 48), nn.Dropout(0.5))

    model = make_model(mlp=mlp)
    torch.manual_seed(1)
    expected = trained(model)
    torch.manual_seed(1)
    found = trained(model.set_activation_checkpointing(what))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_feed_forward_layer_is_recomputed_for_one_product() -> None:
    model, counts = make_model(), []
    for what in ("none", "mlp", "block"):
        model.set_activation_checkpointing(what)
        with FlopCounterMode(display=False) as counter:
            trained(model)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 3 * 2 * IDS.numel() * 32 * 128  # layers, multiply-add, tokens, the up projection
    assert counts[2] > counts[1]


@pytest.mark.parametrize("what", ["mlp", "block"])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_compiled_blocks_recompute_too(what: Any) -> None:
    model = make_model(CONFIG.replace(num_layers=2))  # a window and no value table, and the other way round
    expected = trained(model)
    model.set_activation_checkpointing(what)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for a, b in zip(trained(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_recomputed() -> None:
    model = make_model().set_activation_checkpointing("block")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = model(IDS)
    model.set_activation_checkpointing("none")
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        assert torch.equal(model(IDS), logits)
    assert counter.get_total_flops() == plain.get_total_flops()


def test_unknown_words_and_blocks_without_a_known_inside_are_refused() -> None:
    with pytest.raises(ConfigError, match="'all' is not known; choose none, mlp, block"):
        make_model().set_activation_checkpointing("all")  # type: ignore[arg-type]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            return x + self.linear(x)

    model = make_model(block=lambda config, layer: Own())
    with pytest.raises(ConfigError, match="block 0 is a Own, of which nothing is known to recompute; choose 'block'"):
        model.set_activation_checkpointing("mlp")
    expected = trained(model)
    found = trained(model.set_activation_checkpointing("block"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
