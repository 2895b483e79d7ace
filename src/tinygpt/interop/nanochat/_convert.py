"""From nanochat's config and weights to ours, and what its versions differ by."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.interop.nanochat._names import rename
from tinygpt.model import GPTConfig

_NUMBERS = {
    "sequence_len": "max_seq_len",
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "n_embd": "dim",
}
_MOST = {"n_layer": 1_000, "sequence_len": 2**20}
_CONSTANTS = ("rope_base", "qk_scale", "soft_cap", "short_window_tokens", "value_gate_scale")
_LAMBDAS = ("resid_lambdas", "x0_lambdas")
_SMEAR = ("smear_gate.weight", "smear_lambda", "backout_lambda")
_VOCAB_MULTIPLES = (64, 1, 2, 4, 8, 16, 32, 128, 256, 512, 1024)
_SMEAR_CHANNELS = 24
_EARLY_GATE_CHANNELS = 32


class _Version(NamedTuple):
    """What a version computes with and does not write down."""

    rope_base: float
    qk_scale: float
    short_window: Callable[[int], int]  # of the length of a sequence
    value_gate_channels: int
    value_gate_scale: float


def _share_in_tiles(parts: int) -> Callable[[int], int]:
    """Return the function to a share of the sequence, rounded up to a multiple of 128."""
    return lambda length: -(-length // (128 * parts)) * 128


_UNTIL_MARCH_2026 = _Version(10_000.0, 1.0, lambda length: length // 2, _EARLY_GATE_CHANNELS, 2.0)
_MARCH_2026 = _Version(100_000.0, 1.15, _share_in_tiles(3), 12, 3.0)  # no smear yet: until 14 March
_SINCE_SMEAR = _Version(100_000.0, 1.2, _share_in_tiles(4), 12, 3.0)


def convert_state_dict(
    state_dict: Mapping[str, Tensor], config_dict: Mapping[str, Any], **constants: float | None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Turn the weights and the `model_config` of a nanochat checkpoint into ours.

    Which parts a model has is read off the names of its weights, and with them the version of nanochat, since
    each brought new ones: residual and x0 lambdas in January 2026, value embeddings with gates of 32 channels soon
    after, gates of 12 in early March, smear and backout on 14 March. What a version only has in its code follows:

    | weights | `rope_base` | `qk_scale` | `short_window_tokens` | `value_gate_scale` |
    |---|---|---|---|---|
    | with smear and backout | 100,000 | 1.2 | a quarter of the sequence, up to a multiple of 128 | 3 |
    | gates of 12 channels, no smear | 100,000 | 1.15 | a third, up to a multiple of 128 | 3 |
    | older | 10,000 | 1.0 | half | 2 |

    `soft_cap` is 15, and a config without `window_pattern` means full attention. Code that was changed by hand
    cannot be told from the files: give its constants then.

    Args:
        state_dict: nanochat's names to tensors; the prefix `_orig_mod.` of a compiled model is taken off.
        config_dict: `model_config` of the metadata.
        **constants: `rope_base`, `qk_scale`, `soft_cap` (`None` for no cap), `short_window_tokens` and
            `value_gate_scale`, as in `GPTConfig`, where the checkpoint's code had others than its version.

    Returns:
        The config, and the weights under our names. Tensors are not copied and keep their dtypes; rows that pad the
        vocabulary are kept too.

    Raises:
        CheckpointError: If a key of either is missing or unknown, parts are there by halves, a shape does not
            fit, something is not a tensor, or a number is out of range.
        ConfigError: If a constant is not one of these or out of range.

    References:
        [nanochat](https://github.com/karpathy/nanochat), whose names these are. Its rotation is ours with
        `rope_clockwise=True`.

    Example:
        ```python no-run: needs a checkpoint
        config, weights = convert_state_dict(torch.load("model_087000.pt", weights_only=True), model_config)
        model = GPT.from_config(config)
        model.load_state_dict(weights)
        ```
    """
    tensors = _checked_tensors(state_dict)
    numbers = _checked_numbers(config_dict)
    layers = numbers["num_layers"]
    has_lambdas = _whole_set(tensors, _LAMBDAS)
    has_smear = _whole_set(tensors, _SMEAR)
    value_layers = [layer for layer in range(layers) if layer % 2 == (layers - 1) % 2]
    value_parts = [f"{part}.weight" for n in value_layers for part in (f"value_embeds.{n}", _gate(n))]
    has_values = _whole_set(tensors, value_parts)
    if (has_smear and not has_values) or (has_values and not has_lambdas):
        raise CheckpointError(
            "no version of nanochat wrote these parts together: smear came after value embeddings, and those after "
            f"lambdas; here smear is {has_smear}, value embeddings {has_values}, lambdas {has_lambdas}."
        )
    has_narrow_gates = has_values and tensors[f"{_gate(value_layers[0])}.weight"].shape[-1:] != (_EARLY_GATE_CHANNELS,)
    version = _SINCE_SMEAR if has_smear else _MARCH_2026 if has_narrow_gates else _UNTIL_MARCH_2026
    known: dict[str, Any] = {"rope_base": version.rope_base, "qk_scale": version.qk_scale, "soft_cap": 15.0}
    if has_values:
        known |= {"value_gate_channels": version.value_gate_channels, "value_gate_scale": version.value_gate_scale}
    if "S" in numbers["window_pattern"]:
        known["short_window_tokens"] = version.short_window(numbers["max_seq_len"])
    if unknown := sorted(set(constants) - set(_CONSTANTS)):
        raise ConfigError(
            f"{', '.join(unknown)} cannot be given; {', '.join(_CONSTANTS)} can, the rest is in the files."
        )
    parts: dict[str, Any] = {
        "residual_scales": has_lambdas,
        "x0_scales": has_lambdas,
        "value_embeddings": has_values,
        "smear": has_smear,
        "backout": has_smear,
        "vocab_multiple": _vocab_multiple(tensors, numbers["vocab_size"]),
    }
    try:
        config = GPTConfig(**numbers, **parts, **known)
    except ConfigError as error:
        raise CheckpointError(f"the model_config of this checkpoint cannot be built: {error}") from None
    config = config.replace(**constants)
    _compare(tensors, expected_shapes(config))
    return config, rename(tensors)


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that nanochat saves of such a model."""
    dim, rows = config.dim, config.padded_vocab_size
    kv_heads = config.num_kv_heads or config.num_heads
    kv_dim = kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (rows, dim), "lm_head.weight": (rows, dim)}
    if config.residual_scales:
        shapes |= dict.fromkeys(_LAMBDAS, (config.num_layers,))
    if config.smear:
        shapes |= {"smear_gate.weight": (1, _SMEAR_CHANNELS), "smear_lambda": (1,), "backout_lambda": (1,)}
    for layer in range(config.num_layers):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.attn.{name}.weight": (dim, dim) for name in ("c_q", "c_proj")}
        shapes |= {f"{block}.attn.{name}.weight": (kv_dim, dim) for name in ("c_k", "c_v")}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * dim, dim), f"{block}.mlp.c_proj.weight": (dim, 4 * dim)}
        if config.has_value_embedding(layer):
            shapes[f"value_embeds.{layer}.weight"] = (rows, kv_dim)
            shapes[f"{_gate(layer)}.weight"] = (kv_heads, config.value_gate_channels)
    return shapes


def _gate(layer: int) -> str:
    return f"transformer.h.{layer}.attn.ve_gate"


def _checked_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError(f"a state dict maps names to tensors; got {type(state_dict).__name__} without any.")
    tensors: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = str(key).removeprefix("_orig_mod.")
        if name in tensors:
            raise CheckpointError(f"the state dict holds {name} twice, with and without the prefix _orig_mod.")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{name} is {kind}; the weights of a model are dense floating-point tensors.")
        tensors[name] = tensor.detach()
    return tensors


def _checked_numbers(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the config under our names; types are checked here, ranges by `GPTConfig`."""
    if not isinstance(config_dict, Mapping):
        raise CheckpointError(f"model_config is a {type(config_dict).__name__}; it must map names to numbers.")
    if missing := [name for name in _NUMBERS if name not in config_dict]:
        raise CheckpointError(f"model_config lacks {', '.join(missing)}.")
    if unknown := sorted(map(str, set(config_dict) - {*_NUMBERS, "window_pattern"})):
        raise CheckpointError(
            f"model_config has {', '.join(unknown)}, which nanochat does not; a model of changed code cannot be "
            "loaded unless that code is the same without it: then take it out of the config and use convert_state_dict."
        )
    for name in _NUMBERS:
        value = config_dict[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"model_config has {name}={value!r}; it must be a positive integer.")
    for name, most in _MOST.items():  # what no tensor's shape confirms, or what is counted through before
        if config_dict[name] > most:
            raise CheckpointError(f"model_config has {name}={config_dict[name]}; at most {most:,} are built.")
    pattern = config_dict.get("window_pattern", "L")
    if not isinstance(pattern, str) or not re.fullmatch("[SLsl]+", pattern):
        raise CheckpointError(f"model_config has window_pattern={pattern!r}; it must be a text of the letters S and L.")
    return {ours: config_dict[name] for name, ours in _NUMBERS.items()} | {"window_pattern": pattern.upper()}


def _whole_set(tensors: Mapping[str, Tensor], names: list[str] | tuple[str, ...]) -> bool:
    """Return whether all of these are there; some of them without the others are refused."""
    absent = [name for name in names if name not in tensors]
    if absent and len(absent) < len(names):
        present = next(name for name in names if name in tensors)
        raise CheckpointError(f"the weights have {present} and lack {_some(absent)}: they belong together.")
    return not absent


def _vocab_multiple(tensors: Mapping[str, Tensor], vocab_size: int) -> int:
    """Return what the rows of the tables are a multiple of: 64, 1 as in 2025, or what else the code was told."""
    table = tensors.get("transformer.wte.weight")
    rows = 0 if table is None or table.ndim != 2 else len(table)
    fitting = (n for n in _VOCAB_MULTIPLES if -(-vocab_size // n) * n == rows)
    return next(fitting, _VOCAB_MULTIPLES[0])  # if none fits, the tables are refused with all that does not


def _compare(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"the weights lack {_some(missing)}")
    if unknown := [name for name in tensors if name not in expected]:
        problems.append(f"nothing is known of {_some(unknown)}")
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} and must be {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        problems.append(_some(wrong))
    if problems:
        raise CheckpointError(f"weights and model_config do not fit: {'; '.join(problems)}.")


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
