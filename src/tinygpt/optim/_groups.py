"""What a parameter group of MuonAdamW may hold, and its defaults."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tinygpt.errors import ConfigError

DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "first_moment": "float32",
        "second_moment": "element",
        "stochastic_rounding": False,
    },
    "muon": {
        "momentum": 0.95,
        "beta2": 0.9,
        "weight_decay": 0.0,
        "polar_steps": 5,
        "polar_dtype": "auto",
        "row_equilibration": False,
        "norm_renormalization": False,
    },
}
# What schedulers multiply; a group may bring its own.
_INITIAL = ("initial_lr", "initial_weight_decay")


def checked_group(group: dict[str, Any], existing: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return a copy of `group` with defaults filled in, for torch's own `add_param_group`.

    Raises:
        ConfigError: If the group cannot be trained, or repeats a name or a parameter of an existing group.
    """
    kind = group.get("kind")
    if kind not in DEFAULTS:
        raise ConfigError(
            f"a parameter group has kind={kind!r}; choose 'muon' or 'adamw'. "
            "To have the groups built from a model, use MuonAdamW.for_model(model) or param_groups(model, rules)."
        )
    pairs = _named_pairs(group.get("params", ()))
    options = {key: value for key, value in group.items() if key not in ("params", "kind")}
    allowed = ("lr", *DEFAULTS[kind])
    if unknown := sorted(set(options) - {*allowed, *_INITIAL}):
        raise ConfigError(f"a group of kind {kind!r} has no option {', '.join(unknown)}; it has {', '.join(allowed)}.")
    if "lr" not in options:
        raise ConfigError(f"the {kind} group that starts with {pairs[0][0]!r} needs lr.")
    options = DEFAULTS[kind] | options
    check_options(options)
    _check_parameters(kind, pairs, options)
    _check_repeats(pairs, existing)
    options.setdefault("initial_lr", options["lr"])
    options.setdefault("initial_weight_decay", options["weight_decay"])
    return {"params": pairs, "kind": kind, **options}


def _named_pairs(params: Any) -> list[tuple[str, Tensor]]:
    pairs: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    for pair in pairs:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise ConfigError(
                f"a parameter group holds a {type(pair).__name__}; it needs (name, parameter) pairs, because the state "
                "is saved by name. Pass model.named_parameters() instead of model.parameters()."
            )
    if not pairs:
        raise ConfigError("a parameter group has no parameters; leave the group out.")
    return pairs


def check_options(options: dict[str, Any]) -> None:
    """Raise `ConfigError` unless every option has a value that can train."""
    for name in ("lr", "weight_decay", "eps"):
        value = options.get(name, 0.0)
        if not _is_number(value) or not 0 <= value < float("inf"):
            raise ConfigError(f"{name}={value!r} must be a finite number that is not negative.")
    betas = options.get("betas", ())
    if "betas" in options and (not isinstance(betas, tuple | list) or len(betas) != 2):
        raise ConfigError(f"betas={betas!r} must be two numbers.")
    decays = [("momentum", options.get("momentum", 0.0)), ("beta2", options.get("beta2", 0.0))]
    for name, value in [*decays, *(("betas", beta) for beta in betas)]:
        if not _is_number(value) or not 0 <= value < 1:
            raise ConfigError(f"{name}={options[name]!r} must be at least 0 and below 1.")
    polar_steps = options.get("polar_steps", 5)
    if not isinstance(polar_steps, int) or not 1 <= polar_steps <= 5:
        raise ConfigError(f"polar_steps={polar_steps!r} is not possible; choose 1 to 5.")
    if (polar_dtype := options.get("polar_dtype", "auto")) not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"polar_dtype={polar_dtype!r} is not known; choose 'auto', 'float32' or 'bfloat16'.")
    if (second_moment := options.get("second_moment", "element")) not in ("element", "row"):
        raise ConfigError(f"second_moment={second_moment!r} is not known; choose 'element' or 'row'.")
    if (first_moment := options.get("first_moment", "float32")) not in ("float32", "bfloat16"):
        raise ConfigError(f"first_moment={first_moment!r} is not known; choose 'float32' or 'bfloat16'.")
    if not isinstance(rounding := options.get("stochastic_rounding", False), bool):
        raise ConfigError(f"stochastic_rounding={rounding!r} must be True or False.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_parameters(kind: str, pairs: list[tuple[str, Tensor]], options: dict[str, Any]) -> None:
    if wrong := [name for name, param in pairs if not param.is_floating_point()]:
        raise ConfigError(f"only real floating-point parameters can be trained, not {', '.join(wrong)}.")
    if kind == "muon" and (wrong := [f"{name} {tuple(param.shape)}" for name, param in pairs if param.ndim != 2]):
        raise ConfigError(f"Muon updates matrices; give these to a group of kind 'adamw': {', '.join(wrong)}.")
    row_wise = options.get("second_moment") == "row"
    if row_wise and (wrong := [f"{name} {tuple(param.shape)}" for name, param in pairs if param.ndim != 2]):
        raise ConfigError(f"second_moment='row' is for tables, which have two axes, not for {', '.join(wrong)}.")
    if options.get("stochastic_rounding") and (wrong := [n for n, param in pairs if param.dtype == torch.float16]):
        raise ConfigError(f"stochastic_rounding is for bfloat16; {', '.join(wrong)} is stored in float16.")


def _check_repeats(pairs: list[tuple[str, Tensor]], existing: Iterable[dict[str, Any]]) -> None:
    names: set[str] = set()
    owners: dict[int, str] = {}
    for group in existing:
        names.update(group["param_names"])
        owners.update({id(param): name for name, param in zip(group["param_names"], group["params"], strict=True)})
    for name, param in pairs:
        if name in names:
            raise ConfigError(f"the name {name!r} is given twice; every parameter needs its own name.")
        if id(param) in owners:
            raise ConfigError(f"{name!r} is the same parameter as {owners[id(param)]!r}; give it once.")
        names.add(name)
        owners[id(param)] = name
