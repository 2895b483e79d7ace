"""Blocks that compute something again in the backward pass, where that could be something else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinygpt import GPT, GPTConfig
from tinygpt.layers import Block, CausalSelfAttention, ReluSquaredMLP, RMSNorm, ValueEmbedding


class Mixed(nn.Module):
    """In place of an attention: a product, which keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x @ self.weight.to(x.dtype)


def recomputing_block() -> Block:
    torch.manual_seed(0)
    block = Block(8, Mixed(), ReluSquaredMLP(8, 16), residual_scale=0.7, x0_scale=0.3)
    block.recompute_mlp = True
    return block


@pytest.mark.parametrize("which", [0, 1])
def test_inputs_that_change_before_the_backward_pass_are_noticed_also_with_frozen_scales(which: int) -> None:
    # So large that the norm before the attention is made of them again.
    block, inputs = recomputing_block(), [torch.randn(2, 16384, 8), torch.randn(2, 16384, 8)]
    for scale in (block.residual_scale, block.x0_scale):
        assert scale is not None
        scale.requires_grad_(False)
    out = block(inputs[0], x0=inputs[1])
    inputs[which].zero_()
    with pytest.raises(RuntimeError, match="changed in place before that pass"):
        out.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", ["dropout", "layer norm"])
def test_another_norm_before_the_attention_gives_the_gradients_of_what_it_computed(norm: str, autocast: bool) -> None:
    found = []
    for recompute in (False, True):
        block = recomputing_block()
        block.recompute_mlp = recompute
        block.attention_norm = nn.Sequential(RMSNorm(8), nn.Dropout(0.5)) if norm == "dropout" else nn.LayerNorm(8)  # type: ignore[assignment]
        x = torch.randn(2, 5, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block(x, x0=torch.ones(2, 5, 8))
        found.append(torch.autograd.grad(out.float().square().sum(), [x, *block.attention.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("some", [".weight", "residual_scale"])
@pytest.mark.parametrize("what", ["none", "mlp", "block"])
def test_parameters_given_to_a_call_alone_are_not_mistaken_for_those_of_the_model(what: Any, some: str) -> None:
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=40, max_seq_len=16)).set_activation_checkpointing(what)
    given = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters() if name.endswith(some)}
    ids = torch.randint(40, (2, 9))
    out = torch.func.functional_call(model, given, (ids,)).square().mean()
    if what == "block" or (what, some) == ("mlp", ".weight"):
        with pytest.raises(RuntimeError, match=r"no longer has the parameters.*set_activation_checkpointing\('none'\)"):
            out.backward()
        return
    found = torch.autograd.grad(out, list(given.values()))
    model.load_state_dict(given, strict=False)
    own = dict(model.named_parameters())
    expected = torch.autograd.grad(model(ids).square().mean(), [own[name] for name in given])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


@pytest.mark.parametrize("kind", ["pre-hook", "parametrized", "other forward"])
def test_a_value_table_that_does_something_of_its_own_is_not_looked_up_again(kind: str) -> None:
    torch.manual_seed(0)
    table = ValueEmbedding(11, 8)
    attention = CausalSelfAttention(8, 2, value_embedding=table, value_gate_channels=4)
    nn.init.normal_(attention.o_proj.weight)
    ids, x = torch.randint(11, (2, 5)), torch.randn(2, 5, 8)
    if kind == "pre-hook":
        table.register_forward_pre_hook(lambda module, args: (10 - args[0],))
    elif kind == "parametrized":
        parametrize.register_parametrization(table, "weight", Noisy())
    else:
        forward = table.forward
        table.forward = lambda ids: 2 * forward(ids)  # type: ignore[method-assign]

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        out = attention(x, token_ids=ids)
        return [*torch.autograd.grad(out.square().sum(), list(attention.parameters()))]

    found = gradients()
    with torch.autograd.graph.disable_saved_tensors_hooks("so that everything is kept"):
        expected = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
