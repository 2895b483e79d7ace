"""nanochat's recordings in `data_files/parity`, under our names."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from tinygpt import GPTConfig
from tinygpt.interop.nanochat import convert_state_dict
from tinygpt.interop.nanochat._names import rename

PARITY = Path(__file__).parent / "data_files" / "parity"
FIXTURES = ("all_blocks", "gqa")


class Recording(NamedTuple):
    facts: dict[str, Any]
    config: GPTConfig
    weights: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    expected: dict[str, Tensor]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The recorded tensors under a prefix such as `grad.`, by our names."""
        return rename({k.removeprefix(prefix): v for k, v in self.expected.items() if k.startswith(prefix)})


def read_recording(name: str) -> Recording:
    facts = json.loads((PARITY / f"{name}.json").read_text(encoding="utf-8"))
    expected = load_file(PARITY / f"{name}.expected.safetensors")
    config, weights = convert_state_dict(load_file(PARITY / f"{name}.weights.safetensors"), facts["config"])
    return Recording(
        facts=facts,
        config=config,
        weights=weights,
        inputs=expected["x"].long(),
        targets=expected["y"].long(),
        expected=expected,
    )
