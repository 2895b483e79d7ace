"""Reading and writing a model's two files."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.model._config import GPTConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_FORMAT_VERSION = 1


def write_model(folder: Path, config: GPTConfig, weights: dict[str, Tensor]) -> None:
    """Write both files; an existing one is replaced only when the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS_FILE}.tmp"
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, temporary, {"format": "pt"})
    temporary.replace(folder / WEIGHTS_FILE)
    fields = {"model_type": "tinygpt", "format_version": _FORMAT_VERSION, **config.model_dump()}
    temporary = folder / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / CONFIG_FILE)


def read_config(folder: Path) -> GPTConfig:
    """Read `config.json` as `save_pretrained` writes it.

    Raises:
        CheckpointError: If it is missing or not a tinygpt config of a known version.
    """
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(fields, dict) or fields.pop("model_type", None) != "tinygpt":
        raise CheckpointError(f'{path} is not the config of a tinygpt model (no "model_type": "tinygpt").')
    version = fields.pop("format_version", None)
    if version != _FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this tinygpt reads version {_FORMAT_VERSION}.")
    try:
        return GPTConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_weights(path: Path, expected: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Read a safetensors file after its header proved to hold exactly the expected names and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
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
