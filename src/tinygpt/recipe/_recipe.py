"""A whole training run in plain values."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tinygpt import scaling
from tinygpt.config import Config
from tinygpt.errors import ConfigError
from tinygpt.model import ActivationCheckpointing, GPTConfig
from tinygpt.recipe._files import RECIPE_FILE, absolute, read_recipe, with_overrides, write_recipe
from tinygpt.recipe._sections import (
    EMBEDDED,
    DataRecipe,
    OptimizerRecipe,
    PhaseRecipe,
    Positive,
    PushRecipe,
    SamplesRecipe,
    SchedulesRecipe,
    TokenizerRecipe,
    TokenizerSection,
    TrackerName,
)

if TYPE_CHECKING:
    from tinygpt.recipe._build import RecipeRun
    from tinygpt.recipe._plan import RunPlan

# What `GPTConfig.from_depth` takes, and what it decides.
_FAMILY = ("depth", "head_dim", "width_per_layer")
_DECIDED = ("num_layers", "num_heads", "dim")


def _from_depth(value: Any) -> Any:
    """Return the fields of a model section that names a depth."""
    if not isinstance(value, dict) or not value.keys() & set(_FAMILY):
        return value
    if "depth" not in value:
        raise ConfigError("head_dim and width_per_layer say what a depth makes of a model; give depth as well.")
    section = dict(value)
    depth = section.pop("depth")
    if decided := [name for name in _DECIDED if name in section]:
        raise ConfigError(f"depth decides {', '.join(decided)} as well; give either.")
    for name in _FAMILY:
        if type(number := value.get(name, 1)) is not int:
            raise ConfigError(f"{name}={number!r} is not a whole number.")
    return GPTConfig.from_depth(depth, **section)


def _depth_as_overridden(fields: dict[str, Any], overrides: dict[str, str]) -> dict[str, Any]:
    """Return fields in which a depth and what it decides, laid over each other, do not contradict each other."""
    model = fields.get("model")
    names = {name.replace("-", "_").removeprefix("model.") for name in overrides if name.startswith("model.")}
    if not isinstance(model, dict):
        return fields
    if "depth" in names:
        model = {name: value for name, value in model.items() if name not in _DECIDED}
    elif names.intersection(_DECIDED) and not names.intersection(_FAMILY):
        found = _from_depth(model)
        model = found.model_dump(exclude_unset=True) if isinstance(found, GPTConfig) else found
    return {**fields, "model": model}


class Recipe(Config):
    """A whole run in plain values: what a TOML file holds, what is saved with the run, what repeats it.

    A recipe composes the public parts of the library and adds no training logic: `build` calls what you would call.

    Args:
        model: The model. In a recipe `depth = 12`, with `head_dim` and `width_per_layer` if wanted, stands for
            `GPTConfig.from_depth`. A `vocab_size` that is not given is the tokenizer's.
        tokenizer: Section `TokenizerRecipe`, or `"bytes"`, or a folder.
        data: What to train and measure on.
        optimizer: Rates of the groups.
        schedules: How rates change over the run.
        num_steps: Optimizer steps; `None` for the sum of the phases.
        phases: Parts of the run with schedules, data or batch of their own; none for one part.
        batch_tokens: Tokens of a step; `None` for one micro-batch.
        grad_clip: Largest norm of the gradient; `None` for no clipping.
        precision: As in `TrainerConfig`. Where it comes to bfloat16 the token tables are stored in it as well.
        device: `"auto"` for a GPU if there is one, or what torch calls a device, such as `"cuda:1"`.
        matmul_precision: As in `TrainerConfig`.
        compile: As in `TrainerConfig`; unless it is off, the Muon update is compiled on CUDA as well.
        micro_batch_rows: As in `TrainerConfig`: rows of the loader's batch that are computed at a time.
        activation_checkpointing: What the backward pass computes again, see `GPT.set_activation_checkpointing`.
        loss_chunk_tokens: Tokens whose logits exist at a time; `None` for what suits the device.
        seed: Of the first weights and of samples.
        evaluate_every: Steps between evaluations; `None` for one at the end.
        save_every: Steps between checkpoints; `None` for one at the end.
        keep_last: Checkpoints to keep, the newest; `None` for all.
        keep_every: Keep those of multiples of this step as well.
        keep_best: Keep as many with the best evaluations as well.
        samples: Text written during training.
        trackers: Names of `tinygpt.trackers.open_tracker` to send the run's numbers to, under the name of its folder.
        push: Where to publish checkpoints; `None` for nowhere.
        report: Whether to write `report/` into the run's folder at the end.

    Raises:
        ConfigError: If a field is missing, unknown, of the wrong type or out of range, or two do not fit together.

    Example:
        ```python
        from tinygpt.recipe import Recipe

        recipe = Recipe(
            model={"depth": 1, "head_dim": 32, "width_per_layer": 32, "max_seq_len": 64},
            data={"rows": 2},
            num_steps=4,
        )
        print(recipe.plan())
        run = recipe.build("first-run")
        run.fit(progress=False)
        again = Recipe.load("first-run").build("second-run")
        ```
    """

    model: Annotated[GPTConfig, BeforeValidator(_from_depth)] = GPTConfig()
    tokenizer: TokenizerSection = TokenizerRecipe()
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedules: SchedulesRecipe = SchedulesRecipe()
    num_steps: Positive | None = None
    phases: list[PhaseRecipe] = Field(default_factory=list)
    batch_tokens: Positive | None = None
    grad_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    matmul_precision: Literal["fp8", "int8"] | None = None
    device: str = "auto"
    compile: bool | Literal["auto", "block", "model"] = "auto"
    micro_batch_rows: Positive | Literal["auto"] | None = None
    activation_checkpointing: ActivationCheckpointing = "none"
    loss_chunk_tokens: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    evaluate_every: Positive | None = None
    save_every: Positive | None = None
    keep_last: Positive | None = 3
    keep_every: Positive | None = None
    keep_best: Positive | None = None
    samples: SamplesRecipe = SamplesRecipe()
    trackers: list[TrackerName] = Field(default_factory=list)
    push: PushRecipe | None = None
    report: bool = True

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        steps = [phase.steps for phase in self.phases]
        if self.num_steps is None and not steps:
            raise ValueError("a run needs num_steps, or phases that have steps.")
        if self.num_steps is not None and steps and sum(steps) != self.num_steps:
            raise ValueError(
                f"the phases have {' + '.join(map(str, steps))} = {sum(steps)} steps and num_steps={self.num_steps}; "
                "change the steps of a phase, phases.0.steps for example, and leave num_steps out."
            )
        if self.data.seq_len is not None and self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}; "
                "choose shorter rows, or a model with a longer context."
            )
        for place, section in [("schedules", self.schedules), *((f"phases.{i}", p) for i, p in enumerate(self.phases))]:
            for name in ("lr", "momentum", "weight_decay"):
                try:
                    schedule = getattr(section, name)
                    _ = schedule and schedule.build(self.total_steps)
                except ConfigError as error:
                    between = "." if re.match(r"\w+=", str(error)) else ": "  # a field of it, or the whole
                    raise ValueError(f"{place}.{name}{between}{error}") from None
        return self

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        small: bool = False,
        tokens_per_parameter: float = 12.0,
        batch_tokens: int | None = None,
        num_steps: int | None = None,
    ) -> Self:
        """Return the recipe of the documented family for a model of so many layers.

        Args:
            depth: Layers.
            small: Minutes on a CPU: heads of 64, bytes for tokens, rows of 256 and 300 steps. Otherwise the model,
                horizon, batch, rates and weight decay that `tinygpt.scaling.from_depth` gives, for a GPU.
            tokens_per_parameter: Length of the training, if not small.
            batch_tokens: Tokens of a step; `None` for what the rules give.
            num_steps: Optimizer steps; `None` for what the rules give.

        Raises:
            ConfigError: If a number is out of range.

        Example:
            ```python
            from tinygpt.recipe import Recipe

            recipe = Recipe.from_depth(12, batch_tokens=65_536)
            ```
        """
        if small:
            steps = 300 if num_steps is None else num_steps
            batch, warmup, momentum_warmup, lr_scale = batch_tokens or 2_048, 10, 60, 0.5
            model = GPTConfig.from_depth(depth, head_dim=64, max_seq_len=256)
            fields: dict[str, Any] = {"optimizer": {"lr_scale": lr_scale}, "data": {"validation_tokens": 32_768}}
        else:
            plan = scaling.from_depth(depth, tokens_per_parameter=tokens_per_parameter, batch_tokens=batch_tokens)
            steps = plan.num_steps if num_steps is None else num_steps
            batch, warmup, momentum_warmup = plan.batch_tokens, 40, 400
            model = GPTConfig.from_depth(depth)
            fields = {
                "tokenizer": {"vocab_size": model.vocab_size},
                # At most eight rows at a time: what the documented run fits into 12 GB with.
                "data": {"rows": math.gcd(8, max(1, batch // model.max_seq_len)), "overflow": "crop"},
                "optimizer": {"weight_decay": plan.weight_decay / plan.lr_factor},
            }
        interval = max(1, min(1_000, steps // 6))
        fields |= {
            "model": model,
            "schedules": {
                "lr": {"warmup_steps": min(warmup, steps // 10)},
                "momentum": {"warmup_steps": min(momentum_warmup, steps // 4)},
            },
            "batch_tokens": batch,
            "num_steps": steps,
            "evaluate_every": interval,
            "save_every": interval,
            "samples": {"every": interval},
        }
        return cls(**fields)

    @classmethod
    def load(cls, path: str | Path, *, overrides: dict[str, str] | None = None) -> Self:
        """Read a recipe from a file, or the one that a run was made with from the run's folder.

        Args:
            path: A `.toml` or `.json` file, or a `.py` file that sets `recipe = Recipe(...)`, which is executed. A
                folder is a run. TOML has no word for `None`: write `"none"`.
            overrides: Values by dotted name, as text: `{"model.num_layers": "6"}`.

        Raises:
            ConfigError: If it cannot be read or is no recipe; the message names the field.
        """
        fields = read_recipe(Path(path), cls)
        if not fields:
            raise ConfigError(f"{path} is empty; name at least one field, such as num_steps = 500.")
        return cls.from_fields(fields, overrides=overrides, where=str(path))

    @classmethod
    def from_fields(cls, fields: dict[str, Any], *, overrides: dict[str, str] | None = None, where: str = "") -> Self:
        """Check nested fields, with overrides by dotted name laid over them.

        Args:
            fields: As a file holds them.
            overrides: As for `load`.
            where: What an error names as the place.

        Raises:
            ConfigError: If a field or an override is wrong.
        """
        try:
            overrides = overrides or {}
            return cls(**with_overrides(_depth_as_overridden(fields, overrides), overrides, cls))
        except ConfigError as error:
            text = " ".join(str(error).splitlines())  # one line a field: each is a sentence
            raise ConfigError(f"{where}: {text}" if where else text) from None

    def save(self, folder: str | Path) -> Path:
        """Write `recipe.json` into a folder, complete or not at all, and return its path.

        Raises:
            ConfigError: If it cannot be written.
        """
        return write_recipe(Path(folder) / RECIPE_FILE, self.to_json())

    def resolved(self, vocab_size: int) -> Self:
        """Return the recipe with nothing left open that another working directory could change.

        Args:
            vocab_size: Of the tokenizer; for a model section without one.

        Raises:
            ConfigError: If the model has fewer token ids than the tokenizer.
        """
        model = self.model
        if "vocab_size" not in model.model_fields_set:
            model = model.replace(vocab_size=vocab_size)
        if model.vocab_size < vocab_size:
            raise ConfigError(
                f"the tokenizer has {vocab_size} ids, more than model.vocab_size={model.vocab_size}; "
                "leave model.vocab_size out to take the tokenizer's."
            )
        data, tokenizer = self.data, self.tokenizer
        return self.replace(
            model=model,
            num_steps=self.total_steps,
            tokenizer=tokenizer.replace(folder=absolute(tokenizer.folder)),
            data=data.replace(
                train=EMBEDDED if data.train is None and not data.mixture else absolute(data.train),
                mixture={str(absolute(path)): weight for path, weight in data.mixture.items()},
                validation=absolute(data.validation),
                seq_len=data.seq_len or model.max_seq_len,
            ),
            phases=[phase.replace(train=absolute(phase.train)) for phase in self.phases],
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_steps or sum(phase.steps for phase in self.phases)

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.data.seq_len or self.model.max_seq_len

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_tokens or self.data.rows * self.seq_len

    def plan(self, *, device_name: str | None = None, mfu: float = 0.5, memory_bytes: int | None = None) -> "RunPlan":
        """Return what training would do and need; nothing is read but a tokenizer's folder, nothing is allocated.

        Args:
            device_name: A GPU that `tinygpt.hardware` knows, such as `"RTX 4070"`, for the time, and for what to choose
                in its memory.
            mfu: Share of that GPU's peak that training is assumed to reach.
            memory_bytes: Choose for this much memory instead.

        Raises:
            ConfigError: If settings do not fit together, the device is not known, a number is out of range, or a
                micro-batch has more than 1,048,576 tokens.
            DataError: If the tokenizer's folder or the token shards cannot be read.
        """
        from tinygpt.recipe._plan import plan_run

        return plan_run(self, device_name=device_name, mfu=mfu, memory_bytes=memory_bytes)

    def check(self, out_dir: str | Path) -> None:
        """Look whether text and packages are there that a run in this folder needs, before any work is done for it.

        Args:
            out_dir: The run's folder; what a run keeps there is not looked for elsewhere.

        Raises:
            ConfigError: If a mixture has token shards, the folder's name is none that a tracker takes, the license to
                push with is no identifier, or model or device cannot do with `matmul_precision`.
            HubError: If the repository to push to has no name of one.
            DataError: If a source cannot be opened, its first document not be read, or there is none to measure on.
            MissingDependencyError: If a tracker's package is not installed.
        """
        from tinygpt.recipe._build import check_inputs

        check_inputs(self, Path(out_dir))

    def build(self, out_dir: str | Path, *, progress: bool = True) -> "RecipeRun":
        """Make everything that the recipe names, in the order in which one would by hand; torch's seed is set.

        Into the folder go the tokenizer, the frozen validation set, `run.json` and, from `fit`, the resolved recipe, so
        that a run goes on with what it began with whatever becomes of the files it was made from.

        Args:
            out_dir: The run's folder.
            progress: Whether training a tokenizer shows a bar on standard error.

        Raises:
            ConfigError: If settings do not fit together.
            DataError: If text or a tokenizer cannot be read.
            CheckpointError: If the folder belongs to a run with another seed, tokenizer or validation text.
            MissingDependencyError: If a package is needed that is not installed.
        """
        from tinygpt.recipe._build import build_run

        return build_run(self, Path(out_dir), progress=progress)
