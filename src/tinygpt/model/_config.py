"""The numbers that name a standard GPT."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from tinygpt._numbers import check_whole
from tinygpt.config import Config
from tinygpt.errors import ConfigError

# Bounds that no model of this kind reaches, so that a damaged or hostile config is refused before memory is asked for.
Positive = Annotated[int, Field(ge=1, le=2**20)]
Length = Annotated[int, Field(ge=1, le=2**24)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GPTConfig(Config):
    """The standard model in numbers; `GPT.from_config` builds it. The defaults are the documented 12-layer run.

    Args:
        vocab_size: Number of token ids.
        max_seq_len: Longest sequence, in tokens.
        num_layers: Blocks.
        num_heads: Query heads of each attention.
        num_kv_heads: Key/value heads, shared by groups of query heads; `None` for as many as `num_heads`.
        dim: Width of the residual stream.
        hidden_dim: Width of the feed-forward layers; `None` for `4 * dim`.
        vocab_multiple: Rows of the token tables and the head are rounded up to a multiple of this.
        window_pattern: One letter a layer, repeated over the depth: `L` sees the whole context, `S` a short window. The
            last layer is always `L`.
        short_window_tokens: Tokens before its own that a layer `S` sees; `None` for a quarter of `max_seq_len`
            rounded up to a multiple of 128.
        rotary: Whether queries and keys are rotated by position.
        rope_base: Base of the rotation.
        rope_clockwise: Sign of the rotation, see `RotaryEmbedding`.
        qk_norm: Whether queries and keys are normalized.
        qk_scale: Factor on both after their norm.
        norm_weight: Whether norms have learned weights.
        norm_eps: Added under the root in every norm; `None` for the machine epsilon of the dtype. Llama takes 1e-5.
        embedding_norm: Whether the embedding is normalized before the first block.
        value_embeddings: Whether every second layer, the last included, adds a value embedding.
        value_gate_channels: Leading channels of its input that the gate of a value embedding reads, at most `dim`.
        value_gate_scale: What that gate can reach.
        residual_scales: Whether each block scales its input by a learned scalar.
        x0_scales: Whether each block adds a learned share of the embedding.
        smear: Whether each embedding is mixed with the one before it.
        backout: Whether a learned share of the mid-depth stream is taken out at the end.
        soft_cap: Bound on the magnitude of logits; `None` for none.

    Raises:
        ConfigError: If a field is out of range or two do not fit together.

    Example:
        ```python
        from tinygpt import GPTConfig

        config = GPTConfig.from_depth(12)
        plain = config.replace(smear=False, backout=False, value_embeddings=False)
        ```
    """

    vocab_size: Length = 32_768
    max_seq_len: Length = 2_048
    num_layers: Annotated[int, Field(ge=1, le=1_000)] = 12
    num_heads: Positive = 6
    num_kv_heads: Positive | None = None
    dim: Positive = 768
    hidden_dim: Positive | None = None
    vocab_multiple: Positive = 64
    window_pattern: Annotated[str, Field(pattern="^[SL]+$")] = "L"
    short_window_tokens: Positive | None = None
    rotary: bool = True
    rope_base: PositiveFloat = 100_000.0
    rope_clockwise: bool = True
    qk_norm: bool = True
    qk_scale: PositiveFloat = 1.2
    norm_weight: bool = False
    norm_eps: PositiveFloat | None = None
    embedding_norm: bool = True
    value_embeddings: bool = True
    value_gate_channels: Positive = 12
    value_gate_scale: PositiveFloat = 3.0
    residual_scales: bool = True
    x0_scales: bool = True
    smear: bool = True
    backout: bool = True
    soft_cap: PositiveFloat | None = 15.0

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not divisible by num_heads={self.num_heads}.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            allowed = [str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                f"choose one of {', '.join(allowed)}."
            )
        if self.rotary and self.head_dim % 2:
            raise ValueError(f"rotary needs an even head width; dim={self.dim} / num_heads={self.num_heads} is odd.")
        return self

    @classmethod
    def from_depth(cls, depth: int, *, head_dim: int = 128, width_per_layer: int = 64, **fields: Any) -> Self:
        """Return the config of the nanochat family with this many layers: width grows with depth.

        Args:
            depth: Layers.
            head_dim: Width of a head; `dim` is rounded up to a multiple of it.
            width_per_layer: `dim` is this times `depth`, before rounding.
            **fields: Other fields, as they are.

        Raises:
            ConfigError: If a number is not positive or a field is wrong.
        """
        check_whole(depth=depth, head_dim=head_dim, width_per_layer=width_per_layer)
        if depth < 1 or head_dim < 1 or width_per_layer < 1:
            raise ConfigError(f"from_depth needs positive numbers, got {depth=}, {head_dim=}, {width_per_layer=}.")
        num_heads = -(-depth * width_per_layer // head_dim)
        return cls(**{"num_layers": depth, "dim": num_heads * head_dim, "num_heads": num_heads, **fields})

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token tables and of the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window_tokens(self, layer: int) -> int | None:
        """Return how many tokens before its own this layer sees; `None` for all."""
        if layer == self.num_layers - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L":
            return None
        return self.short_window_tokens or -(-self.max_seq_len // 4 // 128) * 128

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether this layer adds a value embedding: every second one, counted back from the last."""
        return self.value_embeddings and layer % 2 == (self.num_layers - 1) % 2
