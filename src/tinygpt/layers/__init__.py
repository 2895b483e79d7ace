"""The blocks of a small modern GPT, each an ordinary `nn.Module` that is usable on its own.

No module here knows a config: every layer takes plain keyword arguments, so any of them can be used in a model
that is not ours. Weights start as in nanochat unless a docstring says otherwise; `init_weights` draws them again.
"""

from tinygpt.layers._attend import causal_attention as causal_attention
from tinygpt.layers._attention import CausalSelfAttention as CausalSelfAttention
from tinygpt.layers._backends import AttentionBackend as AttentionBackend
from tinygpt.layers._backends import attention_backends as attention_backends
from tinygpt.layers._backends import use_attention_backend as use_attention_backend
from tinygpt.layers._block import Backout as Backout
from tinygpt.layers._block import Block as Block
from tinygpt.layers._embedding import Smear as Smear
from tinygpt.layers._embedding import TokenEmbedding as TokenEmbedding
from tinygpt.layers._embedding import ValueEmbedding as ValueEmbedding
from tinygpt.layers._head import LMHead as LMHead
from tinygpt.layers._init import init_weights as init_weights
from tinygpt.layers._kv_cache import KVCache as KVCache
from tinygpt.layers._kv_cache import LayerCache as LayerCache
from tinygpt.layers._linear import Linear as Linear
from tinygpt.layers._matmul_precision import MatmulPrecision as MatmulPrecision
from tinygpt.layers._matmul_precision import set_matmul_precision as set_matmul_precision
from tinygpt.layers._mlp import GeluMLP as GeluMLP
from tinygpt.layers._mlp import ReluSquaredMLP as ReluSquaredMLP
from tinygpt.layers._mlp import SwiGLU as SwiGLU
from tinygpt.layers._norm import RMSNorm as RMSNorm
from tinygpt.layers._rotary import RotaryEmbedding as RotaryEmbedding
from tinygpt.layers._slot_cache import SlotCache as SlotCache

__all__ = [
    "AttentionBackend",
    "Backout",
    "Block",
    "CausalSelfAttention",
    "GeluMLP",
    "KVCache",
    "LMHead",
    "LayerCache",
    "Linear",
    "MatmulPrecision",
    "RMSNorm",
    "ReluSquaredMLP",
    "RotaryEmbedding",
    "SlotCache",
    "Smear",
    "SwiGLU",
    "TokenEmbedding",
    "ValueEmbedding",
    "attention_backends",
    "causal_attention",
    "init_weights",
    "set_matmul_precision",
    "use_attention_backend",
]
