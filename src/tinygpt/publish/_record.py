"""What a run wrote down about itself, read back for its card. Whatever is missing stays missing."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from tinygpt.checkpoint import STATE_FILE, checkpoint_folder, checkpoint_step, list_checkpoints
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.manifest import read_json
from tinygpt.metrics import read_metrics
from tinygpt.model import GPTConfig
from tinygpt.model._files import parse_config

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
Step = int | Literal["latest", "best"]


def choose_checkpoint(source: str | Path, step: Step | None = None) -> Path:
    """Return the folder of the model that is meant: a checkpoint of a run, or the folder itself.

    Args:
        source: A run, a checkpoint, or a folder that `save_pretrained` wrote.
        step: Which checkpoint of a run: the steps done, `"latest"`, or `"best"` for the lowest bits per byte among
            those that are left, on the validation set of the last evaluation. `None` is the latest.

    Raises:
        CheckpointError: If there is no model, or the run has no such checkpoint.
        ConfigError: If a step is asked of a folder that is no run, or is neither a number nor one of the words.
    """
    folder = Path(source).expanduser()
    if not str(source) or not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(source)!r}; give a run, a checkpoint or a saved model.")
    if not (folder / "checkpoints").is_dir():
        if not (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder} holds neither checkpoints nor a config.json, so it is no run and no model."
            )
        if step is not None:
            raise ConfigError(f"step={step!r} chooses among the checkpoints of a run, and {folder} is a single model.")
        return folder
    found = {checkpoint_step(path): path for path in list_checkpoints(folder / "checkpoints")}
    if not found:
        raise CheckpointError(f"{folder} has no checkpoint yet.")
    if step is None or step == "latest":
        return found[max(found)]
    if step == "best":
        return found[_best_step(folder, set(found))]
    if not isinstance(step, int) or isinstance(step, bool):
        raise ConfigError(f"step={step!r} is not known; give a number of steps, 'latest' or 'best'.")
    if step not in found:
        there = ", ".join(str(known) for known in sorted(found)[-8:])
        wanted = checkpoint_folder(folder / "checkpoints", step)
        raise CheckpointError(f"there is no checkpoint {wanted}; there are those of steps {there}.")
    return found[step]


def _best_step(run: Path, steps: set[int]) -> int:
    lines = [
        line
        for line in read_metrics(run / "metrics.jsonl")
        if line.get("event") == "evaluation" and isinstance(line.get("bpb"), int | float)
    ]
    # Figures of different validation sets cannot be compared.
    newest = lines[-1].get("data_hash") if lines else None
    figures = {line["step"] + 1: float(line["bpb"]) for line in lines if line.get("data_hash") == newest}
    measured = steps & figures.keys()
    if not measured:
        raise CheckpointError(f"no checkpoint in {run} has an evaluation of its step, so none is known to be the best.")
    return min(measured, key=lambda step: (figures[step], step))


@dataclass(frozen=True)
class RunRecord:
    """A model and what is known about how it came about.

    Attributes:
        name: Name of the run's folder, or of the model's.
        config: The model's config.
        blocks: The classes of each block and its parts, as they were saved.
        step: Steps done; `None` if the folder does not tell.
        parameters: Number of weights by dtype, from the header of the file of weights.
        has_tokenizer: Whether a tokenizer lies beside the weights.
        state: The plain part of the checkpoint's `state.json`.
        metrics: The lines of the run's `metrics.jsonl` up to the checkpoint.
    """

    name: str
    config: GPTConfig
    blocks: list[str]
    step: int | None
    parameters: Counter[str]
    has_tokenizer: bool
    state: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of one kind, such as `"step"` or `"evaluation"`."""
        return [line for line in self.metrics if line.get("event") == kind]

    def each_start(self, describe: Callable[[Callable[..., Any]], Any]) -> str | None:
        """Return what is described of the run's starts, each text once and in order; `None` if nothing is known.

        Args:
            describe: Called for each start with a function from nested keys of its event `run` to the value there,
                `None` where there is none.
        """
        texts = [describe(partial(_value, line)) for line in self.events("run")]
        return "; then ".join(dict.fromkeys(str(text) for text in texts if text is not None)) or None

    def fact(self, *keys: str) -> Any:
        """Return a value of the state by its nested keys; `None` if it is not there."""
        return _value(self.state, *keys)


def _value(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_record(model: Path, *, run: Path | None = None) -> RunRecord:
    """Read the record of a model folder.

    Args:
        model: A checkpoint, or a folder that `save_pretrained` wrote.
        run: The run's folder; `None` for the one that a checkpoint lies in.

    Raises:
        CheckpointError: If there is no readable model.
        DataError: If the run's `metrics.jsonl` is damaged.
    """
    state: Any = read_json(model / STATE_FILE).get("state") if (model / STATE_FILE).exists() else None
    state = state if isinstance(state, dict) else {}
    step = state["next_step"] if isinstance(state.get("next_step"), int) else None
    run = run or run_of(model)
    metrics = read_metrics(run / "metrics.jsonl") if run is not None else []
    known = [line for line in metrics if step is not None and _is_before(line, step)]
    fields = read_json(model / "config.json")
    blocks = fields.get("blocks", [])
    return RunRecord(
        name=(run or model).resolve().name,
        config=parse_config(model / "config.json", fields),
        blocks=[str(block) for block in blocks] if isinstance(blocks, list) else [],
        step=step,
        parameters=_count_parameters(model / "model.safetensors"),
        has_tokenizer=(model / "tokenizer_config.json").exists(),
        state=state,
        metrics=known,
    )


def _is_before(line: dict[str, Any], steps_done: int) -> bool:
    """Return whether a line of the metrics tells of weights that this many steps were done for."""
    step = line.get("step")
    if not isinstance(step, int):
        return False
    # Line N is written when N + 1 steps are done. A start or resume noted there shaped only the steps after it.
    return step + 1 < steps_done if line.get("event") in ("run", "resume") else step < steps_done


def run_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run that a checkpoint lies in, if it lies in one."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else None


def _count_parameters(path: Path) -> Counter[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            counts: Counter[str] = Counter()
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                counts[part.get_dtype()] += prod(part.get_shape())
            return counts
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from None


def weight_bytes(parameters: Counter[str]) -> int | None:
    """Return the bytes of all weights; `None` if a dtype is not known."""
    if parameters.keys() - _BYTES.keys():
        return None
    return sum(_BYTES[dtype] * count for dtype, count in parameters.items())
