"""What a file, folder or repository is, as JSON values: behind `tinygpt info`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinygpt.checkpoint import list_checkpoints, load_state, verify
from tinygpt.cli._words import command
from tinygpt.errors import CheckpointError, ConfigError, TinyGPTError

Facts = dict[str, Any]

_EXTRAS = {
    "tokenizer": "rustbpe",
    "parquet": "pyarrow",
    "zstd": "zstandard",
    "plot": "matplotlib",
    "eval": "lm_eval",
    "cli": "shtab",
    "chat": "prompt_toolkit",
    "serve": "uvicorn",
    "transformers": "transformers",
}


def describe_path(path: Path) -> Facts:
    """Return what a file or folder is and what is known about it.

    Raises:
        ConfigError: If it is nothing that is known here.
    """
    for kind, belongs, describe in _KINDS:
        if belongs(path):
            return {"kind": kind, "path": str(path), **_or_damage(describe, path)}
    text = path.suffix in {".txt", ".jsonl", ".parquet"}
    hint = f" It is text to train on: {command('train', '--depth', '4', '--data.train', str(path))}" if text else ""
    raise ConfigError(
        f"{path} is neither a run, a checkpoint, a model, token shards, a tokenizer, a validation set nor a recipe."
        + hint
    )


def describe_repository(name: str) -> Facts:
    """Return what a repository on the Hub is, from its small files alone.

    Raises:
        HubError: If it cannot be read.
        CheckpointError: If it is no model.
    """
    from tinygpt import hub

    folder = hub.resolve(name, allow_patterns=["*.json"], retries=0)  # asked at a terminal, for a few small files
    return {"kind": "repository", "path": name, **_model(folder)}


def describe_machine() -> Facts:
    """Return versions, devices, attention backends and extras of this installation."""
    import platform
    from importlib.util import find_spec

    import torch

    import tinygpt
    from tinygpt.hardware import memory_bandwidth, peak_flops
    from tinygpt.layers import attention_backends
    from tinygpt.recipe import resolve_device
    from tinygpt.trainer import resolve_precision

    device = resolve_device("auto")
    cuda = device.type == "cuda"
    devices = [
        {
            "name": (name := torch.cuda.get_device_name(index)),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "bfloat16_flops": peak_flops(name),
            "bandwidth": memory_bandwidth(name),
        }
        for index in range(torch.cuda.device_count() if cuda else 0)
    ]
    return {
        "kind": "installation",
        "tinygpt": tinygpt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "attention backends": [backend.name for backend in attention_backends(device) if backend.available],
        "precision": str(resolve_precision("auto", device)).removeprefix("torch."),
        "triton": find_spec("triton") is not None,
        "extras": {extra: find_spec(module) is not None for extra, module in _EXTRAS.items()},
    }


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda path: path.is_dir() and any((path / name).exists() for name in names)


def _is_shards(path: Path) -> bool:
    from tinygpt.data._shards import holds_shards

    return holds_shards(path)


def _or_damage(describe: Callable[[Path], Facts], path: Path) -> Facts:
    try:
        return describe(path)
    except TinyGPTError as error:
        return {"state": f"damaged: {error}"}


def _run(path: Path) -> Facts:
    from tinygpt.metrics import read_metrics

    lines = read_metrics(path / "metrics.jsonl")
    steps = [line for line in lines if line.get("event") == "step"]
    measured = [line for line in lines if line.get("event") == "evaluation"]
    facts: Facts = {"recipe": (path / "recipe.json").exists(), "steps done": len(steps) and steps[-1]["step"] + 1}
    if steps:
        facts |= {"loss": steps[-1].get("loss"), "tokens": steps[-1].get("tokens")}
    if measured:
        facts |= {"bpb": measured[-1].get("bpb"), "validation set": measured[-1].get("data_hash")}
    checkpoints = list_checkpoints(path / "checkpoints")
    facts["checkpoints"] = {folder.name: _damage(folder) or "whole" for folder in checkpoints}
    whole = [folder for folder in checkpoints if facts["checkpoints"][folder.name] == "whole"]
    return {**facts, **(_whole_checkpoint(whole[-1]) if whole else {})}


def _damage(folder: Path) -> str:
    try:
        verify(folder)
    except CheckpointError as error:
        return f"damaged: {error}"
    return ""


def _checkpoint(path: Path) -> Facts:
    verify(path)
    return _whole_checkpoint(path)


def _whole_checkpoint(path: Path) -> Facts:
    state = load_state(path, verified=True)
    facts: Facts = {"state": "whole", "step": state.get("next_step"), "tokens": state.get("tokens")}
    facts["optimizer"] = state.get("optimizer_class")
    loader = state.get("loader") or {}
    facts |= {
        name.replace("_", " "): loader[name]
        for name in ("source_fingerprint", "tokenizer_fingerprint")
        if name in loader
    }
    facts["saved with"] = state.get("environment")
    return {**facts, **(_model(path) if (path / "config.json").exists() else {})}


def _model(path: Path) -> Facts:
    import torch

    from tinygpt.manifest import read_json
    from tinygpt.model import GPT, GPTConfig

    fields = read_json(path / "config.json")
    if fields.pop("model_type", None) != "tinygpt":
        architectures = ", ".join(map(str, fields.get("architectures") or ())) or "an unknown library"
        return {"state": f"of {architectures}; tinygpt import reads those of transformers"}
    blocks = fields.pop("blocks", [])
    fields.pop("format_version", None)
    try:
        config = GPTConfig(**fields)
        with torch.device("meta"):
            counts = GPT.from_config(config).num_parameters()
    except (ConfigError, RuntimeError) as error:
        return {"state": f"damaged: {error}"}
    facts: Facts = {"model": config.model_dump(), "blocks": list(dict.fromkeys(map(str, blocks)))}
    standard = all("mlp=ReluSquaredMLP" in str(block) for block in blocks)
    if standard:
        facts["parameters"] = {**counts._asdict(), "total": counts.total}
    if (path / "model.safetensors").exists():
        facts |= _weights(path / "model.safetensors")
    if (path / "tokenizer_config.json").exists():
        facts |= {f"tokenizer {name}": value for name, value in _or_damage(_tokenizer, path).items()}
    return facts


def _weights(path: Path) -> Facts:
    from math import prod

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            parts = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            dtypes = sorted({part.get_dtype() for part in parts})
            total = sum(prod(part.get_shape()) for part in parts)
    except (OSError, SafetensorError) as error:
        return {"state": f"damaged: {path.name}: {error}"}
    return {"weights": total, "dtypes": dtypes, "file bytes": path.stat().st_size}


def _tokenizer(path: Path) -> Facts:
    from tinygpt.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    return {
        "type": type(tokenizer).__name__,
        "vocab size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint(),
    }


def _shards(path: Path) -> Facts:
    from tinygpt.data import TokenShards

    shards = TokenShards(path)
    shards.verify()
    return {
        "state": "whole",
        "documents": len(shards),
        "tokens": shards.num_tokens,
        "shards": shards.num_shards,
        "text bytes": shards.num_bytes,
        "dtype": str(shards.dtype),
        "source fingerprint": shards.source_fingerprint,
        "tokenizer fingerprint": shards.tokenizer_fingerprint,
    }


def _validation(path: Path) -> Facts:
    from tinygpt.data import ValidationSet

    found = ValidationSet.load(path)
    rows, length = found.token_rows.shape
    return {
        "state": "whole",
        "rows": rows,
        "seq_len": length - 1,
        "tokens": found.num_tokens,
        "text bytes": found.num_bytes,
        "hash": found.hash,
    }


def _recipe(path: Path) -> Facts:
    from tinygpt.recipe import Recipe

    if path.suffix == ".py":
        return {"state": "not looked into, since that would run it; tinygpt plan does"}
    return {"state": "whole", "recipe": json.loads(Recipe.load(path).to_json())}


def _nanochat(path: Path) -> Facts:
    steps = sorted(file.stem.removeprefix("model_") for file in path.glob("model_*.pt"))
    return {"steps": [int(step) for step in steps if step.isdecimal()], "state": "tinygpt import reads it"}


# The first that fits decides.
_KINDS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], Facts]], ...] = (
    ("run", _has("recipe.json", "checkpoints", "metrics.jsonl"), _run),
    ("checkpoint", _has("state.json"), _checkpoint),
    ("token shards", _is_shards, _shards),
    ("model", _has("config.json"), _model),
    ("tokenizer", _has("tokenizer_config.json"), _tokenizer),
    ("nanochat checkpoint", lambda path: path.is_dir() and any(path.glob("model_*.pt")), _nanochat),
    ("validation set", lambda path: path.is_file() and path.suffix == ".safetensors", _validation),
    ("recipe", lambda path: path.is_file() and path.suffix in (".toml", ".json", ".py"), _recipe),
)
