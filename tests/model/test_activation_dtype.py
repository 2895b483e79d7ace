"""What a model with tables in half precision computes in on a CPU."""

from typing import Any

import pytest
import torch

from tinygpt import GPT, GPTConfig
from tinygpt.generate import reading_copy

NO_SCALES = {"residual_scales": False, "x0_scales": False}
IDS = torch.tensor([[1, 2, 3]])


def small_tables(**fields: Any) -> GPT:
    sizes = {"num_layers": 1, "dim": 64, "num_heads": 2, "vocab_size": 40, "max_seq_len": 16}
    model = GPT.from_config(GPTConfig(**{**sizes, **fields}))
    return model.set_compute_dtype(torch.bfloat16, embeddings=True).set_compute_dtype(None)


@pytest.mark.parametrize("fields", [{}, NO_SCALES, {**NO_SCALES, "norm_weight": True}])
def test_a_value_table_that_comes_first_in_the_blocks_does_not_decide(fields: dict[str, Any]) -> None:
    assert small_tables(**fields).hidden_states(IDS).dtype == torch.float32


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("fields", [{}, NO_SCALES, {**NO_SCALES, "value_embeddings": False}])
def test_a_reading_copy_computes_in_what_the_model_computes_in(fields: dict[str, Any], weights: Any) -> None:
    copy = reading_copy(small_tables(**fields), weights)
    assert copy.hidden_states(IDS).dtype == torch.float32
    assert copy.new_cache(1).layers[0]._keys.dtype == torch.float32
