"""Optimizer state as it is saved: keyed by parameter name, whatever the grouping or stacking."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.optim._groups import DEFAULTS, check_options

VERSION = 1

Group = dict[str, Any]


class StateTensor(NamedTuple):
    """How one state tensor of a parameter is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def state_layout(group: Group, param: Tensor) -> dict[str, StateTensor]:
    """Return the state tensors of a parameter of a group by name: in its own dtype, and at least float32."""
    shape, dtype = tuple(param.shape), torch.promote_types(param.dtype, torch.float32)
    if group["kind"] == "adamw":
        return {
            "exp_avg": StateTensor(shape, torch.bfloat16 if group["first_moment"] == "bfloat16" else dtype),
            "exp_avg_sq": StateTensor((shape[0], 1) if group["second_moment"] == "row" else shape, dtype),
        }
    rows, cols = shape
    return {"momentum": StateTensor(shape, dtype), "second_moment": StateTensor(_factored(rows, cols), dtype)}


def _factored(rows: int, cols: int) -> tuple[int, int]:
    return (rows, 1) if rows >= cols else (1, cols)


def matching_groups(groups: list[Group], state_dict: dict[str, Any]) -> list[Group]:
    """Return for each of `groups` the saved group with the same parameters, after checking the whole state.

    Raises:
        CheckpointError: If the state does not fit the groups; the message lists the names.
    """
    version = state_dict.get("version")
    if version != VERSION:
        hint = "it looks like the state of another optimizer" if version is None else "update tinygpt to read it"
        raise CheckpointError(f"optimizer state has version {version!r}, this tinygpt reads version {VERSION}: {hint}.")
    try:
        return _matching_groups(groups, state_dict)
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"optimizer state is damaged: {type(error).__name__}: {error}.") from None


def _matching_groups(groups: list[Group], state_dict: dict[str, Any]) -> list[Group]:
    if absent := [key for key in ("state", "param_groups") if key not in state_dict]:
        raise CheckpointError(f"optimizer state has no {' and no '.join(absent)}; it is damaged or cut short.")
    state: dict[str, dict[str, Any]] = state_dict["state"]
    saved_groups: list[Group] = state_dict["param_groups"]
    owned = {name for group in groups for name in group["param_names"]}
    grouped = {name for group in saved_groups for name in group["params"]}
    for saved in (set(state), grouped):
        _check_names(owned, saved)
    matched = [_match(group, saved_groups) for group in groups]
    for saved_group in matched:
        options = {key: value for key, value in saved_group.items() if key not in ("params", "param_names", "kind")}
        wanted = {"lr", "initial_lr", "initial_weight_decay", *DEFAULTS[saved_group["kind"]]}
        if unknown := sorted(set(options) - wanted):
            raise CheckpointError(f"optimizer state is damaged: a group should not have {', '.join(unknown)}.")
        check_options(options)
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            _check_entry(name, group, param, state[name])
    return matched


def _check_names(owned: set[str], saved: set[str]) -> None:
    problems = [
        f"{title}: {', '.join(sorted(names))}"
        for title, names in (("missing from the state", owned - saved), ("unknown to the optimizer", saved - owned))
        if names
    ]
    if problems:
        raise CheckpointError(f"optimizer state is of another model; {'; '.join(problems)}.")


def _match(group: Group, saved_groups: list[Group]) -> Group:
    """Find the saved group with the parameters of `group`, in any order."""
    names = set(group["param_names"])
    for saved in saved_groups:
        if set(saved["params"]) != names:
            continue
        if saved["kind"] != group["kind"]:
            raise CheckpointError(
                f"the saved group is of kind {saved['kind']!r}, the optimizer's of kind {group['kind']!r}: "
                f"{', '.join(sorted(names))}. Build the optimizer with the rules it was saved with."
            )
        for option in ("first_moment", "second_moment"):
            default = DEFAULTS["adamw"][option]
            was, wanted = saved.get(option, default), group.get(option, default)
            if was != wanted:
                raise CheckpointError(
                    f"the saved group has {option}={was!r}, the optimizer's has {wanted!r}: "
                    f"{', '.join(sorted(names))}. The one is not the other: build it with {was!r}."
                )
        return saved
    raise CheckpointError(
        f"the state was saved with other groups; none holds exactly {', '.join(sorted(names))}. "
        "Build the optimizer with the rules it was saved with."
    )


def _check_entry(name: str, group: Group, param: Tensor, entry: dict[str, Any]) -> None:
    step = entry.get("step")
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"optimizer state of {name!r} has step={step!r}; it must be an integer from 0.")
    expected = state_layout(group, param) if step > 0 else {}
    tensors = {key: value for key, value in entry.items() if key != "step"}
    if set(tensors) != set(expected):
        raise CheckpointError(
            f"optimizer state of {name!r} at step {step} holds {sorted(tensors)}, it must hold {sorted(expected)}."
        )
    for key, wanted in expected.items():
        given = StateTensor(tuple(tensors[key].shape), tensors[key].dtype)
        if given != wanted:
            raise CheckpointError(
                f"optimizer state {key!r} of {name!r} is {given.dtype} {given.shape}, "
                f"it must be {wanted.dtype} {wanted.shape}."
            )
