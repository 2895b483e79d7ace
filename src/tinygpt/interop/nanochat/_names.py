"""nanochat's parameter names and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

_WHOLE_MODEL = {
    "transformer.wte.weight": "embedding.weight",
    "lm_head.weight": "head.weight",
    "smear_gate.weight": "smear.gate.weight",
    "smear_lambda": "smear.scale",
    "backout_lambda": "backout.scale",
}
# One vector over all layers there, one scalar in each block here.
SCALES = {"resid_lambdas": "residual_scale", "x0_lambdas": "x0_scale"}
# In the order in which nanochat makes them, which is the order of its optimizer state.
MATRICES = {
    "attn.c_q": "attention.q_proj",
    "attn.c_k": "attention.k_proj",
    "attn.c_v": "attention.v_proj",
    "attn.c_proj": "attention.o_proj",
    "attn.ve_gate": "attention.value_gate",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_OUR_WHOLE_MODEL = {ours: theirs for theirs, ours in _WHOLE_MODEL.items()}
_OUR_IN_BLOCK = {f"{ours}.weight": f"transformer.h.{{}}.{theirs}.weight" for theirs, ours in MATRICES.items()}
_OUR_IN_BLOCK["attention.value_embedding.weight"] = "value_embeds.{}.weight"


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under our names; vectors of per-layer scalars are spread over the blocks.

    Raises:
        KeyError: If nanochat has no such name.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if name in SCALES:
            for layer, scalar in enumerate(tensor.unbind()):
                renamed[f"blocks.{layer}.{SCALES[name]}"] = scalar.reshape(1)
        else:
            renamed[_our_name(name)] = tensor
    return renamed


def _our_name(name: str) -> str:
    if name in _WHOLE_MODEL:
        return _WHOLE_MODEL[name]
    if match := re.fullmatch(r"value_embeds\.(\d+)\.weight", name):
        return f"blocks.{match[1]}.attention.value_embedding.weight"
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
    if match is None:
        raise KeyError(name)
    return f"blocks.{match[1]}.{MATRICES[match[2]]}.weight"


def nanochat_name(name: str) -> tuple[str, int | None]:
    """Return nanochat's name of one of our parameters, and the place in its vector if it is an entry of one.

    Raises:
        KeyError: If nanochat has no such parameter.
    """
    if name in _OUR_WHOLE_MODEL:
        return _OUR_WHOLE_MODEL[name], None
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    for vector, scale in SCALES.items():
        if match[2] == scale:
            return vector, int(match[1])
    return _OUR_IN_BLOCK[match[2]].format(match[1]), None
