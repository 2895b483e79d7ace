"""Which parameter goes into which group: ordered rules on names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from tinygpt.errors import ConfigError

_HEAD_NAME = re.compile(r"(lm_)?head|output|unembed.*|decoder|(to_)?logits|generator|classifier|score")
_EMBEDDING_NAME = re.compile(r"embed|(^|[._])emb([._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """One group: which parameters, which kind, which options.

    Args:
        pattern: Shell-style pattern of the full parameter name, or several: `*` is any text, dots included, `?` one
            character, `[ab]` one of these. Case matters.
        kind: `"muon"` or `"adamw"`.
        options: Options of the group, as in [`MuonAdamW`][tinygpt.optim.MuonAdamW]; `lr` is needed.
        ndim: Match only parameters with this many axes.
        optional: Accept that the rule matches nothing.

    Example:
        ```python
        Rule("blocks.*.weight", kind="muon", options={"lr": 0.02}, ndim=2)
        ```
    """

    pattern: str | tuple[str, ...]
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ndim: int | None = None
    optional: bool = False

    def matches(self, name: str, param: Tensor) -> bool:
        """Return whether the rule applies to a parameter of this name."""
        patterns = (self.pattern,) if isinstance(self.pattern, str) else self.pattern
        return (self.ndim is None or param.ndim == self.ndim) and any(fnmatchcase(name, each) for each in patterns)


def param_groups(model: nn.Module, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """Sort the parameters of a model into groups by rules; the first that matches wins.

    A tied parameter is taken once, under the first of its names. Parameters with `requires_grad=False` are left out.

    Args:
        model: Any module.
        rules: The rules, in order. Each that matches gives one group.

    Returns:
        The groups for [`MuonAdamW`][tinygpt.optim.MuonAdamW], with `(name, parameter)` pairs as `params`.

    Raises:
        ConfigError: If a parameter matches no rule; if a rule matches no parameter and is not optional; if a
            parameter of a Muon group is not a matrix, or is an embedding or head: the weight of an `nn.Embedding`,
            of a module with an attribute `is_lm_head = True`, or of an `nn.Linear` with one output for each entry of
            an embedding that is the only one such or is called `head`, `lm_head`, `decoder`, `logits` or the like,
            or a weight tied to one of those.

    Example:
        ```python
        groups = param_groups(
            model,
            [
                Rule("blocks.*", kind="muon", options={"lr": 0.02}, ndim=2),
                Rule("*", kind="adamw", options={"lr": 3e-4}),
            ],
        )
        optimizer = MuonAdamW(groups)
        ```
    """
    model = plain_model(model)
    members: list[list[tuple[str, Tensor]]] = [[] for _ in rules]
    unmatched = []
    for name, param in _trainable(model):
        for rule, pairs in zip(rules, members, strict=True):
            if rule.matches(name, param):
                pairs.append((name, param))
                break
        else:
            unmatched.append(f"{name} {tuple(param.shape)}")
    if unmatched:
        raise ConfigError(
            f"no rule matches {', '.join(unmatched)}. Add a rule, or set requires_grad=False to leave them untrained."
        )
    _refuse_idle_rules(model, rules, members)
    reserved = embeddings_and_heads(model)
    for rule, pairs in zip(rules, members, strict=True):
        if rule.kind == "muon":
            _refuse_wrong_matrices(pairs, reserved)
    return [
        {"params": pairs, "kind": rule.kind, **rule.options}
        for rule, pairs in zip(rules, members, strict=True)
        if pairs
    ]


def plain_model(model: nn.Module) -> nn.Module:
    """Return the module inside what `torch.compile(model)` returned, so that names are the same with and without."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}, not a module; give the model itself, not its parameters."
        )
    return getattr(model, "_orig_mod", model)


def _trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    pairs: list[tuple[str, Tensor]] = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not pairs:
        raise ConfigError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train.")
    return pairs


def _refuse_idle_rules(model: nn.Module, rules: Sequence[Rule], members: list[list[tuple[str, Tensor]]]) -> None:
    # A rule that names only frozen parameters or the second name of a tied one did find what it was written for.
    everything = list(model.named_parameters(remove_duplicate=False))
    taken = {name for pairs in members for name, _ in pairs}
    for rule, pairs in zip(rules, members, strict=True):
        if pairs or rule.optional:
            continue
        hits = [name for name, param in everything if rule.matches(name, param)]
        if any(name not in taken for name in hits):
            continue
        why = f"earlier rules take {', '.join(hits)}" if hits else "no parameter has such a name"
        raise ConfigError(f"the rule {rule.pattern!r} matches nothing: {why}. Correct it or set optional=True.")


def _refuse_wrong_matrices(pairs: list[tuple[str, Tensor]], reserved: Mapping[int, str]) -> None:
    if wrong := [f"{name} {tuple(param.shape)}" for name, param in pairs if param.ndim != 2]:
        raise ConfigError(f"Muon updates matrices; use kind='adamw', or ndim=2 in the rule, for {', '.join(wrong)}.")
    if wrong := [f"{name} ({reserved[id(param)]})" for name, param in pairs if id(param) in reserved]:
        raise ConfigError(
            f"a Muon group holds {', '.join(wrong)}. Muon fits matrices inside the network: orthogonalizing the rows "
            "of a vocabulary moves rare tokens as far as frequent ones. Use kind='adamw'."
        )


def embeddings_and_heads(model: nn.Module) -> dict[int, str]:
    """Return what each embedding or head parameter is, by `id`."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    vocab_sizes = {module.num_embeddings for module in embeddings}
    found = {id(module.weight): "an embedding" for module in embeddings}
    declared = [module for module in model.modules() if getattr(module, "is_lm_head", False) is True]
    for module in declared:
        found |= {id(param): "a head" for param in module.parameters() if id(param) not in found}
    # With one output for each entry of a vocabulary: surely a head if it is the only such layer or is called one. A
    # feed-forward layer may have that many outputs by chance, but hardly only once and beside an undeclared head.
    wide = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in declared and module.out_features in vocab_sizes
    ]
    for name, module in wide:
        alone = len(wide) == 1 and not declared and module.in_features != module.out_features
        if alone or _HEAD_NAME.fullmatch(name.rpartition(".")[2]):
            found.setdefault(id(module.weight), "a head")
    return found


def default_groups(
    model: nn.Module, *, muon: Mapping[str, Any], adamw: Mapping[str, Any], adamw_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Sort the parameters of any module into a Muon and an AdamW group, as `MuonAdamW.for_model` documents."""
    model = plain_model(model)
    reserved = embeddings_and_heads(model)
    extra = Rule(tuple(adamw_names), kind="adamw")
    pairs = _trainable(model)
    for pattern in adamw_names:
        if not any(fnmatchcase(name, pattern) for name, _ in pairs):
            raise ConfigError(f"adamw_names: {pattern!r} matches no parameter.")
    matrices: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, param in pairs:
        # A single row or column has no directions to even out; a bare parameter such as `pos` is a table.
        is_matrix = param.ndim == 2 and min(param.shape) > 1 and "weight" in name.rpartition(".")[2]
        kept_out = id(param) in reserved or _EMBEDDING_NAME.search(name) or extra.matches(name, param)
        (matrices if is_matrix and not kept_out else others).append((name, param))
    groups = [{"params": matrices, "kind": "muon", **muon}, {"params": others, "kind": "adamw", **adamw}]
    return [group for group in groups if group["params"]]
