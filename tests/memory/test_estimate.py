"""The count of a training step's memory against real runs, and what it does not touch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.layers import Linear, TokenEmbedding, set_matmul_precision
from tinygpt.losses import next_token_loss
from tinygpt.memory import training_memory
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups

MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from memory import Case, train
fields = json.loads(sys.argv[2])
found = train(fields, "cpu", 1)
print(json.dumps([Case(fields, "cpu").predicted(), found.start, found.peak]))
"""
MODEL = {"num_layers": 4, "dim": 256, "num_heads": 2, "vocab_size": 4096, "max_seq_len": 256}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc, and knows glibc")
@pytest.mark.parametrize(
    "fields",
    [
        MODEL,
        MODEL | {"rows": 8, "checkpointing": "block", "value_embeddings": False},
        pytest.param(
            MODEL | {"num_layers": 2, "vocab_size": 16_384, "rows": 8, "micro_batches": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "recomputed", "large vocabulary"],
)
def test_the_estimate_is_within_15_percent_of_a_real_run(fields: dict[str, object]) -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    command = [sys.executable, "-c", MEASURE, str(benchmarks), json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    predicted, start, peak = json.loads(done.stdout)
    assert predicted == pytest.approx(peak - start, rel=0.15)
    assert predicted + start == pytest.approx(peak, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "mlp", "block"])
def test_the_estimate_is_within_10_percent_of_the_gpus_peak(checkpointing: str) -> None:
    script = MEASURE.replace('"cpu"', '"cuda"')
    fields = f'{{"num_layers": 6, "dim": 768, "num_heads": 6, "rows": 4, "checkpointing": "{checkpointing}"}}'
    command = [sys.executable, "-c", script, str(Path(__file__).parents[2] / "benchmarks"), fields]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    predicted, _, peak = json.loads(done.stdout)
    assert predicted == pytest.approx(peak, rel=0.10)


def documented() -> tuple[GPT, MuonAdamW]:
    with torch.device("meta"):
        model = GPT.from_config(GPTConfig.from_depth(12)).set_compute_dtype(torch.bfloat16, embeddings=True)
    return model, MuonAdamW(param_groups(model, nanochat_rules(model_dim=768)))


def test_the_documented_run_fits_its_card_and_parts_are_exact() -> None:
    model, optimizer = documented()
    memory = training_memory(model, optimizer, rows=8, seq_len=2048)
    tables = 25_165_824 + 150_994_944
    others = 286_261_730 - tables
    buffers = 2 * 2048 * 64 * 4  # cosines and sines
    assert memory.weights == 2 * tables + 4 * others + buffers
    assert memory.gradients == 2 * tables + 4 * others
    moments = 4 * (84_935_088 + 2 * (286_261_730 - 84_935_088))
    assert memory.optimizer == pytest.approx(moments, rel=1e-3)  # and a number a row or column under Muon
    assert memory.total < 8.5 * 2**30
    assert memory.highest_in == "forward"


def test_each_way_to_recompute_takes_less_and_rows_take_in_proportion() -> None:
    with torch.device("meta"):
        model = GPT.from_config(GPTConfig.from_depth(4))
    optimizer = torch.optim.SGD(model.parameters())
    totals = []
    for what in ("none", "mlp", "block"):
        model.set_activation_checkpointing(what)
        totals.append(training_memory(model, optimizer, rows=4, seq_len=1024).activations)
    assert totals[0] > 1.25 * totals[1] > 2.5 * totals[2]
    model.set_activation_checkpointing("none")
    # Of two rows on all is large enough that norms are made again instead of kept.
    kept = [training_memory(model, optimizer, rows=rows, seq_len=512).activations for rows in (2, 3, 4)]
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], rel=1e-2)


def test_model_and_optimizer_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=99, max_seq_len=16))
    optimizer = MuonAdamW.for_model(model)
    ids = torch.randint(99, (2, 16))
    (model.loss(ids, ids)[0] / 32).backward()
    optimizer.step()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    state, chunk, random = optimizer.state_dict(), model.head.chunk_tokens, torch.get_rng_state()
    memory = training_memory(model, optimizer, rows=2, seq_len=16)
    assert memory.overhead > 0  # counted for the CPU that the model lies on
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(a is b.grad for a, b in zip(gradients, model.parameters(), strict=True))
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert all(
        torch.equal(a, b)
        for name in state["state"]
        for a, b in zip(state["state"][name].values(), optimizer.state_dict()["state"][name].values(), strict=True)
        if isinstance(a, torch.Tensor)
    )
    assert model.head.chunk_tokens is chunk
    assert torch.equal(torch.get_rng_state(), random)


def test_any_model_is_counted_with_its_loss() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 50))
    optimizer = torch.optim.AdamW(model.parameters())
    memory = training_memory(model, optimizer, rows=4, seq_len=32, loss_fn=next_token_loss, device_type="cuda")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert memory.weights == memory.gradients == 4 * parameters
    assert memory.optimizer == pytest.approx(8 * parameters, rel=0.05)  # blocks of 512 bytes
    assert memory.activations >= 4 * 4 * 32 * (64 + 256)  # what the second layer and the first one multiplied


@pytest.mark.parametrize("rows", [0, -1])
def test_no_rows_are_refused(rows: int) -> None:
    model, optimizer = documented()
    with pytest.raises(ConfigError, match="at least one row of one token"):
        training_memory(model, optimizer, rows=rows, seq_len=8)


def test_what_cannot_be_run_without_numbers_is_refused() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (self.weight * self.weight.sum().item()).sum(), targets.sum()

    looks = Looks()
    with pytest.raises(ConfigError, match=r"cannot be planned: .*item"):
        training_memory(looks, torch.optim.SGD(looks.parameters()), rows=1, seq_len=4)
    plain = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="a Linear has no method loss: give the loss_fn"):
        training_memory(plain, torch.optim.SGD(plain.parameters()), rows=1, seq_len=4)


def test_a_model_without_config_is_counted_too() -> None:
    model = GPT(embedding=TokenEmbedding(4, 4), blocks=[Wrapped()], head=Linear(4, 4))
    memory = training_memory(model, torch.optim.SGD(model.parameters()), rows=1, seq_len=4)
    assert memory.optimizer == 0


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear(4, 4)

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.inner(x)


class Counts(torch.optim.SGD):
    """An optimizer with something of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.updates = 0

    def step(self, closure: Any = None) -> Any:
        self.updates += 1
        return super().step(closure)


def one_layer() -> GPT:
    return GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=99, max_seq_len=16))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"capturable": True}])
def test_torchs_optimizers_are_counted_however_they_update(options: dict[str, bool]) -> None:
    model = one_layer()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    memory = training_memory(model, optimizer, rows=1, seq_len=4, device_type="cuda")
    assert memory.optimizer >= 2 * memory.gradients
    assert {name: optimizer.param_groups[0][name] for name in options} == options


def test_on_a_gpu_torch_updates_all_tensors_at_once_and_needs_room_for_it() -> None:
    model = nn.Sequential(nn.Embedding(9, 64), *(nn.Linear(64, 64) for _ in range(20)))
    optimizer = torch.optim.AdamW(model.parameters())

    def loss(model: nn.Module, batch: Any) -> Any:
        return model(batch.inputs).sum(), 1

    work = [
        training_memory(model, optimizer, rows=1, seq_len=1, device_type=kind, loss_fn=loss).temporaries
        for kind in ("cuda", "cpu")
    ]
    assert work[0] >= sum(p.nbytes for p in model.parameters()) > 0
    assert work[0] > work[1]


def test_an_optimizer_of_ones_own_is_copied_with_what_it_has_and_never_steps_itself() -> None:
    model = one_layer()
    optimizer = Counts(model.parameters(), lr=1.0)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # puts a step of its own into the optimizer
    before = optimizer.updates
    assert training_memory(model, optimizer, rows=1, seq_len=4).total > 0
    assert optimizer.updates == before
    with pytest.raises(ConfigError, match=r"memory of this optimizer cannot be planned: .*closure"):
        training_memory(model, torch.optim.LBFGS(model.parameters()), rows=1, seq_len=4)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_products_in_eight_bits_are_counted_as_others(precision: Any) -> None:
    model = GPT.from_config(GPTConfig(num_layers=1, dim=32, num_heads=2, vocab_size=99, max_seq_len=16))
    expected = training_memory(model, MuonAdamW.for_model(model), rows=1, seq_len=4).total
    set_matmul_precision(model, precision)
    assert training_memory(model, MuonAdamW.for_model(model), rows=1, seq_len=4).total == expected


def test_attention_and_norm_may_be_called_by_name_and_weights_be_tied() -> None:
    class Own(nn.Module):
        def __init__(self, *, numpy: bool = False) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.table.weight
            self.numpy = numpy

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = F.rms_norm(self.table(ids), normalized_shape=(32,))[:, None]
            x = F.scaled_dot_product_attention(query=x, key=x, value=x, is_causal=True)[:, 0]
            if self.numpy:
                x.detach().numpy()
            return self.head(x)

    own = Own()
    optimizer = torch.optim.SGD(own.parameters())
    memory = training_memory(own, optimizer, rows=2, seq_len=8, loss_fn=next_token_loss, device_type="cuda")
    assert memory.weights == memory.gradients == 50 * 32 * 4
    looks = Own(numpy=True)
    with pytest.raises(ConfigError, match="cannot be planned: can't convert meta device type tensor to numpy"):
        training_memory(looks, torch.optim.SGD(looks.parameters()), rows=1, seq_len=4, loss_fn=next_token_loss)
