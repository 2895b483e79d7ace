"""What a run is made of, as JSON: written to its metrics.jsonl at each start, read by `tinygpt.report`."""

import contextlib
import math
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tinygpt.config import Config
from tinygpt.metrics import gpu_name, peak_flops
from tinygpt.model import describe_blocks
from tinygpt.schedules import Schedule

__all__ = ["RECORD_VERSION", "describe_run"]

RECORD_VERSION = 1
"""Version of the layout that `describe_run` documents."""

# Where a run writes is not what it is: the same run elsewhere has the same record.
_NOT_RECORDED = ("out_dir",)


def describe_run(
    *,
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    settings: Mapping[str, Any],
    schedules: Mapping[str, Schedule],
    precision: torch.dtype,
    version: str,
    next_step: int = 0,
    step_tokens: int | None = None,
    loss: str = "next_token_loss",
    micro_batch_rows: int | None = None,
    world_size: int = 1,
) -> dict[str, Any]:
    """Return the facts of a run that its metrics do not tell, for `MetricsFile.write("run", step, **facts)`.

    Args:
        model: The model; one wrapped by `torch.compile` is looked into.
        optimizer: Its optimizer. A group is described by what it was made with, not by what a schedule made of it.
        loader: Where batches come from; what it does not tell stays `None`.
        settings: Settings of the loop, such as those of a `TrainerConfig`; `out_dir` is left out.
        schedules: As given to the trainer.
        precision: Dtype of matrix products.
        version: The version of tinygpt.
        next_step: The step that comes next: 0, or that of the resume.
        step_tokens: Tokens of an optimizer step.
        loss: Name of the loss function.
        micro_batch_rows: Rows of the loader's batches that are computed at a time; `None` for all.
        world_size: Number of processes.

    Returns:
        JSON values under these keys. Keys may be added; a change of meaning raises `record_version`.

        - `record_version`, `next_step`
        - `environment`: versions of `tinygpt`, `torch`, `python`; `system`, `threads`, `world_size`; of the device
            `device`, `device_name`, `device_memory_bytes`, `peak_flops`
        - `precision`, `loss`, `seed`, `settings`
        - `model`: `name`, `config`, `parameters` by role, `num_parameters`, `num_trainable`, `weight_bytes`,
            `flops_per_token`, and `blocks`, each a `description` and the `layers` it is true of
        - `optimizer`: `name`, and for each of its `groups` `name`, `kind`, `num_tensors`, `num_parameters`, `settings`
        - `schedules`: how each was made
        - `batch`: `tokens`, `rows`, `seq_len`, `micro_batches` of the loader, and `micro_batch_rows`
        - `data`: `fingerprint`, `source_fingerprint`, `tokenizer_fingerprint`, `tokenizer`, `vocab_size`, `settings`

    Example:
        ```python
        import tinygpt
        import torch
        from tinygpt import GPT, GPTConfig
        from tinygpt.data import BatchLoader, embedded_corpus
        from tinygpt.optim import MuonAdamW
        from tinygpt.run_record import describe_run
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=64))
        facts = describe_run(
            model=model,
            optimizer=MuonAdamW.for_model(model),
            loader=BatchLoader(embedded_corpus(), ByteTokenizer(), rows=2, seq_len=64, overflow="carry"),
            settings={"num_steps": 100},
            schedules={},
            precision=torch.float32,
            version=tinygpt.__version__,
        )
        facts["model"]["parameters"]["head"]
        ```
    """
    model = getattr(model, "_orig_mod", model)
    device = next(model.parameters()).device
    rows, seq_len = (getattr(loader, name, None) for name in ("rows", "seq_len"))
    micro_batch = rows * seq_len * world_size if rows and seq_len else None
    tokens = step_tokens or micro_batch
    record = {
        "record_version": RECORD_VERSION,
        "next_step": next_step,
        "environment": {"tinygpt": version, **_environment(device, precision), "world_size": world_size},
        "precision": precision,
        "loss": loss,
        "seed": torch.initial_seed(),
        "settings": {key: value for key, value in settings.items() if key not in _NOT_RECORDED},
        "model": _model(model, seq_len),
        "optimizer": {
            "name": type(optimizer).__name__,
            "groups": [_group(index, group, model) for index, group in enumerate(optimizer.param_groups)],
        },
        "schedules": dict(schedules),
        "batch": {
            "tokens": tokens,
            "rows": rows,
            "seq_len": seq_len,
            "micro_batches": tokens // micro_batch if tokens and micro_batch else None,
            "micro_batch_rows": micro_batch_rows,
        },
        "data": _data(loader),
    }
    plain: dict[str, Any] = _plain(record)
    return plain


def _environment(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_name": gpu_name(device) or _processor(),
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "peak_flops": peak_flops(device, precision),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str | None:
    """Return the name of the processor; Linux tells it nowhere but in a file, of which some machines have none."""
    with contextlib.suppress(OSError, UnicodeError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.processor() or None


def _model(model: nn.Module, seq_len: int | None) -> dict[str, Any]:
    config, blocks = getattr(model, "config", None), getattr(model, "blocks", None)
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    counts = getattr(model, "num_parameters", None)
    flops = getattr(model, "flops_per_token", None)
    layers: dict[str, list[int]] = {}
    for layer, text in enumerate(describe_blocks(blocks) if isinstance(blocks, nn.ModuleList) else ()):
        layers.setdefault(text, []).append(layer)
    return {
        "name": type(model).__name__,
        "config": config.model_dump() if isinstance(config, Config) else None,
        "parameters": counts()._asdict() if callable(counts) else {"all": total},
        "num_parameters": total,
        "num_trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "blocks": [{"description": text, "layers": where} for text, where in layers.items()],
        "flops_per_token": flops(seq_len) if callable(flops) and seq_len else None,
    }


def _group(index: int, group: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    names = group.get("param_names") or [
        name for name, parameter in model.named_parameters() if any(parameter is first for first in group["params"][:1])
    ]
    options = {
        key: group.get(f"initial_{key}", value)  # schedulers keep there what the group was made with
        for key, value in group.items()
        if key not in ("params", "param_names", "kind") and not key.startswith("initial_")
    }
    return {
        "name": names[0] if names else str(index),
        "kind": group.get("kind"),
        "num_tensors": len(group["params"]),
        "num_parameters": sum(parameter.numel() for parameter in group["params"]),
        "settings": options,
    }


def _data(loader: Any) -> dict[str, Any]:
    tokenizer, fingerprint = getattr(loader, "tokenizer", None), getattr(loader, "fingerprint", None)
    state = loader.state_dict() if hasattr(loader, "state_dict") else {}
    return {
        "fingerprint": fingerprint() if callable(fingerprint) else None,
        "source_fingerprint": state.get("source_fingerprint"),
        "tokenizer_fingerprint": state.get("tokenizer_fingerprint"),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "vocab_size": getattr(tokenizer, "vocab_size", None),
        "settings": state.get("settings"),
    }


def _plain(value: Any) -> Any:
    """Return JSON values; what JSON does not know becomes text, without an address that differs in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    text = repr(value)
    return f"a {type(value).__name__}" if " at 0x" in text else text
