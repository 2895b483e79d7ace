"""A checkpoint folder of nanochat: finding its files, reading them without trusting them."""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinygpt.errors import CheckpointError
from tinygpt.interop.nanochat._convert import convert_state_dict
from tinygpt.interop.nanochat._tokenizer import load_tokenizer_pickle
from tinygpt.layers import RotaryEmbedding
from tinygpt.manifest import read_json
from tinygpt.model import GPT, check_device
from tinygpt.model._files import check_dtype
from tinygpt.tokenizer import BPETokenizer, load_tokenizer_json

_MODEL_FILE = re.compile(r"model_(\d+)\.pt")


@dataclass(frozen=True)
class Metadata:
    """What nanochat wrote beside the weights, as plain data.

    Attributes:
        step: Optimizer steps done; the next one has this number.
        val_bpb: Validation bits per byte at that step, if it was measured.
        batch_tokens: Tokens of a step, if known.
        elapsed_seconds: Training time so far, 0 if unknown.
        model_config: nanochat's config of the model.
        user_config: Arguments of the training script.
        loop_state: Smoothed loss, best validation and time so far.
        fields: The whole file.
    """

    step: int
    val_bpb: float | None
    batch_tokens: int | None
    elapsed_seconds: float
    model_config: dict[str, Any]
    user_config: dict[str, Any]
    loop_state: dict[str, Any]
    fields: dict[str, Any]

    @property
    def tokens(self) -> int | None:
        """Tokens trained on so far, if the size of a step is known."""
        return None if self.batch_tokens is None else self.step * self.batch_tokens


def load_checkpoint(
    folder: str | Path,
    step: int | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = "auto",
    **constants: float | None,
) -> tuple[GPT, BPETokenizer | None, Metadata]:
    """Load model, tokenizer and metadata of a nanochat checkpoint; nothing in it is executed.

    Args:
        folder: The folder with `model_NNNNNN.pt` and `meta_NNNNNN.json`, such as `base_checkpoints/d12`.
        step: Which one; `None` for the newest.
        device: Where to put the weights.
        dtype: Cast the weights. `None` does as nanochat: on a CUDA device they stay as they are stored, token and
            value embeddings usually in bfloat16; elsewhere all become float32, which loses nothing.
        tokenizer: The folder of the tokenizer, or the file itself. `"auto"` looks in the checkpoint's folder, in a
            `tokenizer` folder within it, and where nanochat keeps it, `../../tokenizer`; `None` looks nowhere.
        **constants: As in [`convert_state_dict`][tinygpt.interop.nanochat.convert_state_dict], for a checkpoint of
            changed code.

    Returns:
        The model, the tokenizer or `None` if there is none, and the metadata.

    Raises:
        CheckpointError: If there is no such checkpoint, a file is missing, damaged or holds anything but tensors, the
            weights do not fit the config, the step in the metadata is another, or the tokenizer has
            another vocabulary.
        DataError: If the tokenizer cannot be read.
        ConfigError: If `dtype`, `device` or a constant is not usable.

    Example:
        ```python no-run: needs a checkpoint
        model, tokenizer, metadata = load_checkpoint("nanochat/base_checkpoints/d12")
        print(metadata.step, metadata.val_bpb)
        ```
    """
    check_dtype(dtype)
    folder, device = Path(folder), check_device(device)
    step = find_step(folder, step, _MODEL_FILE)
    metadata = _read_metadata(folder / f"meta_{step:06d}.json", step)
    found = None if tokenizer is None else _find_tokenizer(folder, tokenizer)
    loaded_tokenizer = None if found is None else _read_tokenizer(found, metadata)

    path = folder / f"model_{step:06d}.pt"
    state_dict = read_tensors(path)
    try:
        config, weights = convert_state_dict(state_dict, metadata.model_config, **constants)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if sum(tensor.nbytes for tensor in weights.values()) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its weights would take more bytes than the file has.")
    if dtype is None and device.type != "cuda":
        dtype = torch.float32
    with torch.device("meta"):
        model = GPT.from_config(config)
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):  # its tables are computed, not saved
            module.to_empty(device=device)  # which fills them
    # Copied out of the mapped file, which nanochat writes in place when a run saves the same step again.
    model.load_state_dict({k: v.to(device, dtype, copy=True) for k, v in weights.items()}, strict=True, assign=True)
    return model, loaded_tokenizer, metadata


def find_step(folder: Path, step: int | None, pattern: re.Pattern[str]) -> int:
    """Return the step asked for, or the newest, among files whose names match; group 1 is the step.

    Raises:
        CheckpointError: If it is not there; the message says which are.
    """
    if not folder.is_dir():
        hint = f"; it is a file, give its folder {folder.parent}" if folder.is_file() else ""
        raise CheckpointError(f"there is no folder {folder}{hint}.")
    steps = sorted({int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))})
    if not steps:
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("model_*.pt")))
        hint = f"; its folders {', '.join(inside)} do, give one of them" if inside else ""
        name = pattern.pattern.replace(r"(\d+)", "N").replace("\\", "")
        raise CheckpointError(f"{folder} holds no file named like {name}{hint}.")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"{folder} has no step {step!r}; it has {', '.join(map(str, steps))}.")
    return step


def read_tensors(path: Path) -> Any:
    """Return what `torch.save` wrote, tensors mapped from the file, if it is tensors and plain containers alone.

    Raises:
        CheckpointError: If it cannot be read or holds anything else.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except Exception as error:  # damaged bytes can make torch's reader fail in any way
        # torch's own text goes on to say how to load it unsafely.
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(
            f"{path} is damaged, older than torch's zip format, or holds more than tensors, and was not loaded "
            f"({type(error).__name__}: {reason})"
        ) from None


def _check_archive(path: Path) -> None:
    """Read the file through and compare its checksums, which torch leaves unread when it maps the file.

    Raises:
        BadZipFile: If one differs, or a part is compressed, which torch's are not.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not stored or sum(part.file_size for part in parts) > path.stat().st_size:
            raise zipfile.BadZipFile("its parts are compressed or overlap")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _read_metadata(path: Path, step: int) -> Metadata:
    fields = read_json(path)
    if not isinstance(fields.get("model_config"), dict):
        raise CheckpointError(f"{path} is damaged: it has no model_config.")
    user_config, loop_state = (_part(fields, name, path) for name in ("user_config", "loop_state"))
    if fields.get("step", step) != step:
        raise CheckpointError(
            f"{path} is of step {fields['step']!r} by its own account; the names of files were changed."
        )
    # Until December 2025 the size of a step was among the arguments alone, where -1 left it to the script.
    sizes = (fields.get("total_batch_size"), user_config.get("total_batch_size"))
    return Metadata(
        step=step,
        val_bpb=_number(fields.get("val_bpb"), "val_bpb", path),
        batch_tokens=next((size for size in sizes if type(size) is int and size > 0), None),
        elapsed_seconds=_number(loop_state.get("total_training_time"), "total_training_time", path) or 0.0,
        model_config=fields["model_config"],
        user_config=user_config,
        loop_state=loop_state,
        fields=fields,
    )


def _part(fields: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    part = fields.get(name) or {}
    if not isinstance(part, dict):
        raise CheckpointError(f"{path} is damaged: its {name} is no JSON object.")
    return part


def _number(value: Any, name: str, path: Path) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise CheckpointError(f"{path} is damaged: its {name} is {value!r} and not a number.")
    return None if value is None else float(value)


def _find_tokenizer(folder: Path, tokenizer: str | Path) -> Path | None:
    if tokenizer != "auto":
        path = Path(tokenizer)
        if path.is_file():
            return path
        if (found := _tokenizer_in(path)) is None:
            raise CheckpointError(f"{path} holds neither tokenizer.pkl nor tokenizer.json.")
        return found
    places = (folder, folder / "tokenizer", folder.absolute().parent.parent / "tokenizer")
    return next((found for place in places if (found := _tokenizer_in(place))), None)


def _tokenizer_in(folder: Path) -> Path | None:
    return next((path for name in ("tokenizer.pkl", "tokenizer.json") if (path := folder / name).is_file()), None)


def _read_tokenizer(path: Path, metadata: Metadata) -> BPETokenizer:
    tokenizer = load_tokenizer_json(path) if path.suffix == ".json" else load_tokenizer_pickle(path)
    if tokenizer.vocab_size != metadata.model_config.get("vocab_size"):
        raise CheckpointError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, the model "
            f"{metadata.model_config.get('vocab_size')}: it is another run's. Give the right one, or tokenizer=None."
        )
    return tokenizer
