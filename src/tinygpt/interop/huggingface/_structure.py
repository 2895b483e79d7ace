"""What a model is made of, read from its modules: only parts of this library can be written for transformers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.layers import GeluMLP, ReluSquaredMLP, SwiGLU
from tinygpt.manifest import read_json
from tinygpt.model import GPT, GPTConfig

MLP_TYPES: dict[type[nn.Module], str] = {ReluSquaredMLP: "relu_squared", GeluMLP: "gelu", SwiGLU: "swiglu"}
_MLP_CLASSES = {kind.__name__: kind for kind in MLP_TYPES}

# Attributes of modules that do not change logits.
_HARMLESS = {"training", "std", "chunk_tokens", "ignore_index", "padding_idx", "scale_grad_by_freq", "sparse"}


@dataclass(frozen=True)
class Structure:
    """A standard model with one of our feed-forward layers in each block.

    Attributes:
        config: The model's config.
        mlp_types: Kind of each feed-forward layer, as `MLP_TYPES` names them.
        hidden_dims: Width of each.
        tied: Whether the head is the embedding's table.
    """

    config: GPTConfig
    mlp_types: tuple[str, ...]
    hidden_dims: tuple[int, ...]
    tied: bool


def weights_of(model: GPT) -> dict[str, Tensor]:
    """Return the weights by name; blocks that torch.compile wrapped keep the names of the blocks."""
    return {name.replace("._orig_mod", ""): tensor.detach() for name, tensor in model.state_dict().items()}


def structure_of(model: GPT) -> Structure:
    """Describe a model, after comparing every part with the standard one of its config.

    Raises:
        ConfigError: If the model has no config, or a part is not what the config builds; the error names the part.
    """
    if type(model) is not GPT:
        raise ConfigError(f"export needs a GPT or the folder of one, got {type(model).__name__}.")
    if model.config is None:
        raise ConfigError("this GPT was assembled without a config, which export needs: give GPT(config=...).")
    mlps: list[Any] = [unwrapped(getattr(unwrapped(block), "mlp", None)) for block in model.blocks]
    for layer, mlp in enumerate(mlps):
        if type(mlp) not in MLP_TYPES:
            raise _foreign(f"blocks.{layer}.mlp", type(mlp).__name__)
    if len(mlps) != model.config.num_layers:
        raise ConfigError(f"the model has {len(mlps)} blocks and its config says num_layers={model.config.num_layers}.")
    hidden_dims = tuple(mlp.up_proj.out_features for mlp in mlps)
    with torch.device("meta"):
        standard = GPT.from_config(
            model.config, mlp=lambda config, layer: type(mlps[layer])(config.dim, hidden_dims[layer])
        )
    _compare(model, standard)
    tied = model.get_submodule("head").weight is model.get_submodule("embedding").weight
    return Structure(model.config, tuple(MLP_TYPES[type(mlp)] for mlp in mlps), hidden_dims, tied)


def load_exportable(folder: Path) -> GPT:
    """Load a saved model, also one with another of our feed-forward layers, which its config alone does not say.

    Raises:
        ConfigError: If a block was saved with a part that is not ours.
        CheckpointError: If it cannot be loaded.
    """
    path = folder / "config.json"
    blocks = read_json(path).get("blocks") if path.exists() else None
    classes: list[type[nn.Module]] = []
    for layer, block in enumerate(blocks if isinstance(blocks, list) else []):
        name = str(block).rpartition("mlp=")[2].rstrip(")")
        if block != f"Block(attention_norm=RMSNorm, attention=CausalSelfAttention, mlp_norm=RMSNorm, mlp={name})":
            raise _foreign(f"blocks.{layer}", str(block))
        if name not in _MLP_CLASSES:
            raise _foreign(f"blocks.{layer}.mlp", name)
        classes.append(_MLP_CLASSES[name])
    if not classes:
        return GPT.from_pretrained(folder)
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            widths = [file.get_slice(f"blocks.{i}.mlp.up_proj.weight").get_shape()[0] for i in range(len(classes))]
    except (OSError, SafetensorError, IndexError) as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} is missing or damaged: {error}.") from None

    def mlp(config: GPTConfig, layer: int) -> nn.Module:
        if layer >= len(classes):
            raise CheckpointError(
                f"{folder / 'config.json'} lists {len(classes)} blocks for {config.num_layers} layers."
            )
        return classes[layer](config.dim, widths[layer])

    return GPT.from_pretrained(folder, mlp=mlp)


def unwrapped(module: Any) -> Any:
    """Return what torch.compile wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _compare(model: GPT, standard: GPT) -> None:
    expected = dict(_parts(standard))
    found = dict(_parts(model))
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found:
            raise _foreign(name, "missing")
        if name not in expected or type(found[name]) is not type(expected[name]):
            raise _foreign(name, type(found[name]).__name__)
        ours, theirs = _settings(expected[name]), _settings(found[name])
        if different := [
            f"{key}={theirs.get(key)}" for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)
        ]:
            raise _foreign(name, f"{type(found[name]).__name__} with {', '.join(different)}")


def _parts(model: GPT) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if not hasattr(module, "_orig_mod") and module is not model:
            yield name.replace("._orig_mod", ""), module


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what decides the output of a module itself: its plain attributes and the shapes of its weights."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _HARMLESS and isinstance(value, bool | int | float | str | None)
    }
    return plain | {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}


def _foreign(part: str, what: str) -> ConfigError:
    return ConfigError(
        f"{part} is not the part that the model's config builds ({what}); export writes standard models, with "
        "ReluSquaredMLP, GeluMLP or SwiGLU in the blocks. Save this one with save_pretrained instead."
    )
