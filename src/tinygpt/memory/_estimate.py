"""The memory of a training step, found by taking the step without numbers."""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tinygpt.data import Batch
from tinygpt.errors import ConfigError
from tinygpt.layers import LMHead, set_matmul_precision
from tinygpt.layers._row_table import RowTable
from tinygpt.memory._kernels import KernelsOf
from tinygpt.memory._ledger import Ledger

# What allocators round sizes up to: torch's on a GPU to 512 bytes, on a CPU to a cache line.
_BLOCK = {"cpu": 64}
_GPU_BLOCK = 512
# Fitted on Linux to what benchmarks/memory.py measures, which prints how far off they leave it: what threads and the
# libraries of products take at their first use, and what glibc keeps back of freed memory, as a share of all that a
# micro-batch allocates in sizes for which glibc does not ask the system each time.
_CPU_LIBRARIES = 115 * 2**20
_CPU_KEPT_BACK = 0.08
_CPU_KEPT_SIZES = 128 * 2**10, 32 * 2**20

LossOf = Callable[[nn.Module, Batch], Any]
"""A loss as the trainer takes it: returns something whose first item is the sum."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the highest moment of a training step.

    Attributes:
        weights: Parameters as they are stored, and buffers.
        gradients: Those that exist at that moment: all of them if the step adds up several micro-batches.
        optimizer: Its state, after the first step.
        activations: What the forward pass of a micro-batch keeps for the backward pass.
        temporaries: What exists for a moment: a chunk of logits, a layer's gradients, or the work of the optimizer.
        overhead: What the allocator and libraries take besides, on a CPU. On a GPU 0: `max_memory_allocated` counts
            neither the CUDA context nor what the allocator keeps back.
        highest_in: Where that moment lies: `"forward"` (the loss included), `"backward"` or `"optimizer"`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    overhead: int
    highest_in: str

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by what they hold."""
        names = ("weights", "gradients", "optimizer", "activations", "temporaries", "overhead")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """All of them: what `torch.cuda.max_memory_allocated` says, and on a CPU resident memory on top of Python."""
        return sum(self.parts.values())


def training_memory(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    rows: int,
    seq_len: int,
    accumulate: bool = True,
    device_type: str | None = None,
    loss_fn: LossOf | None = None,
) -> TrainingMemory:
    """Find what training with micro-batches of this size needs, by taking a step on the meta device.

    There every tensor has a shape and no numbers, so that a step takes no memory and about a second, and whatever the
    model is made of is counted as it is. The model's settings count: compute dtype, activation
    checkpointing, tokens of a chunk. Model and optimizer are not changed. `torch.compile` keeps less than what is
    counted here; products in eight bits are counted as those of the compute dtype, and update kernels that exist on a
    GPU alone as the plain ones.

    Args:
        model: On any device; one on the meta device will do.
        optimizer: Its optimizer.
        rows: Rows of a micro-batch.
        seq_len: Tokens of a row.
        accumulate: Whether a step adds up several micro-batches, so that gradients are there from the start.
        device_type: `"cuda"` or `"cpu"`; `None` for that of the model, and `"cuda"` for one on the meta device.
        loss_fn: As the `Trainer` takes it; `None` for the model's method `loss`.

    Raises:
        ConfigError: If a number is not positive, or the model cannot be copied or run without numbers.

    Example:
        ```python
        import torch
        from tinygpt import GPT, GPTConfig
        from tinygpt.memory import training_memory
        from tinygpt.optim import MuonAdamW

        with torch.device("meta"):
            model = GPT.from_config(GPTConfig.from_depth(12)).set_compute_dtype(torch.bfloat16)
        memory = training_memory(model, MuonAdamW.for_model(model), rows=8, seq_len=2048)
        print(f"{memory.total / 2**30:.1f} GiB")
        ```
    """
    step = MeasuredStep(model, optimizer, device_type=device_type, loss_fn=loss_fn)
    return step.memory(rows=rows, seq_len=seq_len, accumulate=accumulate)


class MeasuredStep:
    """A model and its optimizer on the meta device, whose step can be measured again and again.

    Args:
        model: As for `training_memory`, like the others.
        optimizer: Its optimizer.
        device_type: Where it is going to train.
        loss_fn: The loss.

    Attributes:
        model: The copy, whose settings may be changed between measurements.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, device_type: str | None = None, loss_fn: LossOf | None = None
    ) -> None:
        model = getattr(model, "_orig_mod", model)
        own = next(model.parameters()).device.type
        self.device_type = device_type or ("cuda" if own == "meta" else own)
        self.model, self._optimizer = _on_meta(model, optimizer)
        set_matmul_precision(self.model, None)
        _use_kernels_of(self._optimizer, self.device_type)
        head = getattr(self.model, "head", None)
        if isinstance(head, LMHead):  # which would take that of a GPU on the meta device
            head.chunk_tokens = head.chunk_size(torch.device(self.device_type))
        self._loss_fn = loss_fn or _own_loss
        self._tensors = [*self.model.parameters(), *self.model.buffers()]
        self._trained = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.weights = sum(_unique_bytes(self._tensors))
        self.gradients = sum(parameter.nbytes for parameter in self._trained)
        self.optimizer, self._optimizer_work = self._measured_update()

    def memory(self, *, rows: int, seq_len: int, accumulate: bool) -> TrainingMemory:
        """Measure a step with micro-batches of this size."""
        if rows < 1 or seq_len < 1:
            raise ConfigError(f"memory is planned for at least one row of one token, not {rows=} of {seq_len=}.")
        ids = torch.empty(rows, seq_len, dtype=torch.int64, device="meta")
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter) if accumulate and parameter.requires_grad else None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        ledger = Ledger([*self._tensors, *gradients, ids], block=_BLOCK.get(self.device_type, _GPU_BLOCK))
        self.model.train()
        with ledger, KernelsOf(self.device_type), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            try:
                total = self._loss_fn(self.model, Batch(ids, ids))[0]
                middle, kept = ledger.mark(), ledger.alive()
                _backward(total / 2)
            except ConfigError:
                raise
            except Exception as error:  # what a model of somebody's own does there, nobody knows
                raise ConfigError(f"the memory of this model cannot be planned: {_first_line(error)}") from None
        overhead = self._overhead(ledger)
        booked = ledger.numbers_of(p.grad for p in self.model.parameters() if p.grad is not None)
        whole = self.gradients
        for grad, size in [] if accumulate else self._unwritten(rows * seq_len):
            ledger.shrink(grad, size)
            whole -= size  # unless the step scales its gradients, to clip them or as targets are masked
        static = self.weights + self.optimizer
        moments = [
            (name, *ledger.highest(start, end))
            for name, start, end in (("forward", 0, middle), ("backward", middle, ledger.mark()))
        ]
        name, peak, alive = max(moments, key=lambda moment: moment[1])
        there = self.gradients if accumulate else sum(size for number, size in alive.items() if number in booked)
        activations = sum(size for number, size in alive.items() if number in kept)
        temporaries = peak - activations - (0 if accumulate else there)
        if peak + (self.gradients if accumulate else 0) < whole + self._optimizer_work:
            name, there, activations, temporaries = "optimizer", whole, 0, self._optimizer_work
        for parameter in self.model.parameters():
            parameter.grad = None
        return TrainingMemory(
            self.weights,
            there,
            static - self.weights,
            activations,
            temporaries,
            overhead,
            name,
        )

    def _unwritten(self, num_tokens: int) -> list[tuple[Tensor, int]]:
        """Return gradients of trained tables with the bytes of each that rows without a token do not take on a CPU."""
        trained = {id(parameter) for parameter in self._trained}
        tables = [module for module in self.model.modules() if isinstance(module, RowTable)]
        uses = Counter(id(p) for module in self.model.modules() for p in module.parameters(recurse=False))
        return [
            (table.weight.grad, table.unwritten_gradient(num_tokens))
            for table in tables
            if self.device_type == "cpu" and table.weight.grad is not None
            if id(table.weight) in trained and uses[id(table.weight)] == 1
        ]

    def _overhead(self, ledger: Ledger) -> int:
        if self.device_type != "cpu":
            return 0
        return _CPU_LIBRARIES + int(_CPU_KEPT_BACK * ledger.allocated(*_CPU_KEPT_SIZES))

    def _measured_update(self) -> tuple[int, int]:
        """Return the bytes of the optimizer's state, and of what an update takes for a moment."""
        for parameter in self._trained:
            parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        ledger = Ledger([*self._tensors, *gradients], block=_BLOCK.get(self.device_type, _GPU_BLOCK))
        with ledger, torch.no_grad():
            try:
                self._optimizer.step()
            except Exception as error:
                raise ConfigError(f"the memory of this optimizer cannot be planned: {_first_line(error)}") from None
            state, start = sum(ledger.alive().values()), ledger.mark()
            self._optimizer.step()
        peak, _ = ledger.highest(start, ledger.mark())
        return state, peak - state


def _backward(loss: Tensor) -> None:
    """Do what `loss.backward()` does, which would leave `KernelsOf` outside: recomputed blocks need it as well."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _own_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    loss = getattr(model, "loss", None)
    if not callable(loss):
        raise ConfigError(f"a {type(model).__name__} has no method loss: give the loss_fn that it is trained with.")
    total, count = loss(batch.inputs, batch.targets)
    return total, count


def _on_meta(model: nn.Module, optimizer: Optimizer) -> tuple[Any, Optimizer]:
    """Return copies on the meta device; nothing is copied but shapes."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        memo[id(parameter.grad)] = None
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    memo[id(optimizer.state)] = defaultdict(dict)  # counted from the first update on
    try:
        copied: tuple[Any, Optimizer] = copy.deepcopy((model, optimizer), memo)
        # A copy of an optimizer lacks what its class adds. Not functions: a scheduler puts the own `step` there.
        own = {k: v for k, v in vars(optimizer).items() if k not in vars(copied[1]) and not callable(v)}
        copied[1].__dict__.update(copy.deepcopy(own, memo))
    except Exception as error:
        raise ConfigError(f"the memory of this model cannot be planned, it cannot be copied: {error}") from None
    return copied


def _use_kernels_of(optimizer: Optimizer, device_type: str) -> None:
    """Let torch's optimizers update as they would on a device: on a GPU many tensors at once, which takes more."""
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused") and device_type == "cuda":
            group["foreach"] = True
        for name in ("fused", "capturable"):  # refused on the meta device
            if group.get(name):
                group[name] = False


def _unique_bytes(tensors: list[Tensor]) -> Iterator[int]:
    yield from {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
