"""`tinygpt export`: a model in the format of another library."""

import argparse
import json

from tinygpt.cli._parser import typed_path
from tinygpt.cli._source import SOURCE_HELP, model_folder


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "export",
        help="write a model for transformers",
        description="Write a model and its tokenizer as a folder that transformers loads: a class of its own where "
        "one computes exactly the same, otherwise with one file of code.",
        epilog="example: tinygpt export runs/first for-transformers",
    )
    parser.add_argument("source", metavar="RUN_OR_REPO", type=typed_path, help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", type=typed_path, help="folder to write, new or empty")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a repository")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as saved)"
    )
    parser.add_argument("--code", action="store_true", help="bring the code even where a class of transformers fits")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import torch

    from tinygpt.interop.huggingface import export

    folder = model_folder(options.source, revision=options.revision)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    match = export(folder, options.out, stock=not options.code, dtype=dtype, overwrite=options.overwrite)
    if options.json:
        print(json.dumps({"model": str(folder), "out": options.out, "architecture": match.architecture}))
        return
    trust = "" if match.architecture else ", trust_remote_code=True"
    print(f"{options.out}: {match.architecture or 'with its own code'}")
    print(f"load it with AutoModelForCausalLM.from_pretrained({options.out!r}{trust})")
