"""A loader's position as JSON values and tensors, and checking a saved one."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinygpt.data._packing import PackerState, TokenArray, Utilization
from tinygpt.data._rows import Mark
from tinygpt.data._shuffle import Place
from tinygpt.errors import DataError

_VERSION = 2
_KEYS = {
    "version",
    "epoch",
    "cursor",
    "window",
    "taken",
    "window_end",
    "continued",
    "counters",
    "settings",
    "source_fingerprint",
    "tokenizer_fingerprint",
    "tensors",
}


def write_state(mark: Mark, *, settings: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return a mark as JSON values and, under `"tensors"`, the packing buffer."""
    return {
        "version": _VERSION,
        "epoch": mark.epoch,
        **mark.place._asdict(),
        "continued": mark.packer.continued,
        "counters": asdict(mark.packer.counts),
        "settings": dict(settings),
        "source_fingerprint": fingerprints["source"],
        "tokenizer_fingerprint": fingerprints["tokenizer"],
        "tensors": _buffer_tensors(mark.packer.documents),
    }


def read_state(
    state: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    other_source: bool,
) -> Mark:
    """Return the mark of a state, refusing one that a loader with these settings cannot continue exactly.

    Raises:
        DataError: If the state is damaged, of an unknown version, or was saved with other settings, another tokenizer
            or, unless `other_source`, another source.
    """
    state = _upgraded(state)
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
    packer = PackerState(_buffer_arrays(state["tensors"]), Utilization(**state["counters"]), state["continued"])
    if saved != current:
        return Mark(0, Place(), packer)
    return Mark(state["epoch"], Place(*(state[name] for name in Place._fields)), packer)


def _upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state of version 1 as one of this version.

    Version 1 knew neither shuffling nor `concat`, and refused other batch sizes without need.
    """
    version = state.get("version")
    if version == _VERSION:
        return state
    if version != 1:
        raise DataError(f"the loader state has version {version!r}; this tinygpt reads versions 1 and {_VERSION}.")
    settings = {
        name: value for name, value in (state.get("settings") or {}).items() if name not in ("rows", "world_size")
    }
    settings |= {"seed": None, "shuffle_documents": None}
    added = {"window": 0, "taken": 0, "window_end": None, "continued": False}
    return {**state, **added, "version": _VERSION, "settings": settings}


def _buffer_tensors(documents: list[TokenArray]) -> dict[str, Tensor]:
    """Return documents as one tensor of token ids and one of lengths."""
    tokens = np.concatenate([np.empty(0, dtype=np.int32), *documents])
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    return {"buffer_tokens": torch.from_numpy(tokens), "buffer_lengths": lengths}


def _buffer_arrays(tensors: Mapping[str, Tensor]) -> list[TokenArray]:
    """Return the documents that `_buffer_tensors` joined, as copies.

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
    if not len(lengths):
        return []
    # Each its own array: a part of a shared one would keep all of it in memory.
    return [part.copy() for part in np.split(tokens.numpy(), np.cumsum(lengths.numpy())[:-1])]
