"""Gathering the state of a run into a checkpoint."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

import tinygpt
from tinygpt.checkpoint import SnapshotMemory, StateSnapshot, save_state, take_apart
from tinygpt.config import Config
from tinygpt.errors import NonFiniteError
from tinygpt.losses import LossFunction
from tinygpt.model import GPT, describe_blocks, independent_tensors, write_model
from tinygpt.schedules import Schedule
from tinygpt.trainer._identity import run_state
from tinygpt.trainer._random import random_state

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

WEIGHTS_FILE = "model.safetensors"


def capture(trainer: "Trainer", memory: SnapshotMemory | None) -> Callable[[Path], Path]:
    """Return a function that writes everything that decides what the run does next into the folder it is given.

    Args:
        trainer: Between two steps.
        memory: Where to copy all tensors, so that the function may be called while training goes on; `None` to call
            it before the next step.

    Raises:
        MemoryError: If there is no memory for the copy.
        NonFiniteError: If a weight is not finite: such a checkpoint could only mislead.
    """
    with torch.no_grad():
        floats = [p for p in trainer.model.parameters() if p.is_floating_point() or p.is_complex()]
        if not math.isfinite(torch.nn.utils.get_total_norm(floats)):
            raise NonFiniteError(f"weights are not finite after step {trainer.next_step - 1}, so they are not saved.")
    model = plain_module(trainer.model)
    state = {
        "next_step": trainer.next_step,
        "tokens": trainer.tokens,
        "elapsed_seconds": trainer.elapsed_seconds,
        "environment": environment(trainer),
        "settings": settings(trainer),
        "model_config": model_config(model),
        "rates": trainer.rates.at(trainer.next_step),
        "loader": loader_state(trainer),
        "optimizer_class": type(trainer.optimizer).__name__,
        "optimizer": trainer.optimizer.state_dict(),
        "random": random_state(),
        "evaluations": trainer.evaluations,
        **run_state(trainer),
    }
    snapshot, weights = take_apart(state), model.state_dict()
    if memory is not None:
        # One call, so that it is known at once whether all of it fits; a weight and a moment may have the same name.
        parts = {"state": snapshot.tensors, "weights": weights}
        copies = memory.copy({f"{part}/{name}": parts[part][name] for part in parts for name in parts[part]})
        snapshot = StateSnapshot(snapshot.document, {name: copies[f"state/{name}"] for name in snapshot.tensors})
        weights = {name: copies[f"weights/{name}"] for name in weights}
    blocks = describe_blocks(model.blocks) if isinstance(model, GPT) else []

    def write_files(folder: Path) -> None:
        if isinstance(model, GPT) and model.config is not None:
            # Blocks that torch.compile wrapped one by one are saved under the names of the blocks.
            named = {name.replace("._orig_mod", ""): tensor for name, tensor in weights.items()}
            write_model(folder, model.config, blocks, named)
        else:
            save_file(independent_tensors(weights), folder / WEIGHTS_FILE)
        if trainer.tokenizer is not None:
            trainer.tokenizer.save(folder)

    return lambda folder: save_state(folder, snapshot, write_files=write_files)


def loader_state(trainer: "Trainer") -> dict[str, Any] | None:
    return trainer.loader.state_dict() if hasattr(trainer.loader, "state_dict") else None


def settings(trainer: "Trainer", step: int | None = None) -> dict[str, Any]:
    """Return what shapes training besides model, data and rates, at a step or the next one."""
    config, course = trainer.config, trainer.course
    step = trainer.next_step if step is None else step
    phase = course.index_at(step)
    tokens = course.step_tokens(phase)
    recomputed = getattr(plain_module(trainer.model), "activation_checkpointing", "none")
    return {
        "num_steps": config.num_steps,
        "tokens of a step": tokens and tokens * getattr(course.loaders[phase], "world_size", 1),
        "grad_clip": config.grad_clip,
        "precision": str(trainer.precision),
        "matmul_precision": config.matmul_precision,
        "loss": loss_name(trainer.loss_fn),
        "micro_batch_rows": trainer.micro_batch_rows,
        "activation_checkpointing": None if recomputed == "none" else recomputed,
        **describe_schedules(trainer.rates.schedules_at(step)),
    }


def describe_schedules(schedules: Mapping[str, Schedule]) -> dict[str, str]:
    """Return how each was built; the default repr of a function names an address, which differs in every process."""
    texts = {f"schedule {key}": repr(schedule) for key, schedule in schedules.items()}
    return {key: "a function" if " at 0x" in text else text for key, text in texts.items()}


def environment(trainer: "Trainer") -> dict[str, Any]:
    return {
        "tinygpt version": tinygpt.__version__,
        "torch version": torch.__version__,
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
    }


def model_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    facts = config.model_dump() if isinstance(config, Config) else {}
    if isinstance(model, GPT):
        facts |= {f"block {layer}": text for layer, text in enumerate(describe_blocks(model.blocks))}
    return facts


def plain_module(model: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile wrapped, whose parameters have their own names."""
    return getattr(model, "_orig_mod", model)


def loss_name(loss_fn: LossFunction) -> str:
    """Return what to call a loss function."""
    return str(getattr(loss_fn, "__name__", type(loss_fn).__name__))
