"""Causal self-attention with grouped key/value heads, QK norm, a window and value embeddings."""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt._numbers import check_whole, given
from tinygpt.errors import ConfigError
from tinygpt.layers._attend import causal_attention
from tinygpt.layers._kept import is_hooked, made_again, others_choose_what_is_kept, takes_own_backward
from tinygpt.layers._kv_cache import LayerCache
from tinygpt.layers._linear import Linear
from tinygpt.layers._memory import plus_product
from tinygpt.layers._norm import rms_norm, rms_norm_
from tinygpt.layers._rotary import RotaryEmbedding
from tinygpt.layers._row_table import RowTable

_SPLIT_HEADS = "batch seq (heads head_dim) -> batch heads seq head_dim"
_MERGE_HEADS = "batch heads seq head_dim -> batch seq (heads head_dim)"


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position over itself and the positions before it.

    With a value embedding, a second value looked up by token id is added to the projected one, weighted per
    key/value head by `value_gate_scale * sigmoid(gate)`, where the gate is linear in the first channels of the input.

    Args:
        dim: Width of the residual stream.
        num_heads: Query heads; `dim / num_heads` is the width of a head.
        num_kv_heads: Key/value heads, shared by groups of query heads. `None` gives each query head its own.
        rope: Rotary embedding, usually one module shared by all layers. `None` leaves positions out.
        window_tokens: How many tokens before its own a position sees; `None` for all.
        qk_norm: Whether to normalize queries and keys after the rotation.
        qk_scale: Factor on queries and on keys after their norm; 1.2 sharpens attention in nanochat. Ignored without
            `qk_norm`.
        norm_eps: `eps` of that norm, as for `RMSNorm`.
        value_embedding: Table from token ids to `num_kv_heads * head_dim` channels; `None` for none.
        value_gate_channels: Leading channels of the input that the gate of the value embedding reads.
        value_gate_scale: What that gate can reach.

    Raises:
        ConfigError: If the heads do not divide, the table or `rope` has another width, or the gate reads more than
            `dim`.

    References:
        Henry et al., [Query-Key Normalization for Transformers](https://arxiv.org/abs/2010.04245), 2020. Value
        embeddings follow Zhou et al., [Value Residual Learning](https://arxiv.org/abs/2410.17897), 2024, in
        the form of modded-nanogpt and nanochat: one table a layer instead of the first layer's values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rope: RotaryEmbedding | None = None,
        window_tokens: int | None = None,
        qk_norm: bool = True,
        qk_scale: float = 1.2,
        norm_eps: float | None = None,
        value_embedding: nn.Embedding | None = None,
        value_gate_channels: int = 12,
        value_gate_scale: float = 3.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(dim, num_heads, num_kv_heads)
        check_whole(**given(window_tokens=window_tokens))
        head_dim = dim // num_heads
        if rope is not None and getattr(rope, "head_dim", head_dim) != head_dim:
            raise ConfigError(f"{num_heads} heads of {dim=} have {head_dim} channels; rope turns {rope.head_dim}.")
        if window_tokens is not None and window_tokens < 0:
            raise ConfigError(f"window_tokens={window_tokens} is negative; use None for no window.")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.window_tokens = window_tokens
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps
        self.value_gate_scale = value_gate_scale
        # Scaling q and k by s each scales their product by s squared: one number for the kernel, no pass over memory.
        self.score_scale = self.head_dim**-0.5 * (qk_scale**2 if qk_norm else 1.0)
        kv_dim = num_kv_heads * self.head_dim
        # What was made before this layer comes first, so that init_weights draws in the order of construction.
        self.rope = rope
        self.value_embedding = value_embedding
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, kv_dim)
        self.v_proj = Linear(dim, kv_dim)
        self.o_proj = Linear(dim, dim)
        self.value_gate: Linear | None = None
        if value_embedding is not None:
            if value_embedding.embedding_dim != kv_dim:
                raise ConfigError(
                    f"the value embedding has {value_embedding.embedding_dim} channels; "
                    f"{num_kv_heads} key/value heads of {self.head_dim} need {kv_dim}."
                )
            if not 1 <= value_gate_channels <= dim:
                raise ConfigError(f"value_gate_channels={value_gate_channels} must lie between 1 and dim={dim}.")
            self.value_gate = Linear(value_gate_channels, num_kv_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the output projection, so that the layer starts as no change; draw the gate from [0, 0.02)."""
        nn.init.zeros_(self.o_proj.weight)
        if self.value_gate is not None:
            nn.init.uniform_(self.value_gate.weight, 0.0, 0.02)

    def forward(self, x: Tensor, *, token_ids: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: `(batch, seq, dim)`, already normalized.
            token_ids: `(batch, seq)` int64, read by the value embedding alone.
            cache: Keys and values of earlier positions; those of `x` are appended to it.

        Returns:
            `(batch, seq, dim)`, to be added to the residual stream.

        Raises:
            ConfigError: If the layer has a value embedding and `token_ids` is missing.
        """
        q = rearrange(self.q_proj(x), _SPLIT_HEADS, head_dim=self.head_dim)
        k = rearrange(self.k_proj(x), _SPLIT_HEADS, head_dim=self.head_dim)
        v = rearrange(self.v_proj(x), _SPLIT_HEADS, head_dim=self.head_dim)
        if self.value_embedding is not None and self.value_gate is not None:
            if token_ids is None:
                raise ConfigError("this attention has a value embedding: call it with token_ids=(batch, seq) as well.")
            gate = self.value_gate_scale * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))
            gate = rearrange(gate, "batch seq kv_heads -> batch kv_heads seq 1")
            v = _plus_rows(v, gate, self.value_embedding, token_ids)
        attend = partial(
            causal_attention if cache is None else cache.attend,
            window_tokens=self.window_tokens,
            scale=self.score_scale,
        )
        if x.shape[1] == 1:
            # One token is so little work that calls count: queries and keys are turned and normalized as one tensor.
            both = self._normed(self._turned(torch.cat((q, k), dim=1), cache))
            y = attend(both[:, : self.num_heads], both[:, self.num_heads :], v)
        else:
            q, k = self._normed(self._turned(q, cache)), self._normed(self._turned(k, cache))
            y = attend(q, k, v)
        return self.o_proj(rearrange(y, _MERGE_HEADS))

    def _turned(self, x: Tensor, cache: LayerCache | None) -> Tensor:
        """Return queries or keys `(batch, heads, seq, head_dim)` turned by their positions."""
        if self.rope is None:
            return x
        seq = x.shape[2]
        return self.rope.turn(x, *(self.rope.tables(0, seq) if cache is None else cache.rotation(self.rope, seq)))

    def _normed(self, x: Tensor) -> Tensor:
        if not self.qk_norm:
            return x
        # What our own rotation returns is new, and read by nobody else.
        is_new = getattr(self.rope, "turn", None) is RotaryEmbedding.turn
        return (rms_norm_ if is_new else rms_norm)(x, eps=self.norm_eps)

    def flops_per_token(self, seq_len: int) -> int:
        """Return forward and backward FLOPs a token of scores and weighted sum, projections not included.

        Counted as usual for training reports: 12 x channels x visible tokens, causality ignored.
        """
        visible = seq_len if self.window_tokens is None else min(self.window_tokens, seq_len)
        return 12 * self.num_heads * self.head_dim * visible


def _plus_rows(v: Tensor, gate: Tensor, table: nn.Embedding, token_ids: Tensor) -> Tensor:
    """Return `v` `(batch, heads, seq, head_dim)` plus the gate `(batch, heads, seq, 1)` times the rows of these tokens.

    The rows are looked up again for the backward pass instead of kept, but where looking up may do something else too.
    """

    def split(rows: Tensor) -> Tensor:
        return rearrange(rows.to(gate.dtype), _SPLIT_HEADS, heads=gate.shape[1])

    rows = split(table(token_ids))
    own = table.forward if "forward" in table.__dict__ else type(table).forward
    hooked = is_hooked(table)
    # A parametrized weight is no parameter, but computed whenever it is asked for.
    looks_up = own in (nn.Embedding.forward, RowTable.forward) and "weight" in table._parameters
    if not looks_up or hooked or table.max_norm is not None or not takes_own_backward() or others_choose_what_is_kept():
        return plus_product(v, gate, rows)
    weight = table.weight
    with made_again(rows, lambda: split(F.embedding(token_ids, weight)), of=[weight, token_ids]):
        return plus_product(v, gate, rows)


def check_heads(dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise `ConfigError` unless `dim` splits into heads and the heads into groups."""
    check_whole(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ConfigError(f"dim={dim} is not divisible by num_heads={num_heads}.")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        allowed = ", ".join(map(str, divisors[:-1])) + (" or " if len(divisors) > 1 else "") + str(divisors[-1])
        raise ConfigError(f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}; choose {allowed}.")
