"""Tables whose gradient takes memory for the rows that were looked up."""

import copy
import mmap

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig
from tinygpt.layers import TokenEmbedding, ValueEmbedding
from tinygpt.memory import training_memory
from tinygpt.optim import MuonAdamW

ROWS, DIM = 8_192, 128  # 4 MiB in float32


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the system for each gradient from 4 MiB on, not from 32: what is computed is the same."""
    monkeypatch.setattr("tinygpt.layers._row_table._LARGE", 2**22)


def plain(table: nn.Embedding, **options: bool | int) -> nn.Embedding:
    """Return torch's own embedding with the same weight."""
    other = nn.Embedding(*table.weight.shape, _weight=table.weight.detach().clone(), **options)  # type: ignore[arg-type]
    return other.to(table.weight.dtype)


def gradient(table: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    rows = table(ids)
    rows.backward(torch.randn(rows.shape).to(rows.dtype))
    assert table.weight.grad is not None
    return table.weight.grad


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ids", ["few", "repeated", "none", "one"])
def test_the_gradient_of_a_table_is_torchs_to_the_bit(ids: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = ValueEmbedding(2 * ROWS, DIM).to(dtype)
    shape = {"few": (3, 50), "repeated": (8, 50), "none": (2, 0), "one": (1,)}[ids]
    token_ids = torch.randint(7 if ids == "repeated" else ROWS, shape)
    assert table.unwritten_gradient(token_ids.numel()) > 0
    found, expected = gradient(table, token_ids), gradient(plain(table), token_ids)
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert torch.equal(gradient(table, token_ids), 2 * expected)  # a second micro-batch adds to it


def test_the_gradient_of_a_large_table_takes_memory_for_its_rows_alone() -> None:
    resident = resident_of_gradients()
    rows = 2**18  # 128 MiB
    table = TokenEmbedding(rows, DIM)
    assert table.unwritten_gradient(64) > 0
    assert TokenEmbedding(2**15, DIM).unwritten_gradient(64) == 0  # 16 MiB, which allocators give out again
    before = resident()
    grad = gradient(table, torch.randint(rows, (64,)))
    assert grad.abs().sum() > 0  # also not when all of it is read
    taken = resident() - before
    assert taken < grad.nbytes / 4
    assert taken <= grad.nbytes - table.unwritten_gradient(64) + 2**23


def resident_of_gradients():  # type: ignore[no-untyped-def]
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            file.read()
    except OSError:
        pytest.skip("the system does not tell what memory is resident")

    def pages() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    return pages


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    "option", [{"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": 3}, {"max_norm": 0.5}]
)
def test_what_an_embedding_can_do_besides_it_still_does(option: dict[str, bool | int]) -> None:
    table = ValueEmbedding(ROWS, DIM)
    for name, value in option.items():
        setattr(table, name, value)
    ids = torch.tensor([[3, 4, 4, 5]])
    assert table.unwritten_gradient(4) == 0
    expected = gradient(plain(table, **option), ids)
    assert torch.equal(gradient(table, ids).to_dense(), expected.to_dense())


@pytest.mark.usefixtures("early")
def test_a_table_can_be_differentiated_twice_and_in_batches() -> None:
    table, ids = ValueEmbedding(ROWS, DIM), torch.tensor([[1, 2, 1]])
    other = plain(table)
    results = []
    for each in (table, other):
        (first,) = torch.autograd.grad(each(ids).pow(3).sum(), each.weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), each.weight)
        batch = torch.autograd.grad(each(ids).sum(-1).flatten(), each.weight, torch.eye(3), is_grads_batched=True)
        results.append((first.detach(), second, *batch))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("early")
def test_the_plan_leaves_out_of_a_single_micro_batch_what_is_never_written() -> None:
    model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=ROWS, max_seq_len=64))
    optimizer = MuonAdamW.for_model(model)
    plans = {
        (device, accumulate): training_memory(
            model, optimizer, rows=1, seq_len=64, accumulate=accumulate, device_type=device
        ).gradients
        for device in ("cpu", "cuda")
        for accumulate in (False, True)
    }
    assert plans["cpu", True] == plans["cuda", True]
    tables = [module for module in model.modules() if isinstance(module, TokenEmbedding | ValueEmbedding)]
    unwritten = sum(table.unwritten_gradient(64) for table in tables)
    assert unwritten > 0.9 * sum(table.weight.nbytes for table in tables)
    assert plans["cpu", False] <= plans["cpu", True] - unwritten
    tied = copy.deepcopy(model)
    tied.head.weight = tied.embedding.weight  # type: ignore[union-attr]
    table = training_memory(tied, MuonAdamW.for_model(tied), rows=1, seq_len=64, accumulate=False, device_type="cpu")
    assert table.gradients >= tied.embedding.weight.nbytes  # type: ignore[union-attr]
