"""Checking a saved loader position, and its packing buffer as tensors."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinygpt.data._packing import TokenArray, Utilization
from tinygpt.errors import DataError

_KEYS = {
    "version",
    "epoch",
    "cursor",
    "counters",
    "settings",
    "source_fingerprint",
    "tokenizer_fingerprint",
    "tensors",
}


def buffer_tensors(documents: list[TokenArray]) -> dict[str, Tensor]:
    """Return documents as one tensor of token ids and one of lengths."""
    tokens = np.concatenate([np.empty(0, dtype=np.int32), *documents])
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    return {"buffer_tokens": torch.from_numpy(tokens), "buffer_lengths": lengths}


def buffer_arrays(tensors: Mapping[str, Tensor]) -> list[TokenArray]:
    """Return the documents that `buffer_tensors` joined, as copies.

    Raises:
        DataError: If the tensors do not fit each other.
    """
    tokens, lengths = tensors.get("buffer_tokens"), tensors.get("buffer_lengths")
    if (
        tokens is None
        or lengths is None
        or (tokens.dtype, lengths.dtype) != (torch.int32, torch.int64)
        or bool((lengths < 1).any())
        or int(lengths.sum()) != tokens.numel()
    ):
        raise DataError(
            "the loader state is damaged: buffer_lengths (int64) must be positive and sum to the number of "
            "buffer_tokens (int32)."
        )
    ends = np.cumsum(lengths.numpy())
    return np.split(tokens.numpy().copy(), ends[:-1]) if len(ends) else []


def check_state(
    state: Mapping[str, Any],
    *,
    settings: Mapping[str, int | str],
    fingerprints: Mapping[str, str],
    other_source: bool,
) -> None:
    """Refuse a state that this loader cannot continue exactly.

    Raises:
        DataError: If the state is damaged, of another version, or was saved with other settings, another tokenizer
            or, unless `other_source`, another source.
    """
    if state.get("version") != 1:
        raise DataError(f"the loader state has version {state.get('version')!r}; this tinygpt reads version 1.")
    parts = {"settings": set(settings), "counters": {field.name for field in fields(Utilization)}}
    if set(state) != _KEYS or any(set(state[part] or ()) != keys for part, keys in parts.items()):
        raise DataError("the loader state is damaged: fields are missing or unknown; use another checkpoint.")
    for name, value in settings.items():
        saved = state["settings"][name]
        if saved != value:
            raise DataError(
                f"the loader state was saved with {name}={saved!r} and this loader has {name}={value!r}; "
                "the rows would differ: build the loader as it was."
            )
    saved, current = state["tokenizer_fingerprint"], fingerprints["tokenizer"]
    if saved != current:
        raise DataError(
            f"the loader state was saved with another tokenizer: fingerprint {saved[:12]} then, {current[:12]} now; "
            "load the tokenizer of that run."
        )
    saved, current = state["source_fingerprint"], fingerprints["source"]
    if saved != current and not other_source:
        raise DataError(
            f"the loader state was saved with another source, or its files changed: fingerprint {saved[:12]} then, "
            f"{current[:12]} now; restore the files, or pass allow_source_change=True to start this source at its "
            "beginning."
        )
