"""Copies for reading: what they compute, what they share and what they leave alone."""

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.generate import Engine, GenerationConfig, generate, generate_batch, reading_copy
from tinygpt.generate import _weights as weights_module


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig.from_depth(3, head_dim=32, width_per_layer=32, vocab_size=257, max_seq_len=64)
    model = GPT.from_config(config.replace(window_pattern="SL", short_window_tokens=6))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 0.01:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


IDS = torch.randint(257, (3, 24), generator=torch.Generator().manual_seed(1))


def relative_error(model: GPT, copy: GPT) -> float:
    with torch.no_grad():
        exact, found = model(IDS), copy(IDS)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(("weights", "bound"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.03)])
def test_a_copy_computes_nearly_the_same_in_fewer_bytes(model: GPT, weights: str, bound: float) -> None:
    copy = reading_copy(model, weights)  # type: ignore[arg-type]
    assert relative_error(model, copy) < bound
    if weights != "float32":
        assert relative_error(model, copy) > 1e-5, "nothing was rounded"


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_without_onednn_products_are_the_same(model: GPT, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = reading_copy(model, weights)  # type: ignore[arg-type]
    monkeypatch.setattr(weights_module, "_in_blocks", lambda weight: None)
    plain = reading_copy(model, weights)  # type: ignore[arg-type]
    assert relative_error(blocks, plain) < (1e-5 if weights == "float32" else 0.01)


def test_a_layout_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_block_product", lambda x, packed: x @ torch.ones(64, 48))
    assert weights_module._in_blocks(torch.randn(48, 64)) is None


def test_int8_of_few_rows_and_of_many_agree(model: GPT) -> None:
    torch.manual_seed(0)
    product = weights_module._Int8Linear(torch.randn(48, 64), torch.randn(48))
    x = torch.randn(40, 64)
    torch.testing.assert_close(product(x[:5]), product(x)[:5], rtol=0.02, atol=0.1)


def test_tables_are_shared_and_the_model_stays_as_it_is(model: GPT) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = reading_copy(model.train(), "int8")
    assert not copy.training
    assert model.training
    assert copy.embedding.weight is model.embedding.weight
    assert copy.blocks[0].attention.value_embedding.weight is model.blocks[0].attention.value_embedding.weight
    assert type(copy.blocks[0].mlp.up_proj) is not type(model.blocks[0].mlp.up_proj)
    assert copy.smear.gate.weight is model.smear.gate.weight  # too small to matter
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_biases_and_plain_linears_are_kept() -> None:
    torch.manual_seed(0)
    config = GPTConfig.from_depth(1, head_dim=32, width_per_layer=32, vocab_size=99, max_seq_len=32)

    class PlainMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu())

    model = GPT.from_config(config, mlp=lambda config, layer: PlainMLP())
    torch.nn.init.normal_(model.head.weight, std=0.3)
    for weights in ("float32", "bfloat16", "int8"):
        copy = reading_copy(model, weights)  # type: ignore[arg-type]
        assert not isinstance(copy.blocks[0].mlp.up, nn.Linear)
        with torch.no_grad():
            error = (copy(IDS % 99) - model(IDS % 99)).norm() / model(IDS % 99).norm()
        assert error < 0.03


def test_an_engine_reads_the_copy_and_not_what_comes_later(model: GPT) -> None:
    config = GenerationConfig(max_new_tokens=10, temperature=0)
    expected = generate(model, [1, 2, 3], max_new_tokens=10, temperature=0)
    engine = Engine(model, num_slots=2, weights="float32")
    assert generate_batch(engine, [[1, 2, 3]], config)[0][0].token_ids == expected


def test_a_copy_for_the_compiler_keeps_the_usual_layout(model: GPT) -> None:
    copy = reading_copy(model, "float32", for_compiler=True)
    assert copy.blocks[0].mlp.up_proj.weight.shape == model.blocks[0].mlp.up_proj.weight.shape
    assert relative_error(model, copy) < 1e-6
    Engine(model, compile=True, weights="float32")
    if weights_module._in_blocks(torch.randn(64, 64)) is None:
        pytest.skip("no oneDNN here")
    with pytest.raises(ConfigError, match="make the copy with for_compiler=True"):
        Engine(reading_copy(model, "float32"), compile=True)


def test_unknown_weights_are_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match="weights='int4' is unknown; choose one of float32, bfloat16, int8"):
        reading_copy(model, "int4")  # type: ignore[arg-type]
