"""`tinygpt eval`: how well a model predicts text and answers questions."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.cli._parser import typed_path
from tinygpt.cli._source import add_source_options, load_source, model_folder, open_text

if TYPE_CHECKING:
    from tinygpt.data import ValidationSet
    from tinygpt.model import GPT
    from tinygpt.tokenizer import Tokenizer


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "eval",
        help="measure bits per byte and the CORE metric",
        description="Measure bits per byte on the validation set of a run, on other text, or by domain, and the CORE "
        "metric on an evaluation bundle.",
        epilog="example: tinygpt eval runs/first --domains prose=book.txt code=code.jsonl --json",
    )
    add_source_options(parser)
    add = parser.add_argument
    add(
        "--validation",
        metavar="TEXT",
        type=typed_path,
        help="text to measure on, a validation set saved as .safetensors, or embedded (default: the run's own set)",
    )
    add("--domains", nargs="+", metavar="NAME=TEXT", help="measure on each of these and on all together")
    add("--max-tokens", type=int, metavar="N", help="most tokens of a text (default: 524,288)")
    add("--rows", type=int, metavar="N", help="rows at a time (default: 8, or those of a saved validation set)")
    add("--text-key", metavar="KEY", help="key or column of the text (default: text)")
    add("--separator", metavar="TEXT", help=r"what separates documents in .txt files, such as '\n\n'")
    add(
        "--core",
        metavar="BUNDLE",
        type=typed_path,
        help='folder, zip file or address of an evaluation bundle, needs "tinygpt[eval]"',
    )
    add("--tasks", nargs="+", metavar="LABEL", help="only these tasks of the bundle")
    add("--max-per-task", type=int, metavar="N", help="most questions of a task")
    add("--results", metavar="FOLDER", type=typed_path, help="keep answers there, so that a stopped evaluation goes on")
    add("--quiet", action="store_true", help="show no progress")
    add("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.errors import ConfigError

    if not options.core and any(value is not None for value in (options.tasks, options.max_per_task, options.results)):
        raise ConfigError("--tasks, --max-per-task and --results are about the questions of --core BUNDLE.")
    wanted = options.validation
    own = Path(options.source) / "validation.safetensors"
    if wanted is None and own.exists():
        wanted = str(own)
    if wanted is None and not options.domains and not options.core:
        if not Path(options.source).exists() and "/" not in options.source:
            model_folder(options.source)  # refuses it: no path, and no name of a repository
        raise ConfigError(
            f"{options.source} brings no validation set; give --validation TEXT (embedded for the book), --domains "
            "NAME=TEXT, or --core BUNDLE."
        )
    read = (options.validation, *(entry.partition("=")[2] for entry in options.domains or ()))
    if all(text is None or text.endswith(".safetensors") for text in read) and any(
        value is not None for value in (options.max_tokens, options.text_key, options.separator)
    ):
        raise ConfigError(
            "--max-tokens, --text-key and --separator are about text, of --validation TEXT or --domains NAME=TEXT; a "
            "saved validation set is measured as it is."
        )
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ConfigError(f"--max-tokens {options.max_tokens} is not positive; choose 1 or more.")
    named = [_named(entry) for entry in options.domains or ()]
    domains = dict(named)
    if len(domains) < len(named):
        raise ConfigError("--domains has two texts of one name; give each a name of its own.")
    model, tokenizer, folder = load_source(options)
    figures: dict[str, Any] = {"model": str(folder)}
    texts = []
    if wanted is not None and (options.validation is not None or not (domains or options.core)):
        from tinygpt.evals import evaluate_bpb

        report = evaluate_bpb(model, _validation(wanted, options, model, tokenizer))
        figures |= asdict(report)
        texts.append(str(report))
    if domains:
        from tinygpt.evals import evaluate_domains

        sets = {name: _validation(text, options, model, tokenizer) for name, text in domains.items()}
        found = evaluate_domains(model, sets, progress=not options.quiet)
        each = {
            name: {"bpb": r.bpb, "num_bytes": r.num_bytes, "data_hash": r.data_hash}
            for name, r in found.domains.items()
        }
        figures["domains"] = {"bpb": found.bpb, "mean_bpb": found.mean_bpb, **each}
        texts.append(str(found))
    if options.core:
        from tinygpt.evals import evaluate_core

        core = evaluate_core(
            model,
            tokenizer,
            options.core,
            tasks=options.tasks,
            max_per_task=options.max_per_task,
            results=options.results,
            progress=not options.quiet,
        )
        figures["core"] = asdict(core)
        texts.append(str(core))
    print(json.dumps(figures) if options.json else "\n\n".join(texts))


def _named(entry: str) -> tuple[str, str]:
    from tinygpt.errors import ConfigError

    name, equals, text = entry.partition("=")
    if not (name and equals and text):
        missing = "text" if name and equals else "name"
        raise ConfigError(f"--domains {entry} has no {missing}; write NAME=TEXT, such as prose=book.txt.")
    return name, text


def _validation(text: str, options: argparse.Namespace, model: "GPT", tokenizer: "Tokenizer") -> "ValidationSet":
    from tinygpt.data import ValidationSet
    from tinygpt.errors import ConfigError

    if text.endswith(".safetensors"):
        return ValidationSet.load(text, rows=options.rows)
    if model.max_seq_len is None:
        raise ConfigError("the model has no config, so the length of its rows is not known.")
    source = open_text(text, options, embedded="validation")
    return ValidationSet.from_source(
        source, tokenizer, rows=options.rows or 8, seq_len=model.max_seq_len, max_tokens=options.max_tokens or 524_288
    )
