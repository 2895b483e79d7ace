"""Choosing rows, chunk and checkpointing for the memory there is."""

from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from tinygpt.errors import ConfigError
from tinygpt.layers import Block, LMHead
from tinygpt.memory._estimate import LossOf, MeasuredStep, TrainingMemory
from tinygpt.model import GPT, ActivationCheckpointing


@dataclass(frozen=True)
class MemoryPlan:
    """What to train with in a budget.

    Attributes:
        rows: Rows of a micro-batch.
        chunk_tokens: Tokens whose logits exist at a time; `None` where the model has no `LMHead`.
        activation_checkpointing: What `GPT.set_activation_checkpointing` takes.
        memory: What that needs.
        budget_bytes: What there is.
        fits: Whether it fits. If not, this is the leanest there is.
    """

    rows: int
    chunk_tokens: int | None
    activation_checkpointing: ActivationCheckpointing
    memory: TrainingMemory
    budget_bytes: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the `total` of the memory."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''}"
        chunk = "" if self.chunk_tokens is None else f", chunks of {self.chunk_tokens:,} tokens"
        again = {"none": "nothing recomputed"}.get(
            self.activation_checkpointing, f"activation_checkpointing={self.activation_checkpointing!r}"
        )
        chosen = f"{rows} a micro-batch{chunk}, {again}: {self.memory.total / 2**20:,.0f} MiB"
        budget = f"{self.budget_bytes / 2**20:,.0f} MiB"
        if self.fits:
            return f"{chosen} of {budget}"
        return f"nothing fits {budget}; the least is {chosen}. {self.why}"

    @property
    def why(self) -> str:
        """Why nothing fits, and what would help; empty if something does."""
        if self.fits:
            return ""
        parts = self.memory.parts
        fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "overhead"))
        if fixed > self.budget_bytes:
            return (
                f"Weights, gradients and optimizer alone take {fixed / 2**20:,.0f} MiB: take a smaller model, or "
                "bfloat16 for the token tables."
            )
        return "Take shorter rows, a smaller vocabulary or a smaller model."


def plan_memory(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    budget_bytes: int,
    rows: int,
    seq_len: int,
    accumulate: bool | None = None,
    device_type: str | None = None,
    choose_settings: bool = True,
    loss_fn: LossOf | None = None,
) -> MemoryPlan:
    """Choose the fastest way to train in a budget of bytes.

    What costs least speed is given up first. Chunks of the loss shrink to a quarter; then rows are halved; only then is
    something computed again in the backward pass, the feed-forward layers' hidden layer and at last whole blocks.

    Args:
        model: On any device; it is not changed.
        optimizer: Its optimizer.
        budget_bytes: What there is: `available_memory(device)` plus what weights and optimizer take already, or the
            memory of a card less a reserve.
        rows: Rows to begin with, such as those of the loader.
        seq_len: Tokens of a row.
        accumulate: Whether a step adds up several micro-batches; `None` for when rows are fewer than these.
        device_type: As for `training_memory`.
        choose_settings: Whether chunk and checkpointing may be chosen too; else they stay as the model has them.
        loss_fn: As for `training_memory`.

    Raises:
        ConfigError: As from `training_memory`, or if the budget is not positive.

    Example:
        ```python
        import torch
        from tinygpt import GPT, GPTConfig
        from tinygpt.memory import plan_memory
        from tinygpt.optim import MuonAdamW

        with torch.device("meta"):
            model = GPT.from_config(GPTConfig.from_depth(4)).set_compute_dtype(torch.bfloat16)
        plan = plan_memory(model, MuonAdamW.for_model(model), budget_bytes=2 * 2**30, rows=8, seq_len=2048)
        print(plan)
        ```
    """
    if budget_bytes < 1:
        raise ConfigError(f"budget_bytes={budget_bytes} is no memory to train in.")
    step = MeasuredStep(model, optimizer, device_type=device_type, loss_fn=loss_fn)
    chunks = _chunks(model, step.device_type, choose_settings)

    def planned(mode: ActivationCheckpointing, fewer: int, chunk: int | None) -> MemoryPlan:
        if isinstance(step.model, GPT):
            step.model.set_activation_checkpointing(mode)
            if isinstance(step.model.head, LMHead):
                step.model.head.chunk_tokens = chunk
        gathered = fewer < rows if accumulate is None else accumulate
        memory = step.memory(rows=fewer, seq_len=seq_len, accumulate=gathered)
        return MemoryPlan(fewer, chunk, mode, memory, budget_bytes, memory.total <= budget_bytes)

    leanest: list[MemoryPlan] = []
    for mode in _modes(step.model, choose_settings):
        options = [(mode, fewer, chunk) for fewer in _halved(rows) for chunk in chunks]
        all_rows, fewer_rows = options[: len(chunks)], options[len(chunks) :]
        found = []
        for option in all_rows:
            found.append(planned(*option))
            if found[-1].fits:
                return found[-1]
        if fewer_rows:  # none of which takes less than the last
            found.append(planned(*fewer_rows[-1]))
            if found[-1].fits:
                return next((plan for option in fewer_rows[:-1] if (plan := planned(*option)).fits), found[-1])
        leanest += found
    return min(leanest, key=lambda plan: plan.memory.total)


def _modes(model: nn.Module, may_choose: bool) -> tuple[ActivationCheckpointing, ...]:
    if not isinstance(model, GPT):
        return ("none",)
    if not may_choose:
        return (model.activation_checkpointing,)
    return tuple(mode for mode in get_args(ActivationCheckpointing) if mode != "mlp" or _all_ours(model))


def _all_ours(model: GPT) -> bool:
    return all(isinstance(block, Block) for block in model.blocks)


def _halved(rows: int) -> list[int]:
    found = [rows]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def _chunks(model: nn.Module, device_type: str, may_choose: bool) -> list[int | None]:
    """Return the tokens of a chunk to try, the fastest first; smaller ones add up the head's gradient too often."""
    head = getattr(model, "head", None)
    if not isinstance(head, LMHead):
        return [None]
    first = head.chunk_size(torch.device(device_type))
    may_choose = may_choose and head.chunk_tokens is None
    return [first, first // 2, first // 4] if may_choose and first >= 1024 else [first]
