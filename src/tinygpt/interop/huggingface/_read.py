"""The fields of a transformers `config.json` as a `GPTConfig`, or why they do not map."""

from collections.abc import Iterator
from typing import Any

from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.interop.huggingface._export import MODEL_TYPE
from tinygpt.interop.huggingface._stock import ARCEE, LLAMA, NANOCHAT, QWEN3, Family
from tinygpt.model import GPTConfig

# Mistral without a window is Llama under another name.
READABLE: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN3, ARCEE, NANOCHAT)} | {
    "mistral": LLAMA
}

# Fields that add something our parts lack, with the values that mean it is off.
_OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "no_rope_layers": (None,),
    "logit_scale": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
}


def read_stock_config(fields: dict[str, Any], where: str) -> tuple[Family, GPTConfig, str]:
    """Return family, config and kind of feed-forward layer of a checkpoint.

    Raises:
        CheckpointError: Naming the field that has no counterpart here, or is missing.
    """
    model_type = fields.get("model_type")
    family = READABLE.get(str(model_type))
    if model_type == "tinygpt":
        raise CheckpointError(f"{where} is of tinygpt itself; load the folder with GPT.from_pretrained.")
    if family is None:
        known = ", ".join([*READABLE, MODEL_TYPE])
        raise CheckpointError(
            f"{where} has model_type={model_type!r}; those that map onto tinygpt's parts are {known}."
        )
    kinds = {activation: kind for kind, activation in family.activations.items()} | {"swish": "swiglu"}
    try:
        if problem := next(_problems(family, fields), None):
            raise CheckpointError(f"{where} cannot be mapped exactly: {problem}.")
        windows = _window_fields(fields)
        config = GPTConfig(
            vocab_size=fields["vocab_size"],
            max_seq_len=fields["max_position_embeddings"],
            num_layers=fields["num_hidden_layers"],
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields.get("num_key_value_heads"),
            dim=fields["hidden_size"],
            hidden_dim=fields["intermediate_size"],
            vocab_multiple=1,
            rope_base=float(_rope(fields).get("rope_theta", 10_000.0)),
            rope_clockwise=family.nanochat,
            qk_norm=family.qk_norm != "none",
            qk_scale=1.0,
            norm_weight=not family.nanochat,
            norm_eps=float(fields["rms_norm_eps"]),
            embedding_norm=family.nanochat,
            value_embeddings=False,
            residual_scales=False,
            x0_scales=False,
            smear=False,
            backout=False,
            soft_cap=fields["final_logit_softcapping"] if family.nanochat else None,
            **windows,
        )
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the field {error}.") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    return family, config, kinds[fields["hidden_act"]]


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotation, where transformers 5 keeps them or where 4 did.

    Raises:
        ValueError: If they are no JSON object.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(name) or {}, dict):
            raise ValueError(f"{name}={fields[name]!r} is no JSON object.")
    old = {"rope_theta": fields["rope_theta"]} if fields.get("rope_theta") is not None else {}
    return {**old, **(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}


def _problems(family: Family, fields: dict[str, Any]) -> Iterator[str]:
    for name, off in _OFF.items():
        if fields.get(name) not in off:
            yield f"{name}={fields[name]!r} is not supported"
    rope = _rope(fields)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or not set(rope) <= {"rope_type", "type", "rope_theta"}:
        yield f"rope_parameters (rope_scaling) of type {kind!r} change the angles: {rope}"
    allowed = [*family.activations.values(), *(("swish",) if "swiglu" in family.activations else ())]
    if fields.get("hidden_act") not in allowed:
        yield f"hidden_act={fields.get('hidden_act')!r} is not {' or '.join(sorted(allowed))}"
    heads, head_dim = fields.get("num_attention_heads"), fields.get("head_dim", 128 if family is QWEN3 else None)
    fits = isinstance(heads, int) and isinstance(head_dim, int) and head_dim * heads == fields.get("hidden_size")
    if head_dim is not None and not fits:
        yield f"head_dim={head_dim} times num_attention_heads={heads} is not hidden_size={fields.get('hidden_size')}"


def _window_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that say which layers have a window.

    Raises:
        ValueError: If the last layer has one, which `GPTConfig` cannot say, or the fields do not fit together.
    """
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    if window is None or window >= fields["max_position_embeddings"]:
        return {}
    kinds = fields.get("layer_types") or ["sliding_attention"]  # all of them
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {sorted(unknown)}; full_attention and sliding_attention map.")
    if kinds[-1] == "sliding_attention":
        raise ValueError(f"sliding_window={window} also holds for the last layer, which always sees all here.")
    if len(kinds) != fields["num_hidden_layers"]:
        raise ValueError(f"layer_types has {len(kinds)} entries for num_hidden_layers={fields['num_hidden_layers']}.")
    pattern = "".join("S" if kind == "sliding_attention" else "L" for kind in kinds)
    return {"window_pattern": pattern, "short_window_tokens": window - 1}


def read_own_config(fields: dict[str, Any], where: str) -> tuple[GPTConfig, list[str], list[int]]:
    """Return the config, kinds and widths of feed-forward layers of a folder that export wrote.

    Raises:
        CheckpointError: If a field is missing or wrong.
    """
    try:
        config = GPTConfig(**{name: fields[name] for name in GPTConfig.model_fields})
        mlp_types, hidden_dims = list(fields["mlp_types"]), list(fields["hidden_dims"])
        if not len(mlp_types) == len(hidden_dims) == config.num_layers:
            raise ValueError(f"mlp_types and hidden_dims must have num_layers={config.num_layers} entries.")
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the field {error}.") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    return config, mlp_types, hidden_dims
