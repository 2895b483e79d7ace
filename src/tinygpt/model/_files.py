"""Reading and writing a model's two files."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.manifest import MANIFEST_FILE, check_manifest, check_tensor_file, read_json
from tinygpt.model._config import GPTConfig
from tinygpt.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_FORMAT_VERSION = 1
_DTYPES = ("F32", "BF16", "F16", "F64")
# Tables that are computed and not saved, such as the rotary ones, are bounded by no file: a config could ask for any.
_MAX_TABLE_BYTES = 2**30


def write_model(folder: Path, config: GPTConfig, blocks: list[str], weights: dict[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors`; an existing one is replaced only when the new one is whole.

    Args:
        folder: Where.
        config: The model's config.
        blocks: What `describe_blocks` said of the model's blocks.
        weights: By name; a copy if the model is trained meanwhile.

    Raises:
        CheckpointError: If they cannot be written.
    """
    try:
        _write_model(folder, config, blocks, weights)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"the model could not be written into {folder}: {why}.") from error


def _write_model(folder: Path, config: GPTConfig, blocks: list[str], weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS_FILE}.tmp"
    save_file(independent_tensors(weights), temporary, {"format": "pt"})
    temporary.replace(folder / WEIGHTS_FILE)
    fields = {"model_type": "tinygpt", "format_version": _FORMAT_VERSION, **config.model_dump(), "blocks": blocks}
    temporary = folder / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / CONFIG_FILE)


def check_device(device: torch.device | str) -> torch.device:
    """Return the device, after putting an empty tensor there.

    Raises:
        ConfigError: If torch has no such device here.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={device!r} cannot be used here ({reason}); take 'cpu', or 'cuda' with a GPU."
        ) from None
    return checked


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `ConfigError` if this is no dtype that weights can have; `None` leaves them as they are."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype {dtype!r} is not a floating-point dtype; use torch.bfloat16 for example.")


def check_tokenizer(tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Refuse a tokenizer that does not go with a model.

    Raises:
        ConfigError: If it is none of this library's kind, or has more ids than the model.
    """
    if not all(hasattr(tokenizer, name) for name in ("vocab_size", "bos_token_id", "encode_batch", "save")):
        raise ConfigError(
            f"tokenizer={tokenizer!r:.80} is no tinygpt.tokenizer.Tokenizer; load_tokenizer(folder) gives one."
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size="
            f"{config.vocab_size}: give the tokenizer the model was trained with."
        )


def independent_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory, as the file format wants: tied weights are copied."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return result


def read_config(folder: Path) -> GPTConfig:
    """Read `config.json` as `save_pretrained` writes it; in a checkpoint both model files are checked by their hash.

    Raises:
        CheckpointError: If it is missing or not a tinygpt config of a known version.
    """
    path = folder / CONFIG_FILE
    if not path.exists() and (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder} is a run, not a model; load one of the folders in {folder / 'checkpoints'}.")
    if not path.exists() and any(folder.glob("model_*.pt")):
        raise CheckpointError(f"{folder} is of nanochat; read it with tinygpt.interop.nanochat.load_checkpoint.")
    if (folder / MANIFEST_FILE).exists():
        check_manifest(folder, only=(CONFIG_FILE, WEIGHTS_FILE))
    return parse_config(path, read_json(path))


def parse_config(path: Path, fields: dict[str, Any]) -> GPTConfig:
    """Return the config that the fields of a `config.json` describe.

    Raises:
        CheckpointError: If it is not a tinygpt config of a known version.
    """
    fields = dict(fields)
    if fields.pop("model_type", None) != "tinygpt":
        raise CheckpointError(
            f'{path} is not the config of a tinygpt model (no "model_type": "tinygpt"); '
            "tinygpt.interop.huggingface.from_transformers reads some of transformers'."
        )
    fields.pop("blocks", None)
    version = fields.pop("format_version", None)
    if version != _FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this tinygpt reads version {_FORMAT_VERSION}.")
    try:
        return GPTConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def describe_blocks(blocks: Iterable[nn.Module]) -> list[str]:
    """Return the classes of each block and its parts, such as `Block(attention=CausalSelfAttention, mlp=SwiGLU)`."""
    described = []
    for wrapped in blocks:
        block = getattr(wrapped, "_orig_mod", wrapped)
        parts = ", ".join(f"{name}={type(part).__name__}" for name, part in block.named_children())
        described.append(f"{type(block).__name__}({parts})")
    return described


def check_blocks(folder: Path, blocks: list[str]) -> None:
    """Compare the classes of a model's blocks with those that were saved: weights of equal shape would not tell.

    Raises:
        CheckpointError: If a block was saved with other parts.
    """
    saved = read_json(folder / CONFIG_FILE).get("blocks", blocks)
    if not isinstance(saved, list) or len(saved) != len(blocks):
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: it does not describe {len(blocks)} blocks.")
    for layer, (was, now) in enumerate(zip(saved, blocks, strict=True)):
        if was != now:
            raise CheckpointError(
                f"{folder} was saved with block {layer} = {was}, and this model has {now}. "
                "A model built with parts of your own needs the same parts to load: from_pretrained(..., mlp=...)."
            )


def load_weights(model: nn.Module, path: Path, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Give a model built on the meta device the weights of a file, after its header proved to fit.

    Raises:
        CheckpointError: If the file is missing or damaged, or names, shapes or dtypes do not fit.
    """
    weights = read_weights(path, {name: tensor.shape for name, tensor in model.state_dict().items()})
    if os.name == "nt":
        # Elsewhere weights on the CPU stay mapped from the file until they are touched. Windows could not replace a
        # mapped file, as saving into the same folder does.
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    tables = {name: b for name, b in model.named_buffers() if name not in weights}
    if sum(b.numel() * b.element_size() for b in tables.values()) > _MAX_TABLE_BYTES + path.stat().st_size:
        shapes = ", ".join(f"{name} {tuple(b.shape)}" for name, b in tables.items())
        raise CheckpointError(f"{path.parent} describes tables larger than any model's of its size: {shapes}.")
    # Tables that are not saved, such as those of the rotary embedding, are computed again.
    for prefix, module in model.named_modules():
        names = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)]
        if any(name not in weights for name in names):
            module.to_empty(device=device, recurse=False)
            getattr(module, "reset_parameters", lambda: None)()
    model.load_state_dict(
        {name: tensor.to(device, dtype) for name, tensor in weights.items()}, strict=True, assign=True
    )


def read_weights(path: Path, expected: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Read a safetensors file after its header proved to hold exactly the expected names and shapes."""
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: torch.Size(part.get_shape()) for name, part in slices.items()}
            if odd := {name: d for name, part in slices.items() if (d := part.get_dtype()) not in _DTYPES}:
                raise CheckpointError(f"{path} holds weights of dtypes other than {', '.join(_DTYPES)}: {odd}.")
            _compare(path, found, expected)
            return {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from None


def _compare(path: Path, found: dict[str, torch.Size], expected: dict[str, torch.Size]) -> None:
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"it lacks {_some(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"the model has no {_some(extra)}")
    shapes = [
        f"{name} is {tuple(found[name])}, the model's {tuple(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if shapes:
        problems.append(_some(shapes))
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(problems)}. "
            "A model built with parts of your own needs the same parts to load: from_pretrained(..., mlp=...)."
        )


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
