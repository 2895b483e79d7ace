"""What RUN_OR_REPO means, for every command that reads a model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinygpt.cli._parser import unescaped

if TYPE_CHECKING:
    from tinygpt.data import DocumentSource
    from tinygpt.model import GPT
    from tinygpt.tokenizer import Tokenizer

SOURCE_HELP = "a run (its newest whole checkpoint), a checkpoint, a saved model, or user/repo on the Hugging Face Hub"


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the model and where to put it."""
    parser.add_argument("source", metavar="RUN_OR_REPO", help=SOURCE_HELP)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a repository")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)"
    )


def model_folder(source: str, *, revision: str | None = None) -> Path:
    """Return the folder of the model that is meant, downloaded if it is a repository.

    Raises:
        CheckpointError: If a run has no whole checkpoint.
        HubError: If it is neither a folder nor a repository that can be read.
    """
    from tinygpt import hub
    from tinygpt.checkpoint import latest_checkpoint
    from tinygpt.errors import CheckpointError

    folder = Path(source).expanduser()
    if not (folder / "checkpoints").is_dir():
        if (folder / "recipe.json").exists():
            raise CheckpointError(f"the run {folder} has no checkpoint yet; tinygpt resume {folder} trains it.")
        return hub.resolve(source, revision=revision)
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"the run {folder} has no whole checkpoint; tinygpt resume {folder} trains it.")
    return newest


def load_source(options: argparse.Namespace) -> "tuple[GPT, Tokenizer, Path]":
    """Return model, tokenizer and folder of what the options name.

    Raises:
        CheckpointError: If the model cannot be loaded.
        DataError: If there is no tokenizer beside it.
        ConfigError: If the device cannot be used.
    """
    from tinygpt.errors import DataError
    from tinygpt.model import GPT
    from tinygpt.recipe import resolve_device
    from tinygpt.tokenizer import load_tokenizer

    device = resolve_device(options.device)
    folder = model_folder(options.source, revision=options.revision)
    model = GPT.from_pretrained(folder, device=device, **_parts(folder))
    if not (folder / "tokenizer_config.json").exists():
        raise DataError(
            f"{folder} has no tokenizer beside the model; save one there with tokenizer.save({str(folder)!r})."
        )
    return model, load_tokenizer(folder), folder


def _parts(folder: Path) -> dict[str, Any]:
    """Return the parts to load a model with that was imported from a Llama."""
    from tinygpt.manifest import read_json

    blocks = read_json(folder / "config.json").get("blocks") if (folder / "config.json").exists() else None
    if not isinstance(blocks, list) or not any("mlp=SwiGLU" in str(block) for block in blocks):
        return {}
    from tinygpt.interop.huggingface import llama_mlp

    return {"mlp": llama_mlp}


def open_text(
    path: str, options: argparse.Namespace, *, embedded: Literal["train", "validation"] = "train"
) -> "DocumentSource":
    """Open the text that a path means, by the options --text-key and --separator; `embedded` is part of the book."""
    from tinygpt.data import embedded_corpus, open_source

    if path == "embedded":
        return embedded_corpus(embedded)
    separator = None if options.separator is None else unescaped(options.separator)
    return open_source(path, text_key=options.text_key, separator=separator)
