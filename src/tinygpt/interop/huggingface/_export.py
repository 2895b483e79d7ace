"""Writing a folder that transformers loads."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tinygpt import __version__, hub
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.interop.huggingface._stock import (
    StockMatch,
    family_of,
    layer_windows,
    match,
    stock_config,
    stock_weights,
)
from tinygpt.interop.huggingface._structure import Structure, load_exportable, structure_of, unwrapped, weights_of
from tinygpt.model import GPT, check_tokenizer, independent_tensors
from tinygpt.model._files import check_dtype
from tinygpt.tokenizer import Tokenizer, load_tokenizer, save_tokenizer_json

CODE_FILE = "modeling_tinygpt.py"
MODEL_TYPE = "tinygpt_transformers"
_CLASS = "TinyGPTForCausalLM"
_CODE = Path(__file__).with_name("_modeling.py")

# What export writes, the config last: a folder without one is none that transformers loads.
_WRITTEN = (
    CODE_FILE,
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
)
# What a folder may hold besides: a clone of a repository, and a page about the model.
_WELCOME = {".git", ".gitattributes", ".cache", "README.md", "LICENSE"}
_TEMPORARY = ".export-"


def export(
    model: GPT | str | Path,
    out_folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    stock: bool = True,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> StockMatch:
    """Write a model as a folder that `transformers` loads; transformers itself is not needed for that.

    If a class of transformers computes exactly what the model does, the folder is one of that class. Otherwise it
    brings one file of code, `modeling_tinygpt.py`, and is loaded with `trust_remote_code=True`; whoever loads it needs
    torch and transformers 5, not tinygpt. Either way `AutoModelForCausalLM` gives the model's logits and generates with
    a cache, and `AutoTokenizer` gives the tokenizer's ids.

    Args:
        model: A model, or a folder or Hub name that `GPT.from_pretrained` takes.
        out_folder: Where to write; new or empty, or with `overwrite` an earlier export.
        tokenizer: Written along. `None` takes the one in the model's folder, or none for a model in memory.
        stock: Whether to look for a class of transformers; `False` always brings the code.
        dtype: Of the weights; `None` takes the most precise one in the model. Transformers knows one dtype a
            model, so one with tables in bfloat16 and the rest in float32 is written in float32.
        overwrite: Replace the files of an earlier export. Files of anyone else are never touched: they are an error.

    Returns:
        The class of transformers, `None` if the code was brought, and what speaks against the other classes.

    Raises:
        ConfigError: If a part of the model is not what its config builds, the tokenizer is none or has more
            ids than the model, `dtype` is no floating-point dtype, or `out_folder` holds other files or is no folder.
        DataError: If the tokenizer has no exact `tokenizer.json`.
        CheckpointError: If the model cannot be read or the folder cannot be written.
        HubError: If `model` is neither a folder nor a repository.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.interop.huggingface import export
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        export(model, "for-transformers", tokenizer=ByteTokenizer())
        ```
    """
    out = Path(out_folder)
    _check_out(out, overwrite)
    check_dtype(dtype)
    if isinstance(model, str | Path):
        folder = hub.resolve(model)
        model = load_exportable(folder)
        if tokenizer is None and (folder / "tokenizer_config.json").exists():
            tokenizer = load_tokenizer(folder)
    gpt: GPT = unwrapped(model)
    structure = structure_of(gpt)
    if tokenizer is not None:
        check_tokenizer(tokenizer, structure.config)
    found = match(structure)
    if not stock:
        found = StockMatch(None, found.reasons)
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Inside, because the folder may be a link or a volume, and files are renamed within one file system only.
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=out) as temporary:
            _write(Path(temporary), gpt, structure, found.architecture, tokenizer, dtype)
            _move(Path(temporary), out)
    except BaseException as error:
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()  # which fails if something is in it
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(f"the export could not be written into {out}: {why}.") from error
        raise
    return found


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.is_dir():
        if out.exists() or out.is_symlink():
            raise ConfigError(f"{out} is not a folder; choose another name.")
        return
    present = {path.name for path in out.iterdir() if not path.name.startswith(_TEMPORARY)} - _WELCOME
    if not present:
        return
    foreign = present - set(_WRITTEN)
    if foreign or not _is_export(out):
        raise ConfigError(
            f"{out} holds files that no export wrote, such as {min(foreign or present)}; choose a new or empty folder."
        )
    if not overwrite:
        raise ConfigError(f"{out} holds an earlier export; choose another folder or give overwrite=True.")


def _is_export(out: Path) -> bool:
    """Return whether the folder's `config.json` says that export wrote it."""
    try:
        fields = json.loads((out / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "tinygpt_version" in fields


def _write(
    folder: Path,
    model: GPT,
    structure: Structure,
    architecture: str | None,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
) -> None:
    weights = weights_of(model)
    dtype = dtype or max((t.dtype for t in weights.values()), key=lambda kind: torch.finfo(kind).bits)
    if architecture is None:
        fields = _own_config(structure)
        if structure.tied:
            del weights["head.weight"]
        shutil.copyfile(_CODE, folder / CODE_FILE)
    else:
        family = family_of(architecture)
        fields, weights = stock_config(family, structure), stock_weights(family, structure, weights)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    # <|bos|> stands before every document, so writing it also ends one.
    ends = {"bos_token_id": bos, "eos_token_id": bos}
    fields |= {"dtype": str(dtype).removeprefix("torch."), **ends, "tinygpt_version": __version__}
    tensors = independent_tensors({name: tensor.to(dtype) for name, tensor in weights.items()})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "generation_config.json", {**ends, "pad_token_id": bos})
    if tokenizer is not None:
        save_tokenizer_json(tokenizer, folder)
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(structure))
    _write_json(folder / "config.json", fields)


def _own_config(structure: Structure) -> dict[str, Any]:
    config = structure.config
    return {
        **config.model_dump(),
        "architectures": [_CLASS],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{Path(CODE_FILE).stem}.TinyGPTConfig",
            "AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.{_CLASS}",
        },
        "padded_vocab_size": config.padded_vocab_size,
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "mlp_types": list(structure.mlp_types),
        "hidden_dims": list(structure.hidden_dims),
        "layer_windows": layer_windows(config),
        "value_embedding_layers": [i for i in range(config.num_layers) if config.has_value_embedding(i)],
        "value_gate_channels": min(config.value_gate_channels, config.dim),
        "smear_gate_channels": min(24, config.dim),
        "tie_word_embeddings": structure.tied,
    }


def _tokenizer_config(structure: Structure) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|bos|>",
        "pad_token": "<|bos|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": structure.config.max_seq_len,
    }


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _move(written: Path, out: Path) -> None:
    """Put the files in place: a folder without a `config.json` until all others are there."""
    (out / "config.json").unlink(missing_ok=True)
    for name in _WRITTEN:
        if (written / name).exists():
            os.replace(written / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)
