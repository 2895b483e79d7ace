"""The GPT: parts put together."""

from collections.abc import Sequence
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinygpt.errors import ConfigError
from tinygpt.layers import Backout, KVCache, LayerCache, LMHead, Smear, TokenEmbedding
from tinygpt.layers._kept import with_its_parameters
from tinygpt.model._checkpointing import ActivationCheckpointing, let_mlps_recompute
from tinygpt.model._config import GPTConfig
from tinygpt.model._counts import ParameterCounts
from tinygpt.model._losses import IGNORED, plain_token_losses
from tinygpt.model._parts import (
    PartFactory,
    StandardAttention,
    check_factory,
    check_part,
    standard_block,
    standard_mlp,
    standard_norm,
)
from tinygpt.model._pretrained import PretrainedFiles


class GPT(PretrainedFiles):
    """Embedding, blocks and head in a row.

    `GPT.from_config(config)` builds a standard one, `GPT(embedding=..., blocks=..., head=...)` one of your own.
    `tinygpt.generate` writes text with it, `tinygpt.Trainer` trains it.

    Args:
        embedding: `(batch, seq)` token ids -> `(batch, seq, dim)`.
        blocks: Each called as `block(x, x0=..., token_ids=..., cache=...)`.
        head: `(batch, seq, dim)` -> logits; with a method `loss(x, targets)` as `LMHead` has for training
            without full logits.
        embedding_norm: Applied to the embedding; `None` for nothing.
        smear: Applied after that, called as `smear(x, previous=...)`; `None` for nothing.
        backout: Called as `backout(x, middle)` after the last block, where `middle` left block `len(blocks) // 2`.
        final_norm: Applied before the head; `None` for nothing.
        config: What `save_pretrained` writes next to the weights.
        max_seq_len: Longest sequence the parts take, used by `new_cache`; `None` takes it from the config.

    Raises:
        ConfigError: If there are no blocks, or a part is no module.

    Example:
        ```python
        import torch
        from tinygpt import GPT, GPTConfig

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        logits = model(torch.tensor([[256, 72, 105]]))  # (batch, seq) -> (batch, seq, vocab)
        ```
    """

    def __init__(
        self,
        *,
        embedding: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        embedding_norm: nn.Module | None = None,
        smear: nn.Module | None = None,
        backout: nn.Module | None = None,
        final_norm: nn.Module | None = None,
        config: GPTConfig | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        blocks = list(blocks)
        if not blocks:
            raise ConfigError("GPT needs at least one block.")
        optional = {"embedding_norm": embedding_norm, "smear": smear, "backout": backout, "final_norm": final_norm}
        parts: dict[str, object] = {name: part for name, part in optional.items() if part is not None}
        parts |= {"embedding": embedding, "head": head} | {f"block {i}": block for i, block in enumerate(blocks)}
        for name, part in parts.items():
            check_part(name, part)
        self.config = config
        self.max_seq_len = config.max_seq_len if max_seq_len is None and config is not None else max_seq_len
        self.compute_dtype: torch.dtype | None = None
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.embedding = embedding
        self.embedding_norm = embedding_norm
        self.smear = smear
        self.blocks = nn.ModuleList(blocks)
        self.backout = backout
        self.final_norm = final_norm
        self.head = head

    @classmethod
    def from_config(
        cls,
        config: GPTConfig,
        *,
        mlp: PartFactory | None = None,
        attention: PartFactory | None = None,
        block: PartFactory | None = None,
    ) -> Self:
        """Build the standard model, or one with parts of your own.

        Args:
            config: The numbers.
            mlp: Builds the feed-forward layer of layer `i`: `f(x) -> x`.
            attention: Builds the attention of layer `i`: `f(x, *, token_ids, cache=None) -> x`.
            block: Builds the whole of block `i`: `f(x, *, x0, token_ids, cache=None) -> x`; not together with the two.

        Raises:
            ConfigError: If `block` is given together with `mlp` or `attention`, or one of them cannot be called, is a
                module itself or returns something else.

        Example:
            ```python
            from tinygpt import GPT, GPTConfig
            from tinygpt.layers import SwiGLU

            config = GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128)
            model = GPT.from_config(config, mlp=lambda config, layer: SwiGLU(config.dim, 2 * config.dim))
            ```
        """
        if not isinstance(config, GPTConfig):
            raise ConfigError(f"from_config needs a GPTConfig, not {config!r}; try GPTConfig.from_depth(12).")
        if block is not None and (mlp is not None or attention is not None):
            raise ConfigError("give either block, which builds the whole block, or mlp and attention, not both.")
        for name, factory in (("mlp", mlp), ("attention", attention), ("block", block)):
            check_factory(name, factory)
        # Parts are made in the order in which init_weights visits them, so both draw the same weights from one seed.
        embedding = TokenEmbedding(config.padded_vocab_size, config.dim)
        smear = Smear(config.dim, gate_channels=min(24, config.dim)) if config.smear else None
        make_attention = attention or StandardAttention(config)
        make_mlp = mlp or standard_mlp

        def make_block(config: GPTConfig, layer: int) -> nn.Module:
            if block is not None:
                return block(config, layer)
            parts = {"attention": make_attention(config, layer), "mlp": make_mlp(config, layer)}
            for name, part in parts.items():
                check_part(f"{name} of layer {layer}", part)
            return standard_block(config, layer, **parts)

        return cls(
            embedding=embedding,
            embedding_norm=standard_norm(config) if config.embedding_norm else None,
            smear=smear,
            blocks=[make_block(config, layer) for layer in range(config.num_layers)],
            backout=Backout() if config.backout else None,
            final_norm=standard_norm(config),
            head=LMHead(
                config.dim,
                config.vocab_size,
                padded_vocab_size=config.padded_vocab_size,
                soft_cap=config.soft_cap,
            ),
            config=config,
        )

    def forward(self, token_ids: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Return the logits of the next token at every position.

        Args:
            token_ids: `(batch, seq)` integers.
            cache: What was read before; `token_ids` continue it and are added to it.

        Returns:
            `(batch, seq, vocab)` float32.

        Raises:
            ConfigError: If the ids have another shape or dtype, are too many or, on a CPU, lie outside the vocabulary.
        """
        return self.head(self.hidden_states(token_ids, cache=cache))

    def hidden_states(self, token_ids: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Return what enters the head: `(batch, seq)` -> `(batch, seq, dim)`; arguments as in `forward`."""
        self._check_token_ids(token_ids)
        if cache is not None and len(cache.layers) != len(self.blocks):
            raise ConfigError(
                f"got a cache of {len(cache.layers)} layers for {len(self.blocks)} blocks; make it with new_cache."
            )
        if cache is not None and token_ids.shape[1] > cache.free:
            # Before anything is written into it, so that a refused call leaves the cache as it was.
            raise ConfigError(
                f"got {token_ids.shape[1]} tokens for a cache with room for {cache.free} more after {cache.length}; "
                "make it with a larger max_seq_len or read fewer tokens."
            )
        x = self.embedding(token_ids)
        x = x.to(self._activation_dtype(x))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.smear is not None:
            last = x[:, -1:]
            x = self.smear(x, previous=None if cache is None else cache.last_embedding)
            if cache is not None:
                cache.remember(last)
        x0 = middle = x
        for index, block in enumerate(self.blocks):
            if cache is None and self.activation_checkpointing == "block" and torch.is_grad_enabled():
                again = with_its_parameters(block)
                x = checkpoint(again, x, x0=x0, token_ids=token_ids, cache=None, use_reentrant=False)
            else:
                layer_cache = None if cache is None else cache.layers[index]
                x = block(x, x0=x0, token_ids=token_ids, cache=layer_cache)
            if index == len(self.blocks) // 2:
                middle = x
        if self.backout is not None:
            x = self.backout(x, middle)
        return x if self.final_norm is None else self.final_norm(x)

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids: that of the config, else of the embedding table; `None` where neither tells."""
        return self.config.vocab_size if self.config else getattr(self.embedding, "num_embeddings", None)

    def loss(self, token_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return summed next-token loss in nats and number of targets.

        A head with a method `loss`, as `LMHead`, computes it without full logits; of any other the logits are taken.

        Args:
            token_ids: `(batch, seq)` integers.
            targets: `(batch, seq)` int64, -1 where not trained on.

        Raises:
            ConfigError: As in `forward`, or if the targets do not fit.
        """
        x = self.hidden_states(token_ids)
        if isinstance(own_loss := getattr(self.head, "loss", None), MethodType):
            return own_loss(x, targets)
        losses = plain_token_losses(self.head(x), targets)
        return losses.sum(), (targets != IGNORED).sum()

    @torch.no_grad()
    def token_losses(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every target in nats, without gradients: `(batch, seq)` float32."""
        x = self.hidden_states(token_ids)
        if isinstance(own_losses := getattr(self.head, "token_losses", None), MethodType):
            return own_losses(x, targets)
        return plain_token_losses(self.head(x), targets)

    def new_cache(self, batch: int, *, max_seq_len: int | None = None) -> KVCache:
        """Return an empty cache for this many rows, on the model's device and in its compute dtype.

        The cache of a layer whose attention has `window_tokens` keeps that window alone.

        Args:
            batch: Rows.
            max_seq_len: Positions that fit; `None` for as many as the model takes.

        Raises:
            ConfigError: If an attention does not tell `num_kv_heads` and `head_dim`, or no length is known.
        """
        length = self.max_seq_len if max_seq_len is None else max_seq_len
        if length is None:
            raise ConfigError("this GPT has no config: give new_cache the max_seq_len that your parts take.")
        weight = next(self.embedding.parameters())
        layers = []
        for index, block in enumerate(self.blocks):
            attention: Any = getattr(block, "attention", block)
            if not (hasattr(attention, "num_kv_heads") and hasattr(attention, "head_dim")):
                raise ConfigError(
                    f"block {index} has no attention with num_kv_heads and head_dim: build its KVCache yourself."
                )
            layers.append(
                LayerCache(
                    batch,
                    attention.num_kv_heads,
                    length,
                    attention.head_dim,
                    window_tokens=getattr(attention, "window_tokens", None),
                    device=weight.device,
                    dtype=self._activation_dtype(weight),
                )
            )
        return KVCache(layers)

    def _activation_dtype(self, embedded: Tensor) -> torch.dtype:
        """Return what is computed in after an embedding that lies in this dtype on this device."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        if embedded.is_cpu and embedded.dtype in (torch.bfloat16, torch.float16):
            # Tables are stored in half precision to save memory; to compute in it makes most CPUs 20 times slower.
            others = (module for module in self.blocks.modules() if not isinstance(module, nn.Embedding))
            return next((weight for module in others for weight in module.parameters(recurse=False)), embedded).dtype
        return embedded.dtype

    def set_compute_dtype(self, dtype: torch.dtype | None, *, embeddings: bool = False) -> Self:
        """Set the dtype of activations; matrix products follow it, master weights stay as they are.

        Args:
            dtype: Usually `torch.bfloat16`; `None` for the dtype of the embedding table or, on a CPU and if that is
                stored in half precision, of the blocks.
            embeddings: Whether to store the token tables in it as well, which halves their memory.

        Raises:
            ConfigError: If `dtype` is not a floating-point dtype.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"compute dtype {dtype!r} is not a floating-point dtype; use torch.bfloat16 or float32.")
        self.compute_dtype = dtype
        if embeddings and dtype is not None:
            for module in self.modules():
                if isinstance(module, nn.Embedding):
                    module.to(dtype)
        return self

    def set_activation_checkpointing(self, what: ActivationCheckpointing) -> Self:
        """Set what the backward pass computes again instead of keeping it from the forward pass.

        Loss and gradients stay the same. `"mlp"` drops the hidden layer of each feed-forward layer, the largest thing
        that is kept, for one more product of three in it. `"block"` drops everything but the input of each block, for a
        second forward pass. After `torch.func.functional_call`, which takes its parameters away again, both end the
        backward pass with an error.

        Args:
            what: `"none"`, `"mlp"` or `"block"`.

        Raises:
            ConfigError: If it is none of these, or `"mlp"` and a block is not a `Block`.

        References:
            Chen et al., [Training Deep Nets with Sublinear Memory Cost](https://arxiv.org/abs/1604.06174), 2016; the
            choice of what is cheap to repeat from Korthikanti et al.,
            [Reducing Activation Recomputation](https://arxiv.org/abs/2205.05198), 2022.
        """
        let_mlps_recompute(self.blocks, what)
        self.activation_checkpointing = what
        return self

    def num_parameters(self) -> ParameterCounts:
        """Count parameters by role; a tied one counts once, in the role that comes first.

        Matrices are weights of two or more axes, gates of value embeddings included; scalars all the rest and the
        smear with its gate.
        """
        counts = dict.fromkeys(ParameterCounts._fields, 0)
        for name, parameter in self.named_parameters():
            counts[self._role(name, parameter)] += parameter.numel()
        return ParameterCounts(**counts)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Return training FLOPs a token: 6 x parameters of matrix products, plus attention with its windows.

        Products are counted over all `nn.Linear`; a part of your own adds what else it costs by a method
        `flops_per_token(seq_len)`, as `CausalSelfAttention` does.

        Args:
            seq_len: Length of the sequences; `None` for `max_seq_len`.

        References:
            Appendix B of [PaLM](https://arxiv.org/abs/2204.02311), 2022.
        """
        length = self.max_seq_len if seq_len is None else seq_len
        if length is None:
            raise ConfigError("this GPT has no config: give flops_per_token the seq_len you train with.")
        products = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        parts: list[Any] = [m for m in self.modules() if m is not self and hasattr(m, "flops_per_token")]
        return 6 * products + sum(part.flops_per_token(length) for part in parts)

    def _role(self, name: str, parameter: nn.Parameter) -> str:
        owner = self.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding):
            return "token_embedding" if owner is self.embedding else "value_embeddings"
        if name.startswith("head."):
            return "head"
        return "matrices" if parameter.ndim >= 2 and not name.startswith("smear.") else "scalars"

    def _check_token_ids(self, token_ids: Tensor) -> None:
        if not isinstance(token_ids, Tensor):
            kind = type(token_ids).__name__
            raise ConfigError(f"token ids are a {kind}, not a tensor (batch, seq); give torch.tensor([ids]).")
        if token_ids.ndim != 2 or token_ids.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"token ids must be integers of shape (batch, seq), got {token_ids.dtype} of {tuple(token_ids.shape)}."
            )
        if not token_ids.shape[0]:
            raise ConfigError("got a batch without rows.")
        if token_ids.shape[1] < 1 or (self.max_seq_len is not None and token_ids.shape[1] > self.max_seq_len):
            raise ConfigError(f"got {token_ids.shape[1]} tokens; this model takes 1 to {self.max_seq_len}.")
        # Reading the extremes would make a GPU wait; there Trainer and stream_text compare the vocabularies before.
        vocab_size = self.vocab_size
        if token_ids.device.type == "cpu" and vocab_size is not None and not torch.compiler.is_compiling():
            lowest, highest = token_ids.aminmax()
            if lowest < 0 or highest >= vocab_size:
                wrong = int(lowest if lowest < 0 else highest)
                raise ConfigError(f"token id {wrong} lies outside the vocabulary of {vocab_size}.")
