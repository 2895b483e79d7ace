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
_CURSORS = ("cursor", "window_end")
_FINGERPRINTS = ("source_fingerprint", "tokenizer_fingerprint")


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
    vocab_size: int,
    other_source: bool,
) -> Mark:
    """Return the mark of a state, refusing one that a loader with these settings cannot continue exactly.

    Raises:
        DataError: If the state is damaged, of an unknown version, or was saved with other settings, another tokenizer
            or, unless `other_source`, another source.
    """
    state = _upgraded(state)
    _check_structure(state, set(settings))
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
    documents = _buffer_arrays(state["tensors"], vocab_size)
    packer = PackerState(documents, Utilization(**state["counters"]), state["continued"])
    if saved != current:
        return Mark(0, Place(), packer)
    return Mark(state["epoch"], Place(*(state[name] for name in Place._fields)), packer)


def _upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state of version 1 as one of this version.

    Version 1 knew neither shuffling nor `concat`, and refused other batch sizes without need.
    """
    if not isinstance(state, Mapping):
        raise DataError(f"the loader state is damaged: it is {state!r:.80} and not a mapping; use another checkpoint.")
    version = state.get("version")
    if version == _VERSION:
        return state
    if version != 1:
        raise DataError(f"the loader state has version {version!r}; this tinygpt reads versions 1 and {_VERSION}.")
    settings = state.get("settings")
    if isinstance(settings, Mapping):
        settings = {name: value for name, value in settings.items() if name not in ("rows", "world_size")}
        settings |= {"seed": None, "shuffle_documents": None}
    added = {"window": 0, "taken": 0, "window_end": None, "continued": False}
    return {**state, **added, "version": _VERSION, "settings": settings}


def _check_structure(state: Mapping[str, Any], settings: set[str]) -> None:
    """Raise `DataError` unless every field is there and of its type; a cursor is the business of the source."""
    counters = {field.name for field in fields(Utilization)}
    if set(state) != _KEYS:
        wrong = "fields are missing or unknown"
    elif not isinstance(state["settings"], Mapping) or set(state["settings"]) != settings:
        wrong = f"settings must be a mapping of {', '.join(sorted(settings))}"
    elif not isinstance(state["counters"], Mapping) or set(state["counters"]) != counters:
        wrong = f"counters must be a mapping of {', '.join(sorted(counters))}"
    elif not isinstance(state["tensors"], Mapping):
        wrong = "tensors must be a mapping"
    else:
        numbers = {name: state[name] for name in ("epoch", "window", "taken")} | dict(state["counters"])
        kinds = [(name, _is_count(value), "0 or more") for name, value in numbers.items()]
        kinds += [(name, state[name] is None or isinstance(state[name], dict), "a cursor") for name in _CURSORS]
        kinds += [(name, isinstance(state[name], str), "a digest") for name in _FINGERPRINTS]
        kinds += [("continued", isinstance(state["continued"], bool), "true or false")]
        wrong = "; ".join(f"{name} must be {kind}" for name, right, kind in kinds if not right)
    if wrong:
        raise DataError(f"the loader state is damaged: {wrong}; use another checkpoint.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _buffer_tensors(documents: list[TokenArray]) -> dict[str, Tensor]:
    """Return documents as one tensor of token ids and one of lengths."""
    tokens = np.concatenate([np.empty(0, dtype=np.int32), *documents])
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    return {"buffer_tokens": torch.from_numpy(tokens), "buffer_lengths": lengths}


def _buffer_arrays(tensors: Mapping[str, Any], vocab_size: int) -> list[TokenArray]:
    """Return the documents that `_buffer_tensors` joined, as copies.

    Raises:
        DataError: If the tensors do not fit each other, or hold what is no token id.
    """
    tokens, lengths = _vector(tensors, "buffer_tokens", torch.int32), _vector(tensors, "buffer_lengths", torch.int64)
    if bool((lengths < 1).any()) or int(lengths.sum()) != len(tokens):
        raise DataError(
            f"the loader state is damaged: buffer_lengths must be positive and sum to the {len(tokens):,} "
            "buffer_tokens; use another checkpoint."
        )
    if not len(lengths):
        return []
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise DataError(
            f"the loader state is damaged: buffer_tokens has ids from {int(tokens.min())} to {int(tokens.max())}, and "
            f"the tokenizer has 0 to {vocab_size - 1}; use another checkpoint."
        )
    # Each its own array: a part of a shared one would keep all of it in memory.
    return [part.copy() for part in np.split(tokens.numpy(), np.cumsum(lengths.numpy())[:-1])]


def _vector(tensors: Mapping[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
        kind = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise DataError(
            f"the loader state is damaged: {name} must be one dimension of {dtype} and is {kind:.80}; "
            "use another checkpoint."
        )
    return tensor.cpu()
