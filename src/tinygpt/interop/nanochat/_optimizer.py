"""nanochat's optimizer state, for a run that goes on here."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinygpt.errors import CheckpointError
from tinygpt.interop.nanochat._checkpoint import find_step, read_tensors
from tinygpt.interop.nanochat._names import MATRICES, SCALES, nanochat_name
from tinygpt.optim import MuonAdamW

_FILE = re.compile(r"optim_(\d+)_rank(\d+)\.pt")
# Tensors below this many elements are kept whole by every rank, all others in equal slices.
_SHARDED_FROM = 1024
_OPTIONS = {
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "muon": ("lr", "momentum", "beta2", "weight_decay", "ns_steps"),
}
_OURS = {"ns_steps": "polar_steps"}  # all others have the same name here
_ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
_MUON_MOMENTS = {"momentum_buffer": "momentum", "second_momentum_buffer": "second_moment"}


class _Group(NamedTuple):
    """A group as nanochat makes it: all of one kind, those of Muon of one shape too."""

    kind: str
    shapes: dict[str, tuple[int, ...]]


class _Entry(NamedTuple):
    """The state of one of nanochat's parameters."""

    step: int | None
    tensors: dict[str, Tensor]


def load_optimizer_state(folder: str | Path, optimizer: MuonAdamW, step: int | None = None) -> int:
    """Give an optimizer the moments and the rates that a nanochat run was saved with.

    The state of several processes is put together; all their files have to be there. Rates, betas and weight
    decay of each group become those of the file, `initial_lr` included, so make the optimizer and load this before
    the `Trainer`, which reads them. Two things are in nanochat's code alone and stay as the optimizer has them:
    `row_equilibration` and `norm_renormalization` (both on in nanochat of July 2026, off in May), and
    the `initial_weight_decay` of Muon, which its schedule multiplies.

    Args:
        folder: The checkpoint's folder, with `optim_NNNNNN_rankR.pt`.
        optimizer: Over the parameters of the loaded model, grouped as by `nanochat_rules` or finer.
        step: Which one; `None` for the newest.

    Returns:
        The step.

    Raises:
        CheckpointError: If a file is missing, damaged or of another optimizer (nanochat's two of before February 2026
            for instance), or state and optimizer do not fit; the optimizer has not been changed then.

    References:
        `MuonAdamW` and `DistMuonAdamW` of [nanochat](https://github.com/karpathy/nanochat): the state of Muon is
        stacked by shape and dealt to ranks by matrices, that of AdamW by rows. Moments it stored in bfloat16 are
        widened to float32, but for a `first_moment="bfloat16"`. Muon counts no steps there; here they are those of
        AdamW.

    Example:
        ```python no-run: needs a checkpoint
        model, tokenizer, metadata = load_checkpoint("base_checkpoints/d12")
        optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=model.config.dim)))
        load_optimizer_state("base_checkpoints/d12", optimizer, metadata.step)
        ```
    """
    folder = Path(folder)
    step = find_step(folder, step, _FILE)
    shards = _read_shards(folder, step)
    try:
        groups = _nanochat_groups(optimizer)
        entries, options = _merge(groups, shards)
        optimizer.load_state_dict(_our_state(optimizer, entries, options))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}, step {step}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{folder}, step {step}: the optimizer state is damaged ({error!r}).") from None
    return step


def _read_shards(folder: Path, step: int) -> list[dict[str, Any]]:
    paths: dict[int, Path] = {}
    for path in folder.iterdir():
        if (match := _FILE.fullmatch(path.name)) and int(match[1]) == step:
            paths[int(match[2])] = path
    if missing := sorted(set(range(max(paths))) - set(paths)):
        raise CheckpointError(
            f"{folder}, step {step}: the state of rank {', '.join(map(str, missing))} is missing; each process wrote "
            "its own file, and all are needed."
        )
    ordered = [paths[rank] for rank in sorted(paths)]
    shards = [read_tensors(path) for path in ordered]
    for path, shard in zip(ordered, shards, strict=True):
        if isinstance(shard, list):
            raise CheckpointError(
                f"{path} holds two optimizers, as nanochat had before February 2026; they keep other moments than "
                "today's, so start with a new optimizer."
            )
        if not isinstance(shard, dict) or not shard.get("state") or not shard.get("param_groups"):
            raise CheckpointError(f"{path} does not hold the state of an optimizer that has made a step.")
    return shards


def _nanochat_groups(optimizer: MuonAdamW) -> list[_Group]:
    """Return the groups that nanochat makes of the same parameters, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            try:
                theirs, place = nanochat_name(name)
            except KeyError:
                raise CheckpointError(f"the optimizer trains {name}, which nanochat's models do not have.") from None
            shapes[theirs] = tuple(param.shape) if place is None else (max(place + 1, *shapes.get(theirs, (0,))),)
    tables = sorted(
        (name for name in shapes if name.startswith("value_embeds.")), key=lambda name: int(name.split(".")[1])
    )
    order = [
        ["lm_head.weight"],
        ["transformer.wte.weight"],
        tables,
        *([name] for name in SCALES),
        ["smear_gate.weight", "smear_lambda", "backout_lambda"],
    ]
    groups = [_Group("adamw", {name: shapes[name] for name in names if name in shapes}) for names in order]
    matrices = sorted((name for name in shapes if name.startswith("transformer.h.")), key=_place_in_model)
    groups += [
        _Group("muon", {name: shape for name in matrices if shapes[name] == shape})
        for shape in sorted({shapes[name] for name in matrices})
    ]
    return [group for group in groups if group.shapes]


def _place_in_model(name: str) -> tuple[int, int]:
    _, _, layer, part, matrix, _ = name.split(".")
    return int(layer), list(MATRICES).index(f"{part}.{matrix}")


def _merge(groups: list[_Group], shards: list[dict[str, Any]]) -> tuple[dict[str, _Entry], dict[str, dict[str, Any]]]:
    """Return state and options of each of nanochat's parameters, put together from all ranks."""
    entries: dict[str, _Entry] = {}
    options: dict[str, dict[str, Any]] = {}
    for shard in shards:
        found = [(saved.get("kind"), len(saved["params"])) for saved in shard["param_groups"]]
        expected = [(group.kind, len(group.shapes)) for group in groups]
        if found != expected:
            raise CheckpointError(
                f"the saved groups are {_counts(found)}, and this model makes {_counts(expected)}: "
                "the state is of another model or of another version of nanochat."
            )
    for index, group in enumerate(groups):
        saved = shards[0]["param_groups"][index]
        chosen = {"kind": group.kind} | {_OURS.get(name, name): saved[name] for name in _OPTIONS[group.kind]}
        chosen["initial_lr"] = saved.get("initial_lr", saved["lr"])
        if group.kind == "adamw":  # that of Muon follows a schedule, and what it began with is not written down
            chosen["initial_weight_decay"] = saved["weight_decay"]
        options |= dict.fromkeys(group.shapes, chosen)
        places = [shard["param_groups"][index]["params"] for shard in shards]
        if group.kind == "muon":
            states = [shard["state"][ids[0]] for shard, ids in zip(shards, places, strict=True)]
            entries |= _muon_entries(group, states)
        else:
            for number, (name, shape) in enumerate(group.shapes.items()):
                states = [shard["state"][ids[number]] for shard, ids in zip(shards, places, strict=True)]
                entries[name] = _adamw_entry(name, shape, states)
    return entries, options


def _counts(groups: Iterable[tuple[str | None, int]]) -> str:
    return ", ".join(f"{kind} of {count}" for kind, count in groups)


def _adamw_entry(name: str, shape: tuple[int, ...], states: list[dict[str, Any]]) -> _Entry:
    steps = {int(state["step"]) for state in states}
    if len(steps) > 1:
        raise CheckpointError(f"the files are of different runs: {name} was updated {sorted(steps)} times.")
    numel = torch.Size(shape).numel()
    tensors = {}
    for key in _ADAMW_MOMENTS:
        parts = [state[key] for state in states]
        if numel < _SHARDED_FROM:
            if not all(torch.equal(part, parts[0]) for part in parts):
                raise CheckpointError(f"the files are of different runs: their {key} of {name} are not the same.")
            parts = parts[:1]
        tensors[key] = _joined(parts, shape, key, name)
    return _Entry(steps.pop(), tensors)


def _muon_entries(group: _Group, states: list[dict[str, Any]]) -> dict[str, _Entry]:
    """Take apart the stacks of one shape; with several ranks zeros may fill up the last ones."""
    count, (rows, cols) = len(group.shapes), next(iter(group.shapes.values()))
    padded = -(-count // len(states)) * len(states)
    factored = (rows, 1) if rows >= cols else (1, cols)
    first = next(iter(group.shapes))
    stacks = {}
    for (theirs, ours), shape in zip(_MUON_MOMENTS.items(), ((rows, cols), factored), strict=True):
        stacks[ours] = _joined([state[theirs] for state in states], (padded, *shape), theirs, f"the group of {first}")
    return {
        name: _Entry(None, {key: stack[index] for key, stack in stacks.items()})
        for index, name in enumerate(group.shapes)
    }


def _joined(parts: list[Tensor], shape: tuple[int, ...], key: str, name: str) -> Tensor:
    """Return equal slices as the one tensor of this shape that they are of."""
    each = (shape[0] // len(parts), *shape[1:])
    if shape[0] % len(parts) or any(tuple(part.shape) != each for part in parts):
        found = " + ".join(str(tuple(part.shape)) for part in parts[:4])
        raise CheckpointError(
            f"{key} of {name} is {found} and must make up {shape}: the state is of another model, or of more "
            f"processes than the {len(parts)} whose files are there."
        )
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _our_state(optimizer: MuonAdamW, entries: dict[str, _Entry], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what `MuonAdamW.load_state_dict` takes."""
    steps = max(entry.step for entry in entries.values() if entry.step is not None)
    own = optimizer.state_dict()
    for group, live in zip(own["param_groups"], optimizer.param_groups, strict=True):
        chosen: dict[str, Any] = {}
        for name, param in zip(group["params"], live["params"], strict=True):
            theirs, place = nanochat_name(name)
            if group["kind"] != options[theirs]["kind"] or (chosen and chosen != options[theirs]):
                raise CheckpointError(
                    f"the {group['kind']} group that starts with {group['params'][0]} holds {name}, which nanochat "
                    "trains with other settings; group the parameters by nanochat_rules."
                )
            chosen = options[theirs]
            entry = entries[theirs]
            wide = torch.promote_types(param.dtype, torch.float32)
            dtypes = {"exp_avg": torch.bfloat16 if live.get("first_moment") == "bfloat16" else wide}
            own["state"][name] = {"step": steps if entry.step is None else entry.step} | {
                key: (tensor if place is None else tensor[place : place + 1]).to(dtypes.get(key, wide))
                for key, tensor in entry.tensors.items()
            }
        group.update(chosen)
    return own
