"""What a recipe would do and need, before anything is read or allocated."""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tinygpt.data import Batch
from tinygpt.errors import ConfigError
from tinygpt.hardware import peak_flops
from tinygpt.memory import training_memory
from tinygpt.recipe._build import make_model, make_phase, resolve_device, run_phases, trainer_config
from tinygpt.recipe._data import vocab_size
from tinygpt.trainer import Trainer, resolve_precision

if TYPE_CHECKING:
    from tinygpt.recipe._recipe import Recipe


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
        memory_bytes: Estimated bytes of a step by what they hold, see `TrainingMemory`.
        phases: Name, first step, steps, tokens of a step, and rates at the first and last step, of each phase.
        schedule: The phases with their rates, and what changes between them, as text.
        device_name: The GPU that the time is estimated for.
        mfu: Share of its peak that training is assumed to reach.
        seconds: The time estimate; evaluation, saving and loading come on top. `None` without a GPU.
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
    phases: list[dict[str, Any]]
    schedule: str
    device_name: str | None
    mfu: float
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        roles = ", ".join(f"{role.replace('_', ' ')} {count:,}" for role, count in self.parameters.items())
        parts = ", ".join(f"{part} {size / 2**20:,.0f}" for part, size in self.memory_bytes.items())
        lines = [
            f"model     {self.num_parameters:,} parameters: {roles}",
            f"tokens    {self.tokens:,} in {self.num_steps:,} steps, {self.tokens / self.num_parameters:.1f} for each "
            "parameter",
            f"memory    about {sum(self.memory_bytes.values()) / 2**20:,.0f} MiB in {self.precision}, without what the "
            f"allocator keeps back: {parts}",
            f"compute   {self.flops:.3g} FLOPs, {self.flops_per_token:.3g} a token",
        ]
        if self.seconds is not None:
            lines.append(
                f"time      about {_duration(self.seconds)} on one {self.device_name}, if it reaches {self.mfu:.0%} of "
                "its peak"
            )
        return "\n".join([*lines, self.schedule])


class _NoData:
    """What a plan reads from: the shape of the rows and nothing else."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self.rows = rows
        self.seq_len = seq_len

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


def plan_run(recipe: "Recipe", *, device_name: str | None, mfu: float) -> RunPlan:
    """Plan a recipe; see `Recipe.plan`."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu={mfu} is not a share; choose above 0 and up to 1.")
    # A run keeps its tokenizer: where it came from may be gone by then, and the model tells as much.
    known_size = "vocab_size" in recipe.model.model_fields_set
    recipe = recipe.resolved(recipe.model.vocab_size if known_size else vocab_size(recipe.tokenizer, recipe.data))
    device = resolve_device(recipe.device)
    known = device_name is not None
    if device_name is None and device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    dtype = resolve_precision(recipe.precision, device)
    if known and recipe.precision == "auto":
        dtype = torch.bfloat16
    precision = str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        model, optimizer = make_model(recipe.replace(precision=precision), torch.device("meta"))
    memory = training_memory(model, optimizer, rows=recipe.data.rows, seq_len=recipe.seq_len)
    config = trainer_config(recipe, None).replace(precision="float32", matmul_precision=None, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this device is slow; it is none
        trainer = Trainer(
            model,
            optimizer,
            _NoData(recipe.data.rows, recipe.seq_len),
            config,
            phases=[make_phase(recipe, phase, None) for phase in run_phases(recipe)],
        )
    phases, tokens, first = [], 0, 0
    for phase in run_phases(recipe):
        each = phase.batch_tokens or recipe.step_tokens
        last = first + phase.steps - 1
        rates = {name: trainer.rates.of_lead_at(step) for name, step in (("first", first), ("last", last))}
        phases.append(
            {"name": phase.name, "first_step": first, "steps": phase.steps, "step_tokens": each, "rates": rates}
        )
        tokens += each * phase.steps
        first = last + 1
    flops_per_token = model.flops_per_token(recipe.seq_len)
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
        memory_bytes=memory._asdict(),
        phases=phases,
        schedule=trainer.plan(),
        device_name=device_name,
        mfu=mfu,
        seconds=_seconds(flops_per_token * tokens, device_name, precision, mfu, required=known),
    )


def _seconds(flops: int, device_name: str | None, precision: str, mfu: float, *, required: bool) -> float | None:
    peak = None if device_name is None else peak_flops(device_name, precision)
    if peak is None and required:
        raise ConfigError(
            f"the peak of {device_name!r} in {precision} is not known; give a name as torch has it, such as "
            "'RTX 4070', 'RTX 4090' or 'H100 80GB HBM3'."
        )
    return None if peak is None else flops / (peak * mfu)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
