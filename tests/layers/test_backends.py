"""Which attention backend a call takes: what is reported, what is trusted, what can be demanded."""

import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.utils.checkpoint import checkpoint

from tinygpt.errors import ConfigError
from tinygpt.layers import (
    CausalSelfAttention,
    RotaryEmbedding,
    _attend,
    _backends,
    _flash,
    _flex,
    attention_backends,
    causal_attention,
    use_attention_backend,
)

NAMES = ["flash4", "flash3", "varlen", "flash2", "flex", "blocks", "sdpa"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test without what earlier ones found out."""
    monkeypatch.setattr(_backends, "_verdicts", {})
    monkeypatch.setattr(_backends, "_warned", False)


def qkv(seq: int = 200, q_seq: int | None = None, kv_heads: int = 2, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, q_seq or seq, 4, 16), (2, seq, kv_heads, 16), (2, seq, kv_heads, 16)]
    made = [torch.randn(shape, generator=generator).to(**options).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in made]


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    ages = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    ages = ages - torch.arange(k.shape[2], device=q.device)
    hidden = (ages < 0) if window is None else (ages < 0) | (ages > window)
    return ((q @ k.mT) * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_on_a_cpu_blocks_and_torch_are_there_and_the_rest_says_what_it_needs() -> None:
    found = attention_backends("cpu")
    assert [backend.name for backend in found] == NAMES
    assert [backend.name for backend in found if backend.available] == ["blocks", "sdpa"]
    assert [backend.name for backend in found if not backend.fast_windows] == ["sdpa"]
    assert str(found[0]) == "flash4: not available, it needs a CUDA device"
    assert str(found[-1]) == "sdpa: available"


def test_without_arguments_the_best_device_is_reported() -> None:
    there = {backend.name for backend in attention_backends() if backend.available}
    assert ("blocks" in there) != torch.cuda.is_available()


def off_by_one(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    return plain(q, k, v, None if window is None else window + 1, scale)


def aligned_at_the_start(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """As FlashAttention before 2.1 did: the first query sees the first key."""
    return plain(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], window, scale)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    return plain(q, k, v, window, scale) * torch.nan


def without_gradient(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    return plain(q.detach(), k.detach(), v.detach(), window, scale)


def out_of_shared_memory(*_: object) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nmore lines")


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (off_by_one, r"its result on a small example is wrong by \d+%"),
        (aligned_at_the_start, r"its result on a small example is wrong by \d+%"),
        (not_a_number, "its result on a small example is wrong by nan%"),
        (without_gradient, "a small example failed with RuntimeError: element 0 of tensors does not require grad"),
        (out_of_shared_memory, "a small example failed with RuntimeError: out of resource: shared memory$"),
    ],
)
def test_a_backend_that_fails_its_trial_is_not_taken(monkeypatch: pytest.MonkeyPatch, attend: Any, reason: str) -> None:
    monkeypatch.setitem(_backends.KERNELS, "blocks", _backends.Kernel(attend, lambda *_: ""))
    report = {backend.name: backend for backend in attention_backends("cpu", head_dim=16)}
    assert not report["blocks"].available
    assert re.match(reason, report["blocks"].reason)
    q, k, v = qkv()
    torch.testing.assert_close(causal_attention(q, k, v, window_tokens=30, scale=0.3), plain(q, k, v, 30, 0.3))


def test_a_trial_runs_once_whatever_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return plain(*arguments)

    monkeypatch.setitem(_backends.KERNELS, "blocks", _backends.Kernel(counted, lambda *_: ""))
    before = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: pytest.fail("a hook of the caller"), lambda x: x)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        attention_backends("cpu", head_dim=16)
        attention_backends("cpu", head_dim=16)
    assert calls == [True] * 3  # a window, a prompt continued, no window
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trial_within_activation_checkpointing_is_no_part_of_it() -> None:
    q, k, v = qkv()

    def windowed(*parts: Tensor) -> Tensor:
        return causal_attention(*parts, window_tokens=30)

    y = checkpoint(windowed, q, k, v, use_reentrant=False)  # the trial is due inside
    sides = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (y, windowed(q, k, v))]
    torch.testing.assert_close(*sides, rtol=0, atol=0)


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(_backends.KERNELS, "blocks", _backends.Kernel(plain, lambda *_: "it is off"))
    return


@pytest.mark.usefixtures("no_blocks")
def test_a_window_that_costs_more_than_it_saves_is_said_once() -> None:
    q, k, v = qkv(600)
    with pytest.warns(UserWarning, match=r"runs masked on cpu and costs more .*varlen: it needs a CUDA device"):
        causal_attention(q, k, v, window_tokens=100)
    causal_attention(q, k, v, window_tokens=100)  # a second warning would be an error


@pytest.mark.usefixtures("no_blocks")
def test_no_warning_where_a_mask_costs_little_or_was_demanded() -> None:
    with torch.no_grad():
        causal_attention(*qkv(600), window_tokens=100)
    causal_attention(*qkv(200), window_tokens=100)
    with use_attention_backend("sdpa"):
        causal_attention(*qkv(600), window_tokens=100)


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    message = "there is no attention backend 'flash5'; choose flash4, .*, blocks or sdpa"
    with pytest.raises(ConfigError, match=message), use_attention_backend("flash5"):
        pass


def test_a_backend_that_cannot_serve_a_call_is_refused_and_the_choice_is_free_again() -> None:
    q, k, v = qkv()
    message = "'varlen' was asked for and cannot serve float32 heads of 16 on cpu: it needs a CUDA device"
    with pytest.raises(ConfigError, match=message), use_attention_backend("varlen"):
        causal_attention(q, k, v, window_tokens=30)
    causal_attention(q, k, v, window_tokens=30)


def test_what_is_demanded_is_taken_and_none_gives_the_choice_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    blocks = _backends.KERNELS["blocks"]
    spy = blocks._replace(attend=lambda *args: taken.append("blocks") or blocks.attend(*args))
    monkeypatch.setitem(_backends.KERNELS, "blocks", spy)
    q, k, v = qkv()
    full = causal_attention(q, k, v)
    attention_backends("cpu", head_dim=16, grouped=True)
    taken.clear()
    with use_attention_backend("blocks"):
        torch.testing.assert_close(causal_attention(q, k, v), full)
        with use_attention_backend(None):
            causal_attention(q, k, v)
        with use_attention_backend("sdpa"):
            causal_attention(q, k, v, window_tokens=30)
    assert taken == ["blocks"]


def test_a_compiled_layer_with_a_window_is_one_graph_that_follows_what_is_demanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = CausalSelfAttention(32, 2, rope=RotaryEmbedding(16, 256), window_tokens=50)
    torch.nn.init.normal_(layer.o_proj.weight)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(2, 200, 32, requires_grad=True)
    y = compiled(x)  # the trial is due inside the trace
    assert [key[0] for key, reason in _backends._verdicts.items() if not reason] == ["blocks"]
    sides = [(out, *torch.autograd.grad(out.square().mean(), x)) for out in (y, layer(x))]
    torch.testing.assert_close(*sides)
    masked = []
    monkeypatch.setattr(_attend, "_sdpa", lambda q, *_: masked.append("sdpa") or q)
    with use_attention_backend("sdpa"):
        assert not torch.equal(compiled(x), y)  # compiled again, with the function above in it
    assert masked == ["sdpa"]


def test_what_compiles_itself_is_not_tried_by_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _backends.Kernel(out_of_shared_memory, lambda *_: "", compiles=True)
    monkeypatch.setitem(_backends.KERNELS, "flex", kernel)
    options = {"grouped": False, "full": False, "long_training": True, "demanded": None}
    cpu = torch.device("cpu")
    assert _backends.choose(cpu, torch.float32, 16, traced=True, **options) == "blocks"
    assert not [key for key in _backends._verdicts if key[0] == "flex"]
    assert _backends.choose(cpu, torch.float32, 16, traced=False, **options) == "blocks"
    (reason,) = (reason for key, reason in _backends._verdicts.items() if key[0] == "flex")
    assert reason.startswith("a small example failed")


@pytest.mark.parametrize("short", [0, 1], ids=["queries", "keys"])
def test_one_row_for_a_batch_is_repeated_and_nothing_is_read_past_its_end(short: int) -> None:
    parts = qkv()
    q, k, v = (x[:1] if (i > 0) == short else x for i, x in enumerate(parts))
    whole = (x.expand(2, -1, -1, -1) for x in (q, k, v))
    torch.testing.assert_close(causal_attention(q, k, v, window_tokens=30), plain(*whole, 30, 0.25))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_of_several_dtypes_are_refused(part: int) -> None:
    parts = [x.bfloat16() if i == part else x for i, x in enumerate(qkv())]
    with pytest.raises(ConfigError, match=r"queries, keys and values of one dtype, got .*bfloat16"):
        causal_attention(*parts, window_tokens=30)


def test_derivatives_of_functions_are_right_or_refused_and_never_zero_unsaid() -> None:
    q, k, v = (x.detach() for x in qkv())

    def total(q: Tensor) -> Tensor:
        return causal_attention(q, k, v, window_tokens=30).square().sum()

    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(q), torch.autograd.grad(total(leaf), leaf)[0])
    for forward in (lambda: torch.func.jvp(total, (q,), (q,)), lambda: dual(total, q)):
        with pytest.raises(NotImplementedError, match="forward AD"):
            forward()


def dual(function: Any, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, x))


def test_a_compiled_layer_stays_one_graph_when_lengths_change() -> None:
    layer = CausalSelfAttention(32, 2, rope=RotaryEmbedding(16, 256), window_tokens=50)
    torch.nn.init.normal_(layer.o_proj.weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seq in (200, 150, 201):
        x = torch.randn(1, seq, 32)
        torch.testing.assert_close(compiled(x), layer(x))


def test_first_calls_of_many_threads_leave_the_filters_of_warnings_alone() -> None:
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=attention_backends, args=("cpu",), kwargs={"head_dim": width}) for width in range(1, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_a_thread_that_outlives_the_main_one_can_ask_first() -> None:
    code = (
        "import threading, time, torch\nfrom tinygpt.layers import causal_attention\ndef late():\n    time.sleep(0.5)\n"
        "    print(causal_attention(*torch.randn(3, 1, 2, 200, 16), window_tokens=50).shape)\n"
        "threading.Thread(target=late).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([1, 2, 200, 16])", done.stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is none that torch knows; choose cpu, cuda"),
        ({"device": "cuda:99"}, r"device='cuda:99' is not there: torch sees \d+ CUDA devices"),
        ({"device": "cpu", "head_dim": 0}, "head_dim=0 is not positive"),
    ],
)
def test_a_report_on_what_is_not_there_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention_backends(**asked)


def test_tensors_without_content_go_to_torch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = causal_attention(*(torch.empty(1, 2, 200, 16) for _ in range(3)), window_tokens=20)
    assert y.shape == (1, 2, 200, 16)
    meta = [torch.empty(1, 2, 200, 16, device="meta") for _ in range(3)]
    assert causal_attention(*meta, window_tokens=20).shape == (1, 2, 200, 16)


@pytest.mark.parametrize(("q_seq", "window"), [(200, 30), (50, 30), (200, None), (50, None)])
def test_varlen_is_called_as_torch_documents_it(
    monkeypatch: pytest.MonkeyPatch, q_seq: int, window: int | None
) -> None:
    def documented(q, k, v, q_starts, k_starts, max_q, max_k, *, scale, window_size):
        assert (max_q, max_k, window_size[1]) == (q_seq, 200, 0)
        assert q_starts.dtype == k_starts.dtype == torch.int32
        assert q.stride(2) == k.stride(2) == v.stride(2) == 1
        rows = [
            plain(*(x[a:b].transpose(0, 1)[None] for x, a, b in ((q, *i), (k, *j), (v, *j))), left, scale)
            for left in [None if window_size[0] < 0 else window_size[0]]
            for i, j in zip(
                *([(a, b) for a, b in s.unfold(0, 2, 1).tolist()] for s in (q_starts, k_starts)), strict=True
            )
        ]
        return torch.cat([row[0].transpose(0, 1) for row in rows])

    monkeypatch.setitem(_flash._found, "varlen", documented)
    q, k, v = qkv(q_seq=q_seq)
    k = k.mT.contiguous().mT  # whose rows do not lie in one piece
    torch.testing.assert_close(_flash.varlen_attention(q, k, v, window, 0.3), plain(q, k, v, window, 0.3))


@pytest.mark.parametrize("adds_log_sums", [False, True])
@pytest.mark.parametrize("window", [None, 30])
def test_packages_are_called_with_heads_behind_positions(
    monkeypatch: pytest.MonkeyPatch, adds_log_sums: bool, window: int | None
) -> None:
    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size=(-1, -1)):
        assert causal
        left = None if window_size == (-1, -1) else window_size[0]
        y = plain(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), left, softmax_scale).transpose(1, 2)
        return (y, torch.zeros(1)) if adds_log_sums else y

    monkeypatch.setitem(_flash._found, "flash3", flash_attn_func)
    q, k, v = qkv()
    result = _flash.package_attention("flash3", q, k, v, window, 0.3)
    torch.testing.assert_close(result, plain(q, k, v, window, 0.3))


def test_flash_attention_refuses_what_it_cannot_compute_before_it_is_looked_for() -> None:
    cuda = torch.device("cuda", 0)
    for why_not in (_flash.varlen_why_not, lambda *call: _flash.package_why_not("flash3", *call)):
        assert why_not(cuda, torch.float32, 64) == "it computes in bfloat16 and float16, not in float32"
        assert why_not(cuda, torch.bfloat16, 264) == "it takes heads of up to 256 channels in steps of 8, not of 264"
        assert why_not(cuda, torch.bfloat16, 20).endswith("not of 20")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    reason = _flash.package_why_not("flash3", torch.device("cuda", 0), torch.bfloat16, 128)
    assert reason == "flash_attn_interface cannot be imported: No module named 'flash_attn_interface'"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    reason = _flash.package_why_not("flash3", torch.device("cuda", 0), torch.bfloat16, 128)
    assert reason == "it needs a GPU of compute capability 9.0"


def test_the_varlen_of_this_torch_knows_windows() -> None:
    assert _flash.varlen_why_not(torch.device("cuda", 0), torch.bfloat16, 128) == ""


@given(seq=st.integers(1, 1500), window=st.integers(0, 1600))
def test_the_mask_of_flexattention_is_the_one_torch_makes_from_all_pairs(seq: int, window: int) -> None:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= window)

    mine = _flex.window_mask(seq, window, torch.device("cpu"))
    theirs = create_block_mask(seen, None, None, seq, seq, device="cpu")
    assert mine.shape == theirs.shape
    for kind in ("", "full_"):
        for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
            assert torch.equal(getattr(mine, kind + name), getattr(theirs, kind + name)), kind + name


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flexattention_with_that_mask_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    for window in (30, None):
        q, k, v = (x.detach() for x in qkv(300))
        monkeypatch.setitem(_flex._compiled, _flex._kind(q.device, q.dtype, q.shape[3]), torch_flex_attention)
        torch.testing.assert_close(_flex.flex_attention(q, k, v, window, 0.3), plain(q, k, v, window, 0.3))


def test_flexattention_keeps_its_tiles_for_each_dtype_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiles(dtype: torch.dtype, head_dim: int) -> Any:
        return _flex._found[_flex._kind(torch.device("cuda", 0), dtype, head_dim)].keywords["kernel_options"]

    properties = SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    kinds = [(torch.float32, 128), (torch.bfloat16, 128), (torch.bfloat16, 256)]
    for dtype, head_dim in kinds:
        assert _flex.flex_why_not(torch.device("cuda", 0), dtype, head_dim) == ""
    # Asking for one does not change what another is computed with.
    assert [tiles(*kind) for kind in kinds] == [_flex.small_tiles(*kind) for kind in kinds]
    assert tiles(torch.float32, 128) != tiles(torch.bfloat16, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_small_tiles_fit_99_kilobytes_and_divide_the_blocks_of_the_mask(dtype: torch.dtype, head_dim: int) -> None:
    tiles = _flex.small_tiles(dtype, head_dim)
    row = head_dim * dtype.itemsize
    forward = row * (tiles["fwd_BLOCK_M"] + 2 * tiles["fwd_num_stages"] * tiles["fwd_BLOCK_N"])
    backward = (
        2
        * row
        * max(
            tiles["bwd_BLOCK_N1"] + tiles["bwd_num_stages"] * tiles["bwd_BLOCK_M1"],
            tiles["bwd_BLOCK_M2"] + tiles["bwd_num_stages"] * tiles["bwd_BLOCK_N2"],
        )
    )
    assert max(forward, backward) <= 80 * 1024 < 99 * 1024
    assert all(128 % size == 0 for name, size in tiles.items() if "BLOCK" in name)
    # What torch demands of tiles beside that.
    assert tiles["bwd_BLOCK_N1"] % tiles["bwd_BLOCK_M1"] == tiles["bwd_BLOCK_M2"] % tiles["bwd_BLOCK_N2"] == 0


def test_importing_and_asking_loads_no_compiler() -> None:
    code = (
        "import sys, torch\nfrom tinygpt.layers import attention_backends, causal_attention\n"
        "attention_backends('cpu')\ncausal_attention(*torch.randn(3, 1, 2, 200, 16), window_tokens=50)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_every_backend_of_a_gpu_is_the_formula(name: str, dtype: torch.dtype, kv_heads: int) -> None:
    found = {backend.name: backend for backend in attention_backends("cuda", dtype, head_dim=16, grouped=kv_heads != 4)}
    if not found[name].available:
        pytest.skip(str(found[name]))
    for seq, q_seq, window in [(1000, 1000, 300), (1000, 1000, None), (300, 90, 100), (300, 90, None)]:
        q, k, v = qkv(seq, q_seq, kv_heads, device="cuda", dtype=dtype)
        with use_attention_backend(name):
            y = causal_attention(q, k, v, window_tokens=window)
        exact = plain(q.double(), k.double(), v.double(), window, 0.25)
        sides = [(out, *torch.autograd.grad(out.square().sum(), (q, k, v))) for out in (y, exact)]
        for mine, right in zip(*sides, strict=True):
            assert (mine.double() - right).abs().max() <= 0.03 * right.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_a_gpu_has_fast_windows_in_bfloat16_and_in_float32(head_dim: int) -> None:
    half = {b.name: str(b) for b in attention_backends("cuda", torch.bfloat16, head_dim=head_dim) if b.fast_windows}
    single = {b.name: str(b) for b in attention_backends("cuda", torch.float32, head_dim=head_dim) if b.fast_windows}
    if torch.cuda.get_device_capability() >= (8, 0):
        assert half["varlen"].endswith(": available"), half
        assert half["flex"].endswith(": available"), half
        assert single["flex"].endswith(": available"), single


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_compiled_blocks_on_a_gpu_compute_windows_in_one_graph(dtype: torch.dtype) -> None:
    layer = CausalSelfAttention(256, 2, rope=RotaryEmbedding(128, 512), window_tokens=100).cuda()
    torch.nn.init.normal_(layer.o_proj.weight, std=0.1)
    found = attention_backends("cuda", dtype)
    if any(b.available for b in found if b.name in _flash.PACKAGES):
        pytest.skip("an installed FlashAttention package ends the graph")
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    x = torch.randn(2, 512, 256, device="cuda", dtype=dtype, requires_grad=True)
    sides = [(y, *torch.autograd.grad(y.square().sum(), x)) for y in (compiled(x), layer(x))]
    for mine, right in zip(*sides, strict=True):
        assert (mine - right).abs().max() <= 0.03 * right.abs().max()


@pytest.mark.gpu
def test_no_window_on_a_gpu_is_torchs_causal_attention_unless_a_package_is_there() -> None:
    q, k, v = qkv(200, device="cuda", dtype=torch.bfloat16)
    with warnings.catch_warnings(action="error"):
        causal_attention(q, k, v)
    tried = {key[0] for key in _backends._verdicts}
    assert tried == {"flash4", "flash3"} or any(not reason for reason in _backends._verdicts.values())
