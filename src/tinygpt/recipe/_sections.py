"""The parts of a recipe: plain values by name, each part a section of the file."""

from inspect import signature
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tinygpt import schedules
from tinygpt.config import Config
from tinygpt.data import OnError, Overflow
from tinygpt.schedules import Schedule

# A bound that no run reaches, so that a slip of the keyboard is refused before anything is computed with it.
Positive = Annotated[int, Field(ge=1, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Filled = Annotated[str, Field(min_length=1)]  # an empty one is a variable that a shell did not have
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]

ScheduleKind = Literal[
    "constant", "linear_warmup", "warmup_stable_decay", "cosine", "muon_momentum", "cosine_weight_decay"
]


class ScheduleRecipe(Config):
    """A schedule of `tinygpt.schedules` by its name, and the arguments that it takes; others are refused.

    Args:
        kind: Name of the function.
        total_steps: Its horizon; `None` for the length of the whole run.
        warmup_steps: Its argument of this name, like all that follow; `None` leaves it out.
        decay_fraction: Share of the horizon that decays.
        decay_steps: Steps that decay.
        start: First value.
        peak: Highest value.
        final: Last value.
        value: The value of a constant.
        shape: Shape of the decay.

    Raises:
        ConfigError: If the schedule does not take an argument, or needs another.
    """

    kind: ScheduleKind
    total_steps: Positive | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_fraction: Share | None = None
    decay_steps: Annotated[int, Field(ge=0)] | None = None
    start: Rate | None = None
    peak: Rate | None = None
    final: Rate | None = None
    value: Rate | None = None
    shape: Literal["linear", "one_minus_sqrt"] | None = None

    @model_validator(mode="after")
    def _takes_them(self) -> Self:
        taken = signature(getattr(schedules, self.kind)).parameters
        if extra := sorted(self.model_dump(exclude={"kind"}, exclude_none=True).keys() - taken.keys()):
            raise ValueError(f"the schedule {self.kind} has no {', '.join(extra)}; it takes {', '.join(taken)}.")
        return self

    def build(self, num_steps: int) -> Schedule:
        """Return the schedule of a run of so many steps.

        Raises:
            ConfigError: If its numbers do not fit together or the run.
        """
        function = getattr(schedules, self.kind)
        arguments = self.model_dump(exclude={"kind"}, exclude_none=True)
        if "total_steps" in signature(function).parameters:
            arguments.setdefault("total_steps", num_steps)
        schedule: Schedule = function(**arguments)
        return schedule


class SchedulesRecipe(Config):
    """The schedules of a run; the defaults are those of the documented one, but for its 40 steps of warm-up.

    A schedule without a `kind` is the default one with other numbers.

    Args:
        lr: Factor on every learning rate.
        momentum: Momentum of the matrices.
        weight_decay: Factor on the weight decay of the matrices.
    """

    lr: ScheduleRecipe = ScheduleRecipe(kind="warmup_stable_decay", decay_fraction=0.65, final=0.05)
    momentum: ScheduleRecipe = ScheduleRecipe(kind="muon_momentum")
    weight_decay: ScheduleRecipe = ScheduleRecipe(kind="cosine_weight_decay")

    @model_validator(mode="before")
    @classmethod
    def _changed_defaults(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        defaults = {name: field.default.model_dump(exclude_none=True) for name, field in cls.model_fields.items()}
        return {
            name: {**defaults[name], **value}
            if name in defaults and isinstance(value, dict) and "kind" not in value
            else value
            for name, value in fields.items()
        }


class PhaseRecipe(Config):
    """A part of a run; what is `None` is as in the whole run.

    Args:
        steps: Optimizer steps of this phase.
        name: What to call it.
        lr: Its schedule, a function of the step of the whole run, as the next two.
        momentum: Momentum of the matrices.
        weight_decay: Factor on the weight decay of the matrices.
        train: Text or token shards to read.
        batch_tokens: Tokens of a step.
        accept: `["schedule"]` if rates may jump where this phase begins.
    """

    steps: Positive
    name: str = ""
    lr: ScheduleRecipe | None = None
    momentum: ScheduleRecipe | None = None
    weight_decay: ScheduleRecipe | None = None
    train: Filled | None = None
    batch_tokens: Positive | None = None
    accept: list[Literal["schedule"]] = Field(default_factory=list)


class TokenizerRecipe(Config):
    """Which tokenizer: that of a folder, or one to train.

    With neither it is the one that made the token shards, or bytes for text.
    In a recipe `tokenizer = "bytes"` and `tokenizer = "some/folder"` are short for the whole section.

    Args:
        folder: A folder that a tokenizer was saved to.
        vocab_size: Train a byte-pair encoding of so many ids on the training text.
        max_characters: Read no more than this to train it.

    Raises:
        ConfigError: If both a folder and a `vocab_size` are given.
    """

    folder: Filled | None = None
    vocab_size: Positive | None = None
    max_characters: Positive = 500_000_000

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.folder is not None and self.vocab_size is not None:
            raise ValueError("folder loads a tokenizer and vocab_size trains one; give one of them.")
        return self


def short_tokenizer(value: Any) -> Any:
    """Return the section that a plain string is short for."""
    if isinstance(value, str):
        return {} if value == "bytes" else {"folder": value}
    return value


TokenizerSection = Annotated[TokenizerRecipe, BeforeValidator(short_tokenizer)]

EMBEDDED = "embedded"


class DataRecipe(Config):
    """What to train and to measure on, and how it becomes rows.

    A path is `"embedded"` for the book that comes with the package, a folder of token shards, or whatever
    `tinygpt.data.open_source` opens: a file, a folder, `hf://datasets/...`. Relative paths start where the command
    runs; the recipe that is saved with a run has absolute ones.

    Args:
        train: Path of the training text; `None` for the embedded book, unless there is a `mixture`.
        mixture: Instead of `train`: a weight for each path, shares of the characters.
        validation: Path of the text to measure on, or a `ValidationSet` saved as `.safetensors`. `None` takes the
            book's own for the book, and a share of the training documents, which are then not trained on, for text.
        held_out: That share.
        validation_tokens: Tokens to measure on, at most; `None` for all.
        text_key: Key of JSON lines, or column of parquet, that holds the text.
        separator: What stands between the documents of a text file; `None` makes each file one.
        on_error: Whether to stop at a document that cannot be read, or to skip and count it.
        rows: Rows of a micro-batch.
        seq_len: Tokens of a row; `None` for the model's `max_seq_len`.
        overflow: What happens to the rest of a document that does not fit, see `BatchLoader`.
        shuffle_seed: Shuffles documents; `None` keeps their order.
        shuffle_documents: Documents shuffled at a time.
        buffer_documents: Documents that packing chooses from.

    Raises:
        ConfigError: If both `train` and `mixture` are given, or a number is out of range.
    """

    train: Filled | None = None
    mixture: dict[Filled, Rate] = Field(default_factory=dict)
    validation: Filled | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    validation_tokens: Positive | None = 524_288
    text_key: str = "text"
    separator: str | None = None
    on_error: OnError = "raise"
    rows: Positive = 8
    seq_len: Positive | None = None
    overflow: Overflow = "carry"
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    shuffle_documents: Positive = 8192
    buffer_documents: Positive = 1000

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.train is not None and self.mixture:
            raise ValueError("train is one source and mixture are several; give one of them.")
        return self


class OptimizerRecipe(Config):
    """Rates of `MuonAdamW` as `tinygpt.optim.nanochat_rules` takes them, at the reference batch of 524,288 tokens.

    Args:
        lr_scale: Factor on all rates and the weight decay for the batch of this run; `None` for the root of its ratio
            to the reference batch, `tinygpt.scaling.lr_factor`.
        matrix_lr: Rate of the matrices.
        embedding_lr: Rate of the token embedding.
        unembedding_lr: Rate of the head.
        scalar_lr: Rate of the scalars.
        weight_decay: Weight decay of the matrices.
        row_equilibration: As in `MuonAdamW`.
        norm_renormalization: As in `MuonAdamW`.
        table_first_moment: `"bfloat16"` halves the first moment of the token and value tables, as in `MuonAdamW`.
        table_second_moment: `"row"` keeps one second moment a row of the token and value tables, which saves memory.
        stochastic_rounding: Of token and value tables that are stored in bfloat16, as in `MuonAdamW`.
    """

    lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    matrix_lr: Rate = 0.02
    embedding_lr: Rate = 0.3
    unembedding_lr: Rate = 0.008
    scalar_lr: Rate = 0.5
    weight_decay: Rate = 0.28
    row_equilibration: bool = False
    norm_renormalization: bool = False
    table_first_moment: Literal["float32", "bfloat16"] = "float32"
    table_second_moment: Literal["element", "row"] = "element"
    stochastic_rounding: bool = False


class SamplesRecipe(Config):
    """Text that the model writes during training, into `metrics.jsonl` and the log.

    Args:
        every: Steps between; `None` for none.
        prompts: What to continue.
        max_new_tokens: Tokens of each.
        temperature: Of the sampling; the seed is the run's.
    """

    every: Positive | None = None
    prompts: list[str] = Field(default_factory=lambda: ["The "])
    max_new_tokens: Positive = 64
    temperature: Rate = 0.8


TrackerName = Literal["mlflow", "tensorboard", "trackio", "wandb"]


class PushRecipe(Config):
    """Where checkpoints are published as they are written.

    Args:
        repo: `user/repo` on the Hugging Face Hub.
        private: Make the repository private.
        license: Identifier such as `"mit"` for its card.
    """

    repo: str
    private: bool = True
    license: str | None = None
