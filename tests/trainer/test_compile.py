"""What is compiled by which setting, and that a run can change it: with a compiler that only looks, and a real one."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from small_runs import everything, make_model, make_trainer, steps_of
from tinygpt import GPT, GPTConfig
from tinygpt.checkpoint import load_tensors
from tinygpt.data import Batch
from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.layers import use_attention_backend
from tinygpt.losses import LossSum, next_token_loss
from tinygpt.trainer._compile import compile_parts


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let torch.compile capture graphs and run them as they are; list what it was asked to compile."""
    torch._dynamo.reset()
    names: list[str] = []
    real = torch.compile

    def compile_(target: Callable[..., Any], **options: Any) -> Any:
        assert options == {"dynamic": False}
        owner = getattr(target, "__self__", None)
        names.append(type(owner).__name__ if owner is not None else target.__name__)
        return real(target, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("tinygpt.trainer._compile.compiler_problem", lambda device: None)
    return names


@pytest.mark.filterwarnings("ignore")  # the compiler looks at attributes that warn when looked at
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("auto", []),
        (False, []),
        (True, ["Block"]),
        ("block", ["Block"]),
        ("model", ["next_token_loss"]),
    ],
)
def test_a_setting_compiles_what_it_says(compiled: list[str], setting: Any, expected: list[str]) -> None:
    trainer = make_trainer(compile=setting)
    assert compiled == expected
    steps = list(trainer)
    assert [s.loss for s in steps] == [s.loss for s in make_trainer(compile=False)]
    assert trainer.loss_fn is next_token_loss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", [False, "block", "model"])
def test_a_demanded_backend_that_cannot_serve_is_one_line_also_from_the_compiler(
    compiled: list[str], setting: Any
) -> None:
    with use_attention_backend("varlen"), pytest.raises(ConfigError, match="'varlen' was asked for") as caught:
        next(iter(make_trainer(compile=setting)))
    assert str(caught.value).endswith("cannot serve float32 heads of 16 on cpu: it needs a CUDA device.")


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_blocks_is_compiled_as_one(compiled: list[str]) -> None:
    model = nn.Sequential(nn.Embedding(257, 8), nn.Linear(8, 257))
    losses = [s.loss for s in make_trainer(model=model, compile="block")]
    assert compiled == ["Sequential"]
    assert losses[-1] < losses[0]


class _Named(nn.Sequential):
    blocks = "encoder, decoder"


@pytest.mark.filterwarnings("ignore")
def test_on_a_gpu_auto_compiles_blocks_and_leaves_a_foreign_model_alone(compiled: list[str]) -> None:
    device = torch.device("cuda")  # nothing is run there
    assert compile_parts(_Named(nn.Linear(8, 8)), next_token_loss, "auto", device) is next_token_loss
    assert compiled == []
    compile_parts(_Named(nn.Linear(8, 8)), next_token_loss, "block", device)
    assert compiled == ["_Named"]
    compile_parts(make_model(), next_token_loss, "auto", device)
    assert compiled == ["_Named", "Block"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", ["block", "model"])
def test_compiled_parts_keep_one_hidden_layer_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, setting: Any
) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: real(f, backend="aot_eager_decomp_partition", **o))
    monkeypatch.setattr("tinygpt.trainer._compile.compiler_problem", lambda device: None)
    torch._dynamo.reset()
    model = GPT.from_config(GPTConfig(num_layers=2, dim=64, num_heads=2, vocab_size=64, max_seq_len=16))
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.randint(64, (3, 16))
    loss_fn = compile_parts(model, next_token_loss, setting, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_fn(model, Batch(ids, ids))
    hidden = [t for key, t in kept.items() if key not in weights and t.numel() == 3 * 16 * 4 * 64]
    assert len(hidden) == 2  # one a block, and its square not beside it


@pytest.mark.filterwarnings("ignore")
def test_a_loss_of_ones_own_is_compiled_with_the_model(compiled: list[str]) -> None:
    def doubled(model: nn.Module, batch: Batch) -> LossSum:
        total, count = next_token_loss(model, batch)
        return LossSum(total * 2, count)

    ends = [
        [s.loss for s in make_trainer(compile=setting, arguments={"loss_fn": doubled})] for setting in (False, "model")
    ]
    assert compiled == ["doubled"]
    assert ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("before", "after"), [("block", False), (False, "model"), ("model", "block")])
def test_a_run_is_resumed_under_another_setting(compiled: list[str], tmp_path: Path, before: Any, after: Any) -> None:
    list(make_trainer(tmp_path / "whole", compile=False, save_every=2))
    steps_of(make_trainer(tmp_path / "parts", compile=before, save_every=2), 2)
    resumed = make_trainer(tmp_path / "parts", compile=after, save_every=2)
    assert not resumed.resume()
    list(resumed)
    ends = [tmp_path / run / "checkpoints" / "step-000004" for run in ("whole", "parts")]
    for file in ("model.safetensors", "optimizer.safetensors"):  # norms round otherwise under the compiler
        torch.testing.assert_close(*(load_tensors(end / file) for end in ends), rtol=1e-4, atol=1e-6)
    rest = [{k: v for k, v in everything(end).items() if k not in ("weights", "optimizer")} for end in ends]
    assert rest[0] == rest[1]
    names = load_tensors(tmp_path / "parts" / "checkpoints" / "step-000002" / "model.safetensors").keys()
    assert set(names) == {name for name, _ in make_model().named_parameters()}


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_not_finite_are_found_without_compiling_anew(compiled: list[str]) -> None:
    def broken(model: nn.Module, batch: Batch) -> LossSum:
        total, count = next_token_loss(model, batch)
        return LossSum(total * float("nan"), count)

    torch._dynamo.utils.counters.clear()
    with pytest.raises(NonFiniteError, match="micro-batch 0 rows 0, 1"):
        list(make_trainer(compile="block", arguments={"loss_fn": broken}))
    assert compiled == ["Block"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile"):
        make_trainer(compile="whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore")
def test_loss_and_model_compiled_as_one_train_like_eager_ones() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = [step.loss for step in make_trainer(num_steps=3, compile=False)]
    assert [step.loss for step in make_trainer(num_steps=3, compile="model")] == pytest.approx(eager, rel=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
