"""Which class of transformers computes exactly what a model does, and its config and names of weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinygpt.errors import ConfigError
from tinygpt.interop.huggingface._structure import MLP_TYPES, Structure
from tinygpt.layers import ReluSquaredMLP
from tinygpt.model import GPTConfig

DEFAULT_EPS = torch.finfo(torch.float32).eps
_SIMPLE_ONLY = ("value_embeddings", "residual_scales", "x0_scales", "smear", "backout")


@dataclass(frozen=True)
class Family:
    """One class of transformers and what it can express.

    Attributes:
        architecture: Name of the class.
        model_type: Its `model_type`.
        activations: Its `hidden_act` for each of our feed-forward layers that it has.
        qk_norm: `"none"`; `"plain"` for a norm of queries and keys without weights; `"weighted"` for one with.
        nanochat: Whether it is nanochat's: norms without weights, one after the embedding, a soft cap, and rotation
            clockwise.
        windows: Whether layers may have a window.
    """

    architecture: str
    model_type: str
    activations: dict[str, str]
    qk_norm: str = "none"
    nanochat: bool = False
    windows: bool = False


LLAMA = Family("LlamaForCausalLM", "llama", {"swiglu": "silu"})
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", {"swiglu": "silu"}, qk_norm="weighted", windows=True)
ARCEE = Family("ArceeForCausalLM", "arcee", {"relu_squared": "relu2", "gelu": "gelu"})
NANOCHAT = Family(
    "NanoChatForCausalLM", "nanochat", {"relu_squared": "relu2", "gelu": "gelu"}, qk_norm="plain", nanochat=True
)
FAMILIES = (LLAMA, QWEN3, ARCEE, NANOCHAT)


class StockMatch(NamedTuple):
    """Whether a class of transformers computes exactly what a model does.

    Attributes:
        architecture: Name of the class, such as `LlamaForCausalLM`; `None` if there is none.
        reasons: For each class that does not fit, why not.
    """

    architecture: str | None
    reasons: dict[str, tuple[str, ...]]


def stock_architecture(config: GPTConfig, *, mlp: type = ReluSquaredMLP) -> StockMatch:
    """Return which class of transformers gives the same logits as a model, or why none does.

    Weights are renamed, and rows of the query and key projections swapped where the rotation turns the other way;
    nothing is approximated. Value embeddings, scales, smear and backout exist in no class.

    Args:
        config: The model's config.
        mlp: Class of its feed-forward layers.

    Returns:
        The first class that fits, of Llama, Qwen3, Arcee and NanoChat, and what speaks against the others.

    Raises:
        ConfigError: If `mlp` is not a feed-forward layer of `tinygpt.layers`.

    Example:
        ```python
        from tinygpt import GPTConfig
        from tinygpt.interop.huggingface import stock_architecture
        from tinygpt.layers import SwiGLU

        plain = dict(value_embeddings=False, residual_scales=False, x0_scales=False, smear=False, backout=False)
        config = GPTConfig(embedding_norm=False, qk_norm=False, soft_cap=None, **plain)
        print(stock_architecture(config, mlp=SwiGLU).architecture)  # LlamaForCausalLM
        print(stock_architecture(GPTConfig()).reasons["LlamaForCausalLM"])
        ```
    """
    if mlp not in MLP_TYPES:
        allowed = ", ".join(kind.__name__ for kind in MLP_TYPES)
        raise ConfigError(f"mlp={getattr(mlp, '__name__', mlp)!r} is not one of {allowed}.")
    kind = MLP_TYPES[mlp]
    return match(Structure(config, (kind,) * config.num_layers, (config.hidden_dim or 4 * config.dim,), tied=False))


def match(structure: Structure) -> StockMatch:
    """Return the first family that fits, and what speaks against the others."""
    reasons = {family.architecture: tuple(_reasons(family, structure)) for family in FAMILIES}
    fitting = next((name for name, why in reasons.items() if not why), None)
    return StockMatch(fitting, {name: why for name, why in reasons.items() if why})


def family_of(architecture: str) -> Family:
    """Return the family of a class."""
    return next(family for family in FAMILIES if family.architecture == architecture)


def _reasons(family: Family, structure: Structure) -> Iterator[str]:
    config = structure.config
    for name in _SIMPLE_ONLY:
        if getattr(config, name):
            yield f"it has no {name}"
    if not config.rotary:
        yield "it always rotates queries and keys, and rotary=False does not"
    if len(set(structure.mlp_types)) > 1 or len(set(structure.hidden_dims)) > 1:
        yield "its feed-forward layers are alike in all blocks"
    elif structure.mlp_types[0] not in family.activations:
        yield f"its feed-forward layers cannot be {structure.mlp_types[0]}"
    if config.embedding_norm != family.nanochat:
        yield "it normalizes the embedding" if family.nanochat else "it has no embedding_norm"
    if config.norm_weight and family.nanochat:
        yield "its norms have no weights"
    if config.soft_cap is not None and not family.nanochat:
        yield "it has no soft_cap"
    if config.qk_norm != (family.qk_norm != "none"):
        yield "it has no qk_norm" if config.qk_norm else "it always has a qk_norm"
    elif config.qk_norm and family.qk_norm == "plain" and config.qk_scale != 1.0:
        yield f"it has no qk_scale, which is {config.qk_scale}"
    if any(window is not None for window in layer_windows(config)) and not family.windows:
        yield "its layers have no window"


def layer_windows(config: GPTConfig) -> list[int | None]:
    """Return the window of each layer, `None` also where it reaches over the whole context."""
    windows = [config.window_tokens(layer) for layer in range(config.num_layers)]
    return [None if window is None or window >= config.max_seq_len - 1 else window for window in windows]


def stock_config(family: Family, structure: Structure) -> dict[str, Any]:
    """Return the fields of the family's `config.json` that describe the model."""
    config = structure.config
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": structure.hidden_dims[0],
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "hidden_act": family.activations[structure.mlp_types[0]],
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps or DEFAULT_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "tie_word_embeddings": structure.tied,
        "pad_token_id": None,  # here it would freeze a row of the table; generation_config.json names one
    }
    if family.nanochat:
        return {**fields, "final_logit_softcapping": config.soft_cap}
    fields["head_dim"] = config.head_dim
    if family.windows:
        windows = layer_windows(config)
        short = next((window for window in windows if window is not None), None)
        fields["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        fields["use_sliding_window"] = short is not None
        fields["sliding_window"] = None if short is None else short + 1  # theirs counts the token itself
    else:
        fields["mlp_bias"] = False
    return fields


def stock_names(family: Family, num_layers: int, *, tied: bool, gated: bool) -> dict[str, str]:
    """Return our name of each weight by theirs; norms of nanochat have none."""
    names = {"model.embed_tokens.weight": "embedding.weight"}
    if not tied:
        names["lm_head.weight"] = "head.weight"
    if family.nanochat:
        parts = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    else:
        names["model.norm.weight"] = "final_norm.weight"
        parts = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
        parts |= {f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
        if not gated:
            del parts["mlp.gate_proj"]
    parts |= {f"self_attn.{name}": f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    for layer in range(num_layers):
        for theirs, ours in parts.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blocks.{layer}.{ours}.weight"
    return names


def qk_norm_names(num_layers: int) -> list[str]:
    """Return the names of the weights of Qwen3's query and key norms, which are our one `qk_scale`."""
    return [f"model.layers.{layer}.self_attn.{name}_norm.weight" for layer in range(num_layers) for name in "qk"]


def stock_weights(family: Family, structure: Structure, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as the family wants them, rows of padding left out."""
    config = structure.config
    gated = structure.mlp_types[0] == "swiglu"
    result = {}
    for theirs, ours in stock_names(family, config.num_layers, tied=structure.tied, gated=gated).items():
        # A norm without a weight is one with a weight of ones.
        tensor = weights[ours] if ours in weights else torch.ones(config.dim)
        if ours in ("embedding.weight", "head.weight"):
            tensor = tensor[: config.vocab_size]
        elif ours.endswith(("q_proj.weight", "k_proj.weight")) and config.rope_clockwise != family.nanochat:
            tensor = _swap_halves(tensor, config.head_dim)
        result[theirs] = tensor
    if family.qk_norm == "weighted":
        result |= {name: torch.full((config.head_dim,), config.qk_scale) for name in qk_norm_names(config.num_layers)}
    return result


def _swap_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Swap the two halves of every head's channels, which turns a rotation by an angle into one by minus the angle."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[-1]).flip(1).reshape(weight.shape)
