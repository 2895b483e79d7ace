"""What only a CUDA device can show: the same numbers as on the CPU, bfloat16, compiled blocks, exact resume."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_names import read_recording
from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.compiler import compiler_problem
from tinygpt.data import Batch, BatchLoader, TextDocuments
from tinygpt.generate import Engine, GenerationConfig, generate, generate_batch
from tinygpt.layers import causal_attention
from tinygpt.layers._low_precision import low_precision_linear
from tinygpt.layers._norm import rms_norm
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW, nanochat_rules, orthogonalize, param_groups
from tinygpt.tokenizer import ByteTokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _compiler_without_past() -> Iterator[None]:
    """Forget what a test compiled: the compiler runs a function eagerly, unsaid, after eight ways to compile it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def make_model(**config: Any) -> GPT:
    torch.manual_seed(0)
    settings = {"head_dim": 64, "vocab_size": 257, "max_seq_len": 256, **config}
    return GPT.from_config(GPTConfig.from_depth(4, **settings))


@pytest.mark.parametrize("name", ["all_blocks", "gqa"])
def test_float32_logits_and_gradients_are_those_recorded(name: str) -> None:
    recording = read_recording(name)
    model = GPT.from_config(recording.config)
    model.load_state_dict(recording.weights)
    model.cuda()
    inputs, targets = recording.inputs[0].cuda(), recording.targets[0].cuda()
    expected = recording.expected["logits"]
    assert (model(inputs).cpu() - expected).abs().max() <= 1e-3 * expected.abs().max()
    total, count = model.loss(inputs, targets)
    (total / count).backward()
    expected_gradients = recording.named("grad.")
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        reference = expected_gradients[parameter_name]
        error = torch.linalg.vector_norm(parameter.grad.cpu() - reference) / torch.linalg.vector_norm(reference)
        assert error <= 1e-2, f"{parameter_name}: {error:.1e}"


@pytest.mark.parametrize("window", [None, 40])
def test_attention_in_bfloat16_stays_close_to_float32(window: int | None) -> None:
    q, k, v = torch.randn(3, 2, 4, 256, 64, device="cuda")
    exact = causal_attention(q, k, v, window_tokens=window)
    rough = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window_tokens=window)
    assert (rough.float() - exact).abs().mean() < 0.02


@pytest.mark.parametrize("shape", [(4, 64, 768), (2, 3, 50, 128)])
def test_the_norm_in_bfloat16_has_the_gradient_of_the_formula(shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
    grad = grad.transpose(-2, -3).contiguous().transpose(-2, -3)  # as attention hands it back
    rough, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    rms_norm(rough).backward(grad)
    (exact * exact.square().mean(-1, keepdim=True).rsqrt()).backward(grad.double())
    assert rough.grad is not None
    assert exact.grad is not None
    assert (rough.grad - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_orthogonalization_runs_in_bfloat16_by_default_and_stays_close() -> None:
    matrices = torch.randn(3, 96, 160, device="cuda")
    singular_values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_bfloat16_training_learns_one_batch_by_heart(compiled: bool) -> None:
    model = make_model().cuda().set_compute_dtype(torch.bfloat16, embeddings=True)
    ids = torch.randint(256, (4, 129))
    optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=256, batch_lr_scale=0.5)))
    batches = itertools.repeat(Batch(ids[:, :-1], ids[:, 1:]))
    trainer = Trainer(model, optimizer, batches, TrainerConfig(num_steps=120, compile=compiled))
    steps = list(trainer)
    assert steps[-1].loss < 0.1
    assert trainer.precision == torch.bfloat16
    assert (steps[-1].peak_memory_bytes or 0) > 0


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("compiled", [False, "block", "model"])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_training_in_eight_bits_learns_what_bfloat16_does(precision: Any, compiled: Any) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    ids = torch.randint(256, (4, 129), generator=torch.Generator().manual_seed(0))
    ends = []
    for products in (None, precision):
        model = make_model().cuda().set_compute_dtype(torch.bfloat16, embeddings=True)
        optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=256, batch_lr_scale=0.5)))
        config = TrainerConfig(num_steps=120, compile=compiled, matmul_precision=products)
        steps = list(Trainer(model, optimizer, itertools.repeat(Batch(ids[:, :-1], ids[:, 1:])), config))
        ends.append(steps[-1].loss)
    assert ends[1] < 0.1
    assert abs(ends[1] - ends[0]) < 0.05


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_eight_bits_are_those_of_a_cpu(precision: str, dtype: torch.dtype) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    torch.manual_seed(0)
    x, weight, grad = torch.randn(100, 256).to(dtype), torch.randn(512, 256) * 0.06, torch.randn(100, 512).to(dtype)
    grad *= 1e-3  # whose factor float16 does not hold
    found = []
    for device in ("cpu", "cuda"):
        a, w = (t.to(device, copy=True).requires_grad_() for t in (x, weight))
        y = low_precision_linear(a, w, precision)
        found.append([t.cpu() for t in (y.detach(), *torch.autograd.grad(y, (a, w), grad.to(device)))])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_cpu.dtype == on_gpu.dtype
        assert (on_cpu.float() - on_gpu.float()).norm() < 0.01 * on_cpu.float().norm()


@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_the_compiled_muon_update_is_the_plain_one() -> None:
    if (problem := compiler_problem("cuda")) is not None:
        pytest.skip(problem)
    ends = []
    for setting in (False, "auto"):
        model = make_model().cuda()
        optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=256)), compile=setting)
        for step in range(3):
            generator = torch.Generator("cuda").manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
            optimizer.step()
        ends.append([parameter.detach() for parameter in model.parameters()])
    for plain, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=0, atol=0.02 * float(plain.abs().max()))


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"second_moment": "row"}])
def test_tables_are_trained_on_a_gpu_as_on_a_cpu_and_repeat(options: dict[str, Any]) -> None:
    ends = []
    for device in ("cpu", "cuda", "cuda"):
        table = torch.nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16, device=device))
        optimizer = MuonAdamW([{"params": [("t", table)], "kind": "adamw", "lr": 1e-2, **options}])
        for step in range(40):
            table.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(step)).to(table)
            optimizer.step()
        ends.append(table.detach().float().cpu())
    assert torch.equal(ends[1], ends[2])
    # Another device draws other noise: two seeds on one device end 0.017 apart, where the numbers moved by 0.058.
    assert (ends[0] - ends[1]).abs().mean() < (0.03 if "stochastic_rounding" in options else 0.01)
    assert (ends[0] - ends[1]).mean().abs() < 0.002


def test_full_logits_never_exist_while_training() -> None:
    model = make_model(vocab_size=32_768).cuda().set_compute_dtype(torch.bfloat16)
    ids = torch.randint(32_768, (16, 256), device="cuda")
    model.loss(ids, ids)[0].backward()  # gradients exist from here on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.loss(ids, ids)[0].backward()
    full_logits = 16 * 256 * 32_768 * 4
    assert torch.cuda.max_memory_allocated() - before < 2 * full_logits


def test_cached_greedy_text_equals_text_without_cache() -> None:
    model = make_model().cuda()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    cached = generate(model, [256, 5], max_new_tokens=40, temperature=0)
    assert cached == generate(model, [256, 5], max_new_tokens=40, temperature=0, use_cache=False)


@pytest.mark.parametrize("weights", [None, "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_an_engine_writes_on_a_gpu_what_it_writes_alone(weights: Any, compiled: bool) -> None:
    model = make_model(window_pattern="SL", short_window_tokens=20).cuda()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    prompts = [[256, *range(length)] for length in (3, 30, 7, 50, 1)]
    engine = Engine(model, num_slots=3, weights=weights, compile=compiled)
    config = GenerationConfig(max_new_tokens=40, temperature=0, logprobs=0)
    for prompt, (text,) in zip(prompts, generate_batch(engine, prompts, config), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text.token_ids], device="cuda"))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(text.token_ids, device="cuda")[:, None])[:, 0].cpu()
        found = torch.tensor([entry.logprob for entry in text.logprobs or []])
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01 if weights in (None, "float32") else 1.0)
        if weights is None:
            assert text.token_ids == generate(model, prompt, max_new_tokens=40, temperature=0)


def test_a_resumed_run_repeats_the_losses(tmp_path: Path) -> None:
    def trainer(out: Path) -> Trainer:
        model = make_model().cuda().set_compute_dtype(torch.bfloat16, embeddings=True)
        loader = BatchLoader(TextDocuments(["some text " * 90, "more"] * 9), ByteTokenizer(), rows=2, seq_len=128)
        config = TrainerConfig(num_steps=10, out_dir=str(out), save_every=4, compile=False)
        return Trainer(model, MuonAdamW.for_model(model), loader, config)

    torch.use_deterministic_algorithms(True)  # with warn_only FlashAttention adds up in any order
    try:
        list(trainer(tmp_path / "whole"))
        for step in trainer(tmp_path / "parts"):
            if step.index == 5:
                break
        resumed = trainer(tmp_path / "parts")
        resumed.resume()
        list(resumed)
    finally:
        torch.use_deterministic_algorithms(False)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / run / "metrics.jsonl") if r["event"] == "step"]
        for run in ("whole", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
