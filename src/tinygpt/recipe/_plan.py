"""What a recipe would do and need, before anything is read or allocated."""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tinygpt import hardware
from tinygpt.data import Batch
from tinygpt.errors import ConfigError
from tinygpt.memory import MemoryPlan, plan_memory, training_memory
from tinygpt.metrics import gpu_name
from tinygpt.recipe._build import make_model, make_phase, resolve_device, run_phases, trainer_config
from tinygpt.recipe._data import vocab_size
from tinygpt.trainer import Trainer, resolve_precision

if TYPE_CHECKING:
    from tinygpt.recipe._recipe import Recipe

# Of a GPU's memory, the larger of the two: about 400 MiB for the CUDA context and its kernels, the rest for a desktop
# and what the allocator cannot put together again. A guess on the safe side.
_RESERVE, _RESERVED_SHARE = 2**30, 0.05
# Of a micro-batch. For so many the documented model would take 200 GiB, and a plan minutes.
_MOST_TOKENS = 2**20


@dataclass(frozen=True)
class RunPlan:
    """What training would do and need; `str` gives it as text.

    Attributes:
        parameters: Parameters by role.
        num_parameters: All of them.
        num_steps: Optimizer steps.
        step_tokens: Tokens of a step, outside phases with a batch of their own.
        tokens: Tokens of the whole run.
        flops_per_token: Training FLOPs of a token.
        flops: Of the whole run.
        precision: Dtype of activations and products that the figures are for.
        memory_bytes: Bytes of the largest step as the recipe stands, by what they hold, see `TrainingMemory`.
        memory_budget: Bytes of the GPU that training may take, or those asked about; `None` without either.
        advice: What to train with in that budget; `None` without one.
        reserved: Whether the budget is a GPU's memory less a reserve.
        phases: Name, first step, steps, tokens of a step, and rates at the first and last step, of each phase.
        schedule: The phases with their rates, and what changes between them, as text.
        device_name: The GPU that the time is estimated for.
        mfu: Share of its peak that training is assumed to reach.
        tokens_per_second: The speed at that share; `None` without a GPU.
        seconds: The time estimate of the whole run; evaluation, saving and loading come on top. `None` without a GPU.
    """

    parameters: dict[str, int]
    num_parameters: int
    num_steps: int
    step_tokens: int
    tokens: int
    flops_per_token: int
    flops: int
    precision: str
    memory_bytes: dict[str, int]
    memory_budget: int | None
    advice: MemoryPlan | None
    reserved: bool
    phases: list[dict[str, Any]]
    schedule: str
    device_name: str | None
    mfu: float
    tokens_per_second: float | None
    seconds: float | None

    @property
    def fits(self) -> bool | None:
        """Whether the recipe as it stands fits the budget; `None` without one."""
        return None if self.memory_budget is None else sum(self.memory_bytes.values()) <= self.memory_budget

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and `fits`, as JSON values."""
        return {**asdict(self), "fits": self.fits, "advice": self.advice and self.advice.to_dict()}

    def __str__(self) -> str:
        roles = ", ".join(f"{role.replace('_', ' ')} {count:,}" for role, count in self.parameters.items())
        parts = ", ".join(f"{part} {size / 2**20:,.0f}" for part, size in self.memory_bytes.items())
        lines = [
            f"model     {self.num_parameters:,} parameters: {roles}",
            f"tokens    {self.tokens:,} in {self.num_steps:,} steps, {_ratio(self.tokens / self.num_parameters)} for "
            "each parameter",
            f"memory    about {sum(self.memory_bytes.values()) / 2**20:,.0f} MiB in {self.precision}: {parts}",
            *self._advice_lines(),
            f"compute   {self.flops:.3g} FLOPs, {self.flops_per_token:.3g} a token",
        ]
        if self.seconds is not None and self.tokens_per_second is not None:
            step_seconds = self.step_tokens / self.tokens_per_second
            lines.append(
                f"time      about {_duration(self.seconds)} on one {self.device_name}, if it reaches {self.mfu:.0%} of "
                f"its peak: {self.tokens_per_second:,.0f} tokens a second, {step_seconds:.3g} seconds a step"
            )
        return "\n".join([*lines, self.schedule])

    def _advice_lines(self) -> Iterator[str]:
        if self.memory_budget is None or self.advice is None:
            return
        verdict = "fits" if self.fits else "does not fit"
        budget = f"{self.memory_budget / 2**20:,.0f} MiB"
        where = ""
        if self.reserved and self.device_name is not None:
            left = (hardware.memory_bytes(self.device_name) or 0) - self.memory_budget
            where = f" of the {self.device_name}, {left / 2**20:,.0f} MiB left for others"
        yield f"budget    {budget}{where}: the recipe as it stands {verdict}"
        yield f"advice    {self.advice}"
        if self.advice.fits:
            options = {
                "micro-batch-rows": self.advice.rows,
                "loss-chunk-tokens": self.advice.chunk_tokens,
                "activation-checkpointing": self.advice.activation_checkpointing,
            }
            yield "          " + " ".join(f"--{name} {value}" for name, value in options.items())


class _NoData:
    """What a plan reads from: the shape of the rows and nothing else."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self.rows = rows
        self.seq_len = seq_len

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


def plan_run(recipe: "Recipe", *, device_name: str | None, mfu: float, memory_bytes: int | None = None) -> RunPlan:
    """Plan a recipe; see `Recipe.plan`."""
    if memory_bytes is not None and memory_bytes < 1:
        raise ConfigError(f"memory_bytes={memory_bytes} is no memory to train in.")
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu={mfu} is not a share; choose above 0 and up to 1.")
    # A run keeps its tokenizer: where it came from may be gone by then, and the model tells as much.
    known_size = "vocab_size" in recipe.model.model_fields_set
    recipe = recipe.resolved(recipe.model.vocab_size if known_size else vocab_size(recipe.tokenizer, recipe.data))
    device = resolve_device(recipe.device)
    dtype, kind = resolve_precision(recipe.precision, device), device.type
    if device_name is not None:
        kind = "mps" if device_name.lower().startswith("apple") else "cuda"
        if recipe.precision == "auto":  # as on the device itself: float32 where there are no units for less
            in_16_bits, in_32_bits = (hardware.peak_flops(device_name, each) for each in ("bfloat16", "float32"))
            dtype = torch.float32 if in_16_bits is None and in_32_bits is not None else torch.bfloat16
    precision = str(dtype).removeprefix("torch.")
    if device_name is not None:
        _refuse_unknown(device_name, precision)
    else:
        device_name = gpu_name(device)
    with torch.device("meta"):
        model, optimizer = make_model(recipe.replace(precision=precision), torch.device("meta"))
    # Before memory is measured, which takes longer the more tokens there are: it refuses what does not fit together.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this device is slow; it is none
        trainer = Trainer(
            model,
            optimizer,
            _NoData(recipe.data.rows, recipe.seq_len),
            # "auto" leaves the model in the precision that it was made in.
            trainer_config(recipe, None).replace(
                precision="auto", matmul_precision=None, compile=False, micro_batch_rows=None
            ),
            phases=[make_phase(recipe, phase, None) for phase in run_phases(recipe)],
        )
    micro_batch = _micro_batch(recipe)
    most_tokens = max(phase.batch_tokens or recipe.step_tokens for phase in run_phases(recipe))
    memory = training_memory(
        model,
        optimizer,
        rows=micro_batch,
        seq_len=recipe.seq_len,
        accumulate=most_tokens > micro_batch * recipe.seq_len,
        device_type=kind,
    )
    on_card = hardware.memory_bytes(device_name) if device_name is not None else None
    budget = memory_bytes or (on_card - max(_RESERVE, int(_RESERVED_SHARE * on_card)) if on_card else None)
    advice = None
    if budget is not None:
        advice = plan_memory(
            model,
            optimizer,
            budget_bytes=budget,
            rows=recipe.data.rows,
            seq_len=recipe.seq_len,
            accumulate=True if most_tokens > recipe.data.rows * recipe.seq_len else None,
            device_type=kind,
        )
    phases = _phases(recipe, trainer)
    tokens = sum(phase["step_tokens"] * phase["steps"] for phase in phases)
    flops_per_token = model.flops_per_token(recipe.seq_len)
    peak = None if device_name is None else hardware.peak_flops(device_name, precision)
    speed = None if peak is None else peak * mfu / flops_per_token
    counts = model.num_parameters()
    return RunPlan(
        parameters=counts._asdict(),
        num_parameters=counts.total,
        num_steps=recipe.total_steps,
        step_tokens=recipe.step_tokens,
        tokens=tokens,
        flops_per_token=flops_per_token,
        flops=flops_per_token * tokens,
        precision=precision,
        memory_bytes=memory.parts,
        memory_budget=budget,
        advice=advice,
        reserved=memory_bytes is None and budget is not None,
        phases=phases,
        schedule=trainer.plan(),
        device_name=device_name,
        mfu=mfu,
        tokens_per_second=speed,
        seconds=None if speed is None else tokens / speed,
    )


def _phases(recipe: "Recipe", trainer: Trainer) -> list[dict[str, Any]]:
    phases, first = [], 0
    for phase in run_phases(recipe):
        rates = {"first": trainer.rates.of_lead_at(first), "last": trainer.rates.of_lead_at(first + phase.steps - 1)}
        tokens = phase.batch_tokens or recipe.step_tokens
        phases.append(
            {"name": phase.name, "first_step": first, "steps": phase.steps, "step_tokens": tokens, "rates": rates}
        )
        first += phase.steps
    return phases


def _micro_batch(recipe: "Recipe") -> int:
    """Return the rows that are computed at a time.

    Raises:
        ConfigError: If they have more tokens than are planned for.
    """
    split, rows = recipe.micro_batch_rows, recipe.data.rows
    at_a_time = min(split, rows) if isinstance(split, int) else rows
    if at_a_time * recipe.seq_len > _MOST_TOKENS:
        name = "micro_batch_rows" if isinstance(split, int) and split < rows else "data.rows"
        raise ConfigError(
            f"{name}={at_a_time} of {recipe.seq_len} tokens are {at_a_time * recipe.seq_len:,} at a time, and no more "
            f"than {_MOST_TOKENS:,} are planned for; choose {max(1, _MOST_TOKENS // recipe.seq_len):,} rows or fewer."
        )
    return at_a_time


def _refuse_unknown(device_name: str, precision: str) -> None:
    if hardware.peak_flops(device_name, precision) is not None:
        return
    near = hardware.similar_names(device_name)
    names = ", ".join(map(repr, near or ["RTX 4070", "RTX 4090", "H100 80GB HBM3"]))
    raise ConfigError(
        f"the peak of {device_name!r} in {precision} is not known; give a name as torch has it, such as {names}."
    )


def _ratio(value: float) -> str:
    """Return a number with one place behind the point, a small one with two that count."""
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
