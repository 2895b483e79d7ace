"""A GPT trained with tinygpt, for transformers 5 or newer. This file needs torch and transformers, not tinygpt.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs it. `config.json` beside it says which
parts the model has; `model.safetensors` holds the weights under tinygpt's own names. MIT license, the tinygpt authors.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# A model of one layer; `config.json` of a real one names every field.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 257,
    "padded_vocab_size": 320,  # rows of the token tables and of the head
    "max_seq_len": 128,
    "dim": 64,
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "mlp_types": ["relu_squared"],  # of each layer: relu_squared, gelu or swiglu
    "hidden_dims": [256],  # width of each feed-forward layer
    "layer_windows": [None],  # how many tokens before its own each layer sees, None for all
    "value_embedding_layers": [0],
    "value_gate_channels": 12,  # leading channels that the gate of a value embedding reads
    "value_gate_scale": 3.0,  # what that gate can reach
    "smear_gate_channels": 24,  # and those that the gate of the smear reads
    "rotary": True,
    "rope_base": 100_000.0,
    "rope_clockwise": True,
    "qk_norm": True,
    "qk_scale": 1.2,
    "norm_weight": False,
    "norm_eps": None,  # None for the machine epsilon
    "embedding_norm": True,
    "residual_scales": True,
    "x0_scales": True,
    "smear": True,
    "backout": True,
    "soft_cap": 15.0,
}


class TinyGPTConfig(PretrainedConfig):
    """What the parts were built with, under the names of tinygpt's `GPTConfig` where it has the field."""

    model_type = "tinygpt_transformers"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(self, **kwargs: Any) -> None:
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, copy.copy(default)))
        super().__init__(**kwargs)


class TinyGPTNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps)` over the last axis, times a weight if there is one."""

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim)) if config.norm_weight else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(..., dim)`."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class TinyGPTMLP(nn.Module):
    """One of the three feed-forward layers."""

    def __init__(self, config: TinyGPTConfig, layer: int) -> None:
        super().__init__()
        hidden_dim, self.kind = config.hidden_dims[layer], config.mlp_types[layer]
        if self.kind not in ("relu_squared", "gelu", "swiglu"):
            raise ValueError(f"mlp_types[{layer}]={self.kind!r} is not relu_squared, gelu or swiglu.")
        if self.kind == "swiglu":
            self.gate_proj = nn.Linear(config.dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every position: `(batch, seq, dim)` -> same shape."""
        if self.kind == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        hidden = self.up_proj(x)
        return self.down_proj(F.gelu(hidden) if self.kind == "gelu" else F.relu(hidden).square())


class TinyGPTAttention(nn.Module):
    """Causal attention with grouped key/value heads, QK norm after the rotation, a window and a value embedding."""

    def __init__(self, config: TinyGPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.dim // config.num_heads
        self.window = config.layer_windows[layer]
        self.score_scale = self.head_dim**-0.5 * (config.qk_scale**2 if config.qk_norm else 1.0)
        kv_dim = config.num_kv_heads * self.head_dim
        self.value_embedding = None
        if layer in config.value_embedding_layers:
            self.value_embedding = nn.Embedding(config.padded_vocab_size, kv_dim)
            self.value_gate = nn.Linear(config.value_gate_channels, config.num_kv_heads, bias=False)
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        input_ids: Tensor,
        angles: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Attend: `(batch, seq, dim)` -> same shape, to be added to the residual stream."""
        batch, seq, _ = x.shape
        q, k, v = (
            projection(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.value_embedding is not None:
            gate = torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features])) * self.config.value_gate_scale
            extra = self.value_embedding(input_ids).view(batch, seq, -1, self.head_dim).transpose(1, 2)
            v = v + gate.transpose(1, 2)[..., None] * extra
        if angles is not None:
            q, k = _rotate(q, angles, self.config.rope_clockwise), _rotate(k, angles, self.config.rope_clockwise)
        if self.config.qk_norm:
            eps = self.config.norm_eps
            q, k = F.rms_norm(q, (self.head_dim,), eps=eps), F.rms_norm(k, (self.head_dim,), eps=eps)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mask = _mask(seq, k.shape[2], self.window, attention_mask, q.device)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and seq == k.shape[2],
            scale=self.score_scale,
            enable_gqa=self.config.num_kv_heads != self.config.num_heads,
        )
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))


def _rotate(x: Tensor, angles: Tensor, clockwise: bool) -> Tensor:
    """Rotate channel `i` with channel `i + head_dim / 2`; angles are `(batch, seq, head_dim / 2)`."""
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    if clockwise:
        sin = -sin
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _mask(
    q_seq: int, seq: int, window: int | None, attention_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return what each of the last `q_seq` positions sees, `None` where causality alone says it."""
    if window is not None and window >= seq - 1:
        window = None
    if attention_mask is None and window is None and q_seq in (1, seq):
        return None
    query = torch.arange(seq - q_seq, seq, device=device)[:, None]
    key = torch.arange(seq, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (query - key <= window)
    if attention_mask is None:
        return seen
    # A padded position sees itself: a row without any key would be NaN, which spreads even where its weight is zero.
    return (seen & attention_mask[:, None, None, :].bool()) | (key == query)


class TinyGPTBlock(nn.Module):
    """Pre-norm block; its input may be scaled and get a share of the embedding."""

    def __init__(self, config: TinyGPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = TinyGPTNorm(config)
        self.attention = TinyGPTAttention(config, layer)
        self.mlp_norm = TinyGPTNorm(config)
        self.mlp = TinyGPTMLP(config, layer)
        self.residual_scale = nn.Parameter(torch.ones(1)) if config.residual_scales else None
        self.x0_scale = nn.Parameter(torch.zeros(1)) if config.x0_scales else None

    def forward(self, x: Tensor, x0: Tensor, *attention_inputs: Any) -> Tensor:
        """Apply the block: `(batch, seq, dim)` -> same shape."""
        if self.residual_scale is not None:
            x = self.residual_scale * x
        if self.x0_scale is not None:
            x = x + self.x0_scale * x0
        x = x + self.attention(self.attention_norm(x), *attention_inputs)
        return x + self.mlp(self.mlp_norm(x))


class TinyGPTSmear(nn.Module):
    """Add a gated share of the embedding before."""

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.smear_gate_channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Mix two tensors of shape `(batch, seq, dim)`."""
        return x + self.scale * torch.sigmoid(self.gate(x[..., : self.gate.in_features])) * before


class TinyGPTBackout(nn.Module):
    """Take a share of the mid-depth stream out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, middle: Tensor) -> Tensor:
        """Combine two tensors of shape `(batch, seq, dim)`."""
        return x - self.scale * middle


class TinyGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks and head; `forward` and `generate` as in other causal models of transformers."""

    config_class = TinyGPTConfig
    _supports_sdpa = True
    _no_split_modules = ("TinyGPTBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.dim)
        self.embedding_norm = TinyGPTNorm(config) if config.embedding_norm else None
        self.smear = TinyGPTSmear(config) if config.smear else None
        self.blocks = nn.ModuleList(TinyGPTBlock(config, layer) for layer in range(config.num_layers))
        self.backout = TinyGPTBackout() if config.backout else None
        self.final_norm = TinyGPTNorm(config)
        self.head = nn.Linear(config.dim, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token table."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse: value embeddings are tables over the vocabulary as well."""
        raise NotImplementedError(
            "the vocabulary of a tinygpt model cannot be resized; train with more special tokens."
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits, and a loss if there are labels.

        Args:
            input_ids: `(batch, seq)`.
            attention_mask: `(batch, past + seq)`, 0 where padded; `None` for no padding.
            position_ids: `(batch, seq)`; `None` counts from the first position that is not padded.
            past_key_values: A `DynamicCache` of what was read before.
            labels: `(batch, seq)`, usually `input_ids`: they are shifted here; -100 is not trained on.
            use_cache: Whether to return a cache.
            logits_to_keep: How many of the last positions get logits, or which; 0 for all.
            output_attentions: Not supported.
            output_hidden_states: Not supported.
            return_dict: `False` for a tuple.
            **kwargs: Passed to the loss.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("this model returns neither attentions nor hidden states.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError(
                'this model takes a DynamicCache only; leave cache_implementation out or set it to "dynamic".'
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        attention_mask = self._padding(attention_mask, past + input_ids.shape[1])
        x = self.embedding(input_ids)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.smear is not None:
            x = self.smear(x, self._before(x, past, attention_mask, past_key_values))
        angles = self._angles(x, past, attention_mask, position_ids) if self.config.rotary else None
        x0 = middle = x
        for layer, block in enumerate(self.blocks):
            x = block(x, x0, input_ids, angles, attention_mask, past_key_values)
            if layer == len(self.blocks) // 2:
                middle = x
        if self.backout is not None:
            x = self.backout(x, middle)
        x = self.final_norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        x = x if isinstance(kept, int) else x[:, kept]
        logits = F.linear(x, self.head.weight[: self.config.vocab_size]).float()
        if self.config.soft_cap is not None:
            logits = self.config.soft_cap * torch.tanh(logits / self.config.soft_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _padding(self, attention_mask: Tensor | None, seq: int) -> Tensor | None:
        """Return the mask, or `None` if nothing is padded."""
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2 or attention_mask.shape[1] != seq:
            raise ValueError(f"attention_mask must be (batch, {seq}), got {tuple(attention_mask.shape)}.")
        return None if bool(attention_mask.all()) else attention_mask

    def _before(self, x: Tensor, past: int, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Return the embedding before each position: `(batch, seq, dim)`, zero before the first of a text."""
        history = x
        if cache is not None:
            # One more layer of the cache holds the embeddings, so that beams and crops treat them like keys.
            while len(cache.layers) <= len(self.blocks):
                cache.layers.append(DynamicLayer())
            history = cache.update(x[:, None], x[:, None, :, :0], len(self.blocks))[0][:, 0]
        shifted = F.pad(history, (0, 0, 1, 0))[:, past : past + x.shape[1]]
        if attention_mask is not None:
            real = F.pad(attention_mask, (1, 0))[:, past : past + x.shape[1]]
            shifted = shifted * real[..., None].to(x.dtype)
        return shifted

    def _angles(self, x: Tensor, past: int, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return the angle of each position and pair of channels: `(batch or 1, seq, head_dim / 2)` float32."""
        seq = x.shape[1]
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -seq:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + seq, device=x.device)[None]
        head_dim = self.config.dim // self.config.num_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=x.device) / head_dim
        return position_ids.float()[..., None] * (1.0 / self.config.rope_base**exponents)
