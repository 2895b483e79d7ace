"""Checking what a Trainer is made of, where a mistake can still be named."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tinygpt.checkpoint import take_apart
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.tokenizer import Tokenizer
from tinygpt.trainer._batches import fitting
from tinygpt.trainer._config import TrainerConfig
from tinygpt.trainer._phases import Phase

logger = logging.getLogger("tinygpt")


def check_arguments(
    model: Any,
    optimizer: Any,
    loader: Any,
    config: Any,
    tokenizer: Tokenizer | None,
    loss_fn: Any = None,
    on_save: Any = None,
    phases: Any = None,
    schedules: Any = None,
) -> None:
    """Refuse arguments that cannot train together, and log what probably was not meant.

    Raises:
        ConfigError: If one is of the wrong kind, or two do not fit.
    """
    wanted = (("model", model, nn.Module), ("optimizer", optimizer, Optimizer), ("config", config, TrainerConfig))
    for name, value, kind in wanted:
        if not isinstance(value, kind):
            raise ConfigError(
                f"Trainer needs model, optimizer, loader and config in this order; {name} is a {type(value).__name__}, "
                f"not a {kind.__name__}."
            )
    if not hasattr(loader, "__iter__") or isinstance(loader, str):
        raise ConfigError(f"loader is a {type(loader).__name__}; give a BatchLoader or another iterable of Batch.")
    if config.save_every is not None and config.out_dir is None:
        raise ConfigError("save_every needs an out_dir to save into.")
    for name, value in (("loss_fn", loss_fn), ("on_save", on_save)):
        if value is not None and not callable(value):
            raise ConfigError(f"{name} is a {type(value).__name__}, which cannot be called; give a function.")
    if tokenizer is not None and (isinstance(tokenizer, type) or not hasattr(tokenizer, "vocab_size")):
        raise ConfigError(
            f"tokenizer is {tokenizer!r}; give a tokenizer such as ByteTokenizer() or load_tokenizer(folder)."
        )
    if schedules is not None and not isinstance(schedules, Mapping):
        raise ConfigError(
            f"schedules is a {type(schedules).__name__}; give a dict by option, such as {{'lr': constant()}}."
        )
    _check_parameters(model, optimizer)
    if phases is not None and schedules is not None:
        raise ConfigError("phases bring their own schedules; give either phases or schedules.")
    loaders = [loader]
    if phases is not None:
        _check_phases(phases, loader, config)
        loaders += [phase.loader for phase in phases if phase.loader is not None]
    for each in loaders:
        _check_sizes(model, each, tokenizer or getattr(each, "tokenizer", None))
    if config.out_dir is not None:
        _check_state(model, loaders)
    if torch.cuda.is_available() and next(model.parameters()).device.type == "cpu":
        logger.warning("training on the CPU though there is a GPU: call model.to('cuda') before making the optimizer.")


def _check_phases(phases: Any, loader: Any, config: TrainerConfig) -> None:
    if not isinstance(phases, Sequence) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ConfigError("phases must be a list of at least one Phase, such as [Phase(1000, {'lr': constant()})].")
    steps = [phase.steps for phase in phases]
    if sum(steps) != config.num_steps:
        total = f"{' + '.join(map(str, steps))} = {sum(steps)}"
        raise ConfigError(f"the phases have {total} steps and the TrainerConfig num_steps={config.num_steps}.")
    for number, phase in enumerate(phases, start=1):
        reads = loader if phase.loader is None else phase.loader
        rows, seq_len = (getattr(reads, name, None) for name in ("rows", "seq_len"))
        wanted = phase.batch_tokens or config.batch_tokens
        if wanted and rows and seq_len and wanted % (rows * seq_len):
            where = f"phase {number}: " if len(phases) > 1 else ""
            raise ConfigError(
                f"{where}batch_tokens={wanted} is not a multiple of the loader's batch of {rows} x {seq_len} "
                f"= {rows * seq_len} tokens; {fitting(wanted, rows * seq_len)}."
            )


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    if held - own.keys():
        raise ConfigError(
            "the optimizer holds parameters that are not this model's: make it from the model you train, after every "
            "part was put into place."
        )
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if left_out := [name for name in trainable if id(model.get_parameter(name)) not in held]:
        some = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        logger.warning("%d parameters are in no optimizer group and stay as they are: %s", len(left_out), some)


def _check_state(model: nn.Module, loaders: Sequence[Any]) -> None:
    """Refuse what no checkpoint can hold now, and not at the first checkpoint hours later."""
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"the model's state_dict has {name}, a {type(value).__name__}; checkpoints hold tensors alone: "
                "keep it in a buffer."
            )
    for loader in loaders:
        try:
            take_apart({"loader": loader.state_dict()} if hasattr(loader, "state_dict") else {})
        except CheckpointError as error:
            raise ConfigError(f"the state_dict of the {type(loader).__name__} cannot be saved: {error}") from None


def _check_sizes(model: nn.Module, loader: Any, tokenizer: Tokenizer | None) -> None:
    config = getattr(model, "config", None)
    vocab_size, longest = getattr(config, "vocab_size", None), getattr(config, "max_seq_len", None)
    if vocab_size is not None and tokenizer is not None and tokenizer.vocab_size > vocab_size:
        # A GPU would stop in a device assertion that names neither.
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size={vocab_size}: "
            "build the model with vocab_size=tokenizer.vocab_size."
        )
    seq_len = getattr(loader, "seq_len", None)
    if longest is not None and seq_len is not None and seq_len > longest:
        raise ConfigError(f"the loader's rows have seq_len={seq_len}, more than the model's max_seq_len={longest}.")
