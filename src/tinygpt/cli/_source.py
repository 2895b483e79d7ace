"""What RUN_OR_REPO means, for every command that reads a model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinygpt.cli._parser import typed_path, unescaped
from tinygpt.cli._words import command
from tinygpt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tinygpt.data import DocumentSource
    from tinygpt.model import GPT
    from tinygpt.tokenizer import Tokenizer

SOURCE_HELP = "a run (its newest whole checkpoint), a checkpoint, a saved model, or user/repo on the Hugging Face Hub"


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the model and where to put it."""
    parser.add_argument("source", metavar="RUN_OR_REPO", type=typed_path, help=SOURCE_HELP)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a repository")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)"
    )


def model_folder(source: str, *, revision: str | None = None) -> Path:
    """Return the folder of the model that is meant, downloaded if it is a repository.

    Raises:
        CheckpointError: If a run has no whole checkpoint, or a folder holds no model.
        ConfigError: If a revision is given for a folder.
        HubError: If it is neither a folder nor a repository that can be read.
    """
    from tinygpt.checkpoint import latest_checkpoint, list_checkpoints

    folder = Path(source).expanduser()
    if revision is not None and folder.is_dir():
        raise ConfigError(f"--revision is for a repository of the Hub, and {folder} is a folder here.")
    if not (folder / "checkpoints").is_dir():
        if (folder / "recipe.json").exists():
            raise _untrained(folder)
        if not folder.is_dir():
            return repository_folder(source, revision=revision)
        if not (folder / "config.json").exists():
            raise CheckpointError(f"{what_is_in(folder)}; give {SOURCE_HELP}.")
        return folder
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None and list_checkpoints(folder / "checkpoints"):
        again = command("train", str(folder), "--out", "NEW")
        raise CheckpointError(f"every checkpoint of the run {folder} is damaged; {again} repeats it.")
    if newest is None:
        raise _untrained(folder)
    return newest


def _untrained(folder: Path) -> CheckpointError:
    return CheckpointError(f"the run {folder} has no checkpoint yet; {command('resume', str(folder))} trains it.")


def repository_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the folder that a repository's model is downloaded to.

    Its smallest file is asked for first and once, so that a misspelt path is answered at once; the rest is worth
    several tries.

    Raises:
        HubError: If it is no repository that can be read.
    """
    from tinygpt import hub

    hub.resolve(name, revision=revision, allow_patterns=["config.json"], retries=0)
    return hub.resolve(name, revision=revision)


def what_is_in(folder: Path) -> str:
    """Return what a folder without a model holds, as the beginning of an error."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    if any(folder.glob("step-*/state.json")):
        return f"{folder} holds the checkpoints of the run {folder.parent}"
    if any(folder.glob("model_*.pt")):
        return f"{folder} holds a checkpoint of nanochat, which tinygpt import reads"
    runs = [path.parent.as_posix() for path in sorted(folder.glob("*/checkpoints"))]
    if runs:
        return f"{folder} holds runs, and no model itself: {', '.join(runs[:5])}"
    if not names:
        return f"{folder} is an empty folder"
    return f"{folder} holds no model but {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


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
            f"{folder} has no tokenizer beside the model; copy tokenizer_config.json and what belongs to it there."
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
    """Open the text that a path means, by the options of the command; `embedded` is part of the book."""
    from tinygpt.data import embedded_corpus, open_source

    if path == "embedded":
        return embedded_corpus(embedded)
    separator = None if options.separator is None else unescaped(options.separator)
    on_error: Any = getattr(options, "on_error", "raise")
    return open_source(path, text_key=options.text_key or "text", separator=separator, on_error=on_error)
