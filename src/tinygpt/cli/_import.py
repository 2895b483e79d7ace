"""`tinygpt import`: a checkpoint of another project as a model of ours."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.cli._parser import typed_path
from tinygpt.cli._source import repository_folder, what_is_in

if TYPE_CHECKING:
    from tinygpt.model import GPT
    from tinygpt.tokenizer import Tokenizer


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "import",
        help="read a checkpoint of nanochat or transformers",
        description="Read a checkpoint of another project and save it as a model with its tokenizer. Nothing in it is "
        "executed or unpickled.",
        epilog="example: tinygpt import nanochat/base_checkpoints/d12 models/d12",
    )
    parser.add_argument(
        "source", metavar="FOLDER", type=typed_path, help="folder of the checkpoint, or user/repo for transformers"
    )
    parser.add_argument("out", metavar="OUT", type=typed_path, help="folder to write, new or empty")
    parser.add_argument(
        "--format",
        choices=["auto", "nanochat", "huggingface"],
        default="auto",
        help="whose checkpoint it is (default: nanochat if there is a model_NNNNNN.pt)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of nanochat (default: the newest)")
    parser.add_argument(
        "--tokenizer", default="auto", metavar="FOLDER", help="nanochat's tokenizer, if it lies elsewhere"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.errors import ConfigError

    out, folder = Path(options.out), Path(options.source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; choose a new or empty folder.")
    kind = options.format
    if kind == "auto":
        kind = "nanochat" if folder.is_dir() and any(folder.glob("model_*.pt")) else "huggingface"
    if kind == "huggingface" and (options.step is not None or options.tokenizer != "auto"):
        raise ConfigError("--step and --tokenizer are for checkpoints of nanochat.")
    model, tokenizer, notes = _nanochat(options) if kind == "nanochat" else _transformers(options)
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save(out)
    total = model.num_parameters().total
    if options.json:
        facts = {"out": str(out), "format": kind, "parameters": total, "tokenizer": tokenizer is not None}
        print(json.dumps({**facts, "notes": notes}))
        return
    print(f"{out}: {total:,} parameters, {'with' if tokenizer is not None else 'without'} a tokenizer")
    for note in notes:
        print(note)


def _nanochat(options: argparse.Namespace) -> "tuple[GPT, Tokenizer | None, list[str]]":
    from tinygpt.interop.nanochat import load_checkpoint

    model, tokenizer, metadata = load_checkpoint(options.source, options.step, tokenizer=options.tokenizer)
    figure = "" if metadata.val_bpb is None else f", {metadata.val_bpb:.4f} bits per byte by its own account"
    return model, tokenizer, [f"step {metadata.step:,}{figure}"]


def _transformers(options: argparse.Namespace) -> "tuple[GPT, Tokenizer | None, list[str]]":
    from tinygpt.errors import CheckpointError, ConfigError
    from tinygpt.interop.huggingface import from_transformers

    folder = Path(options.source)
    if (folder / "checkpoints").is_dir() or (folder / "state.json").exists():
        raise ConfigError(f"{folder} is of tinygpt itself; the other commands read it as it is.")
    if not folder.is_dir():
        folder = repository_folder(options.source)
    elif not (folder / "config.json").exists():
        raise CheckpointError(
            f"{what_is_in(folder)}; give a folder of transformers (config.json, *.safetensors) or of nanochat "
            "(model_NNNNNN.pt, meta_NNNNNN.json)."
        )
    model, tokenizer, problem = from_transformers(folder)
    return model, tokenizer, [] if problem is None else [str(problem)]
