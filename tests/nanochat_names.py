"""nanochat's parameter names in ours, for the recordings in `data_files/parity`."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from tinygpt import GPTConfig

PARITY = Path(__file__).parent / "data_files" / "parity"
FIXTURES = ("all_blocks", "gqa")

_RENAMES = (
    (r"^transformer\.wte\.", "embedding."),
    (r"^lm_head\.", "head."),
    (r"^smear_gate\.", "smear.gate."),
    (r"^smear_lambda$", "smear.scale"),
    (r"^backout_lambda$", "backout.scale"),
    (r"^value_embeds\.(\d+)\.", r"blocks.\1.attention.value_embedding."),
    (r"^transformer\.h\.(\d+)\.attn\.c_([qkv])\.", r"blocks.\1.attention.\2_proj."),
    (r"^transformer\.h\.(\d+)\.attn\.c_proj\.", r"blocks.\1.attention.o_proj."),
    (r"^transformer\.h\.(\d+)\.attn\.ve_gate\.", r"blocks.\1.attention.value_gate."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.up_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.down_proj."),
)


class Recording(NamedTuple):
    facts: dict[str, Any]
    config: GPTConfig
    weights: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    expected: dict[str, Tensor]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The recorded tensors under a prefix such as `grad.`, by our names."""
        return our_names({k.removeprefix(prefix): v for k, v in self.expected.items() if k.startswith(prefix)})


def our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename, and spread nanochat's vectors of per-layer scalars over our blocks."""
    renamed = {}
    for name, tensor in tensors.items():
        if name in ("resid_lambdas", "x0_lambdas"):
            scale = "residual_scale" if name == "resid_lambdas" else "x0_scale"
            renamed |= {f"blocks.{layer}.{scale}": tensor[layer : layer + 1].clone() for layer in range(len(tensor))}
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def read_recording(name: str) -> Recording:
    facts = json.loads((PARITY / f"{name}.json").read_text(encoding="utf-8"))
    sizes = facts["config"]
    expected = load_file(PARITY / f"{name}.expected.safetensors")
    return Recording(
        facts=facts,
        config=GPTConfig(
            vocab_size=sizes["vocab_size"],
            max_seq_len=sizes["sequence_len"],
            num_layers=sizes["n_layer"],
            num_heads=sizes["n_head"],
            num_kv_heads=sizes["n_kv_head"],
            dim=sizes["n_embd"],
            window_pattern=sizes["window_pattern"],
        ),
        weights=our_names(load_file(PARITY / f"{name}.weights.safetensors")),
        inputs=expected["x"].long(),
        targets=expected["y"].long(),
        expected=expected,
    )
