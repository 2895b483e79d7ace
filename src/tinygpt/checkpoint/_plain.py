"""A state as JSON and tensors: nested values in, a document and named tensors out, and back."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tinygpt.errors import CheckpointError


class StateSnapshot(NamedTuple):
    """A state taken apart, as `save_state` writes it.

    Attributes:
        document: JSON values, with marks where the tensors were.
        tensors: By name; those of the optimizer begin with `optimizer/`.
    """

    document: Any
    tensors: dict[str, Tensor]


def take_apart(state: dict[str, Any]) -> StateSnapshot:
    """Separate what JSON can hold from the tensors, which are the live ones.

    Args:
        state: Nested dicts, lists and tuples of numbers, strings, booleans, `None` and tensors.

    Raises:
        CheckpointError: If the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    return StateSnapshot(_without_tensors(state, tensors, ()), tensors)


def put_together(snapshot: StateSnapshot) -> Any:
    """Return what was taken apart; a document from outside may raise `KeyError`, `TypeError` or `ValueError`."""
    return _with_tensors(snapshot.document, snapshot.tensors)


def _without_tensors(value: Any, tensors: dict[str, Tensor], path: tuple[str, ...]) -> Any:
    """Move tensors into `tensors` under their path, and mark what JSON would lose: tuples, keys that are no strings."""
    if isinstance(value, Tensor):
        name = "/".join(path)
        while name in tensors:
            name += "'"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, dict):
        items = [(key, _without_tensors(item, tensors, (*path, str(key)))) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$items": [[_without_tensors(key, tensors, path), item] for key, item in items]}
    if isinstance(value, tuple | list):
        parts = [_without_tensors(item, tensors, (*path, str(index))) for index, item in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"a checkpoint holds numbers, strings and tensors; {type(value).__name__} is none of them"
        + (f", and that is what {'/'.join(path)} of the state is." if path else ".")
    )


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_with_tensors(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {_with_tensors(k, tensors): _with_tensors(v, tensors) for k, v in value["$items"]}
    return {key: _with_tensors(item, tensors) for key, item in value.items()}
