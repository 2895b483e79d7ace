"""From the config's numbers to the standard parts."""

from collections.abc import Callable

from torch import nn

from tinygpt.errors import ConfigError
from tinygpt.layers import Block, CausalSelfAttention, ReluSquaredMLP, RMSNorm, RotaryEmbedding, ValueEmbedding
from tinygpt.model._config import GPTConfig

PartFactory = Callable[[GPTConfig, int], nn.Module]
"""Builds one part of one layer from the config and the index of the layer, counted from 0."""


def check_part(name: str, part: object) -> None:
    """Refuse a part that is no module.

    Raises:
        ConfigError: If it is none.
    """
    if isinstance(part, nn.Module):
        return
    shown = f"{part.__name__}, a class" if isinstance(part, type) else f"{str(part)[:40]!r}, a {type(part).__name__}"
    raise ConfigError(f"{name} is {shown}; each part of a model must be a torch.nn.Module.")


def check_factory(name: str, factory: object) -> None:
    """Refuse a factory that builds nothing; `None` stands for the standard one.

    Raises:
        ConfigError: If it is a part itself, or cannot be called.
    """
    if isinstance(factory, nn.Module):
        kind = type(factory).__name__
        raise ConfigError(
            f"{name} is a {kind} itself, and each layer needs one of its own; give a function that builds it, "
            f"such as lambda config, layer: {kind}(...)."
        )
    if factory is not None and not callable(factory):
        raise ConfigError(f"{name}={factory!r} builds no part; give a function of (config, layer), or None.")


def standard_mlp(config: GPTConfig, layer: int) -> nn.Module:
    """Build the feed-forward layer of the config; it is the same in every layer."""
    return ReluSquaredMLP(config.dim, config.hidden_dim or 4 * config.dim)


def standard_norm(config: GPTConfig) -> RMSNorm:
    """Build a norm of the residual stream."""
    return RMSNorm(config.dim, weight=config.norm_weight, eps=config.norm_eps)


def standard_block(config: GPTConfig, layer: int, attention: nn.Module, mlp: nn.Module) -> nn.Module:
    """Build the block around attention and mlp; its two scalars change linearly with depth, as in nanochat."""
    depth = layer / max(config.num_layers - 1, 1)
    return Block(
        config.dim,
        attention,
        mlp,
        norm_weight=config.norm_weight,
        norm_eps=config.norm_eps,
        residual_scale=1.15 - 0.10 * depth if config.residual_scales else None,
        x0_scale=0.20 - 0.15 * depth if config.x0_scales else None,
    )


class StandardAttention:
    """Factory of the config's attention; the rotary embedding is made once and shared by all layers."""

    def __init__(self, config: GPTConfig) -> None:
        self._rope: RotaryEmbedding | None = None
        if config.rotary:
            self._rope = RotaryEmbedding(
                config.head_dim, config.max_seq_len, base=config.rope_base, clockwise=config.rope_clockwise
            )

    def __call__(self, config: GPTConfig, layer: int) -> nn.Module:
        num_kv_heads = config.num_kv_heads or config.num_heads
        table = None
        if config.has_value_embedding(layer):
            table = ValueEmbedding(config.padded_vocab_size, num_kv_heads * config.head_dim, std=config.dim**-0.5)
        return CausalSelfAttention(
            config.dim,
            config.num_heads,
            num_kv_heads=num_kv_heads,
            rope=self._rope,
            window_tokens=config.window_tokens(layer),
            qk_norm=config.qk_norm,
            qk_scale=config.qk_scale,
            norm_eps=config.norm_eps,
            value_embedding=table,
            value_gate_channels=min(config.value_gate_channels, config.dim),
            value_gate_scale=config.value_gate_scale,
        )
