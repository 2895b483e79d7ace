"""The settings of a training run that are saved with it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tinygpt.config import Config
from tinygpt.model import ActivationCheckpointing
from tinygpt.trainer._compile import Compile

Positive = Annotated[int, Field(ge=1)]


class TrainerConfig(Config):
    """How long to train, in which precision, and what to write where.

    Args:
        num_steps: Optimizer steps of the whole run, those before a resume included.
        batch_tokens: Tokens of one step; a multiple of the loader's batch, which is then one micro-batch of several.
            `None` for one micro-batch a step.
        precision: Dtype of activations and matrix products. `"auto"` takes bfloat16 on a GPU that multiplies it fast
            and float32 elsewhere, and leaves a model alone that was given a compute dtype already.
        matmul_precision: `"fp8"` or `"int8"` to multiply the matrices of the blocks in that while training, as
            `tinygpt.layers.set_matmul_precision` does and explains; `None` in the dtype of the activations.
        grad_clip: Largest norm of the gradient; a larger one is scaled down to it. `None` for no clipping.
        out_dir: Folder for `metrics.jsonl` and `checkpoints/`; `None` writes nothing.
        save_every: Save a checkpoint whenever the number of finished steps is a multiple of this, and at the end;
            `None` saves at the end alone. Needs `out_dir`.
        save_in_background: Copy the state into memory and write it while training goes on; the copy is kept as long
            as the trainer. The last save, and the one on a signal, is waited for.
        keep_last: How many checkpoints to keep, the newest; `None` for all.
        keep_every: Keep those as well whose step is a multiple of this.
        keep_best: Keep as many with the lowest `bpb` as well, of those that `trainer.record("evaluation", bpb=...,
            data_hash=...)` was called for at their step. Only scores on the data measured last are compared.
        compile: Compile with `torch.compile` at the first step: `"block"` or `True` each block, which equal blocks
            share, or a model without `blocks` as one; `"model"` loss and model as one, which takes longer to compile
            and may run a little faster; `"auto"` the `blocks` of a model on CUDA and nothing else. Where there is
            no working compiler training goes on without, after a warning.
        micro_batch_rows: Rows of the loader's batch that are computed at a time; the sum over them is the same up to
            rounding, and what the loader does does not change. `"auto"` takes what `tinygpt.memory` plans for the
            memory that is free, and halves it when memory runs out nevertheless. `None` for all.
        activation_checkpointing: What the backward pass computes again instead of keeping it, see
            `GPT.set_activation_checkpointing`; `None` leaves it as the model has it.

    Raises:
        ConfigError: If a field is out of range.
    """

    num_steps: Positive
    batch_tokens: Positive | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    matmul_precision: Literal["fp8", "int8"] | None = None
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    out_dir: str | Path | None = None
    save_every: Positive | None = None
    save_in_background: bool = True
    keep_last: Positive | None = 3
    keep_every: Positive | None = None
    keep_best: Positive | None = None
    compile: Compile = "auto"
    micro_batch_rows: Positive | Literal["auto"] | None = None
    activation_checkpointing: ActivationCheckpointing | None = None

    @model_validator(mode="after")
    def _something_goes(self) -> Self:
        for name in ("keep_every", "keep_best"):
            if self.keep_last is None and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with keep_last=None, which keeps every checkpoint.")
        return self
