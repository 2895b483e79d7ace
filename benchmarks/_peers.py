"""Other libraries' models of the size of ours, for the benchmarks that compare with them.

Each is a Llama with as many weights in its matrices as ours: RMS norm, rotary, SwiGLU of 8/3 of the width, no bias, an
untied head, and none of our value embeddings, gates, scales or soft cap. A library that is not installed is left out.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from tinygpt import GPT, GPTConfig
from tinygpt.layers import SwiGLU


def library(name: str) -> Any | None:
    """Return an installed library, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def hidden_dim(config: GPTConfig) -> int:
    """Return the width that gives three matrices the weights of our two."""
    return 8 * config.dim // 3


def tinygpt_llama(config: GPTConfig) -> GPT:
    """Return our blocks put together as the peers are."""
    off = ("value_embeddings", "residual_scales", "x0_scales", "smear", "backout", "embedding_norm", "qk_norm")
    plain = config.replace(**dict.fromkeys(off, False), soft_cap=None, norm_weight=True, window_pattern="L")
    return GPT.from_config(plain, mlp=lambda config, layer: SwiGLU(config.dim, hidden_dim(config)))


def transformers_llama(config: GPTConfig) -> nn.Module | None:
    """Return `LlamaForCausalLM` of transformers."""
    transformers = library("transformers")
    if transformers is None:
        return None
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=hidden_dim(config),
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(llama)


def litgpt_llama(config: GPTConfig) -> Any | None:
    """Return litgpt's `GPT`."""
    litgpt = library("litgpt")
    if litgpt is None:
        return None
    return litgpt.GPT(
        litgpt.Config(
            name="same size",
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.dim,
            intermediate_size=hidden_dim(config),
            block_size=config.max_seq_len,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )


def x_transformers_llama(config: GPTConfig) -> nn.Module | None:
    """Return a decoder of x-transformers."""
    x_transformers = library("x_transformers")
    if x_transformers is None:
        return None
    return x_transformers.TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=config.max_seq_len,
        use_abs_pos_emb=False,
        attn_layers=x_transformers.Decoder(
            dim=config.dim,
            depth=config.num_layers,
            heads=config.num_heads,
            attn_dim_head=config.head_dim,
            attn_flash=True,
            rotary_pos_emb=True,
            rotary_emb_dim=config.head_dim,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=hidden_dim(config) / config.dim,
            verbose=False,
        ),
    )


PEERS: dict[str, Callable[[GPTConfig], Any]] = {
    "transformers": transformers_llama,
    "litgpt": litgpt_llama,
    "x-transformers": x_transformers_llama,
}
