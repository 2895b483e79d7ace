"""The library's errors in words that can be typed: where it names an argument, a command has an option or a file."""

import argparse
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygpt.trainer import Change, ResumeRefusedError

# What a message says, and what is typed instead; DATA is "data." where options are fields of a recipe.
_TYPED = (
    # Arguments that are options.
    (r"overwrite=True", "--overwrite"),
    (r"overflow='slide'", "--overflow slide"),
    (r"tasks=\[\.\.\.\]", "--tasks"),
    (r"chat=True", "--chat"),
    (r"choose another out_dir", "choose another folder for --out"),
    (r"choose another folder with out\.", "choose another folder with --out."),
    (
        r"choose another name, or resume=True to go on with it",
        "choose another --out, or rename the run's folder: its last part is the name",
    ),
    (r"Phase\(\.\.\., accept=\['schedule'\]\)", 'accept = ["schedule"] in that phase of the recipe'),
    # Data.
    (r"; open it with TextFiles, .*Files\.", "; give the file the ending of what it holds."),
    (r"; open one kind with TextFiles, .*Files\.", "; put each kind into a folder of its own and give one of these."),
    (r"overflow='carry', or cut .* for example", "--DATAoverflow carry, or part documents by --DATAseparator"),
    (r"give separator=('[^']*')", r"give --DATAseparator \1"),
    (r"give the separator between its documents, or raise( the limit)?", "part it by --DATAseparator TEXT"),
    (r"give one that is, or raise( the limit)?", "give another --DATAseparator"),
    (r"or None for one a core", "or leave it out for one a core"),
    (r"choose a text_key\.", "choose one with --DATAtext-key."),
    (r"validation_fraction=([\d.]+)", r"--DATAheld-out \1"),
    (
        r"(A text file is one document unless a separator parts it\.)",
        r"\1 Give --DATAseparator '\\n\\n' if blank lines part your documents, or --DATAvalidation TEXT.",
    ),
    (r"(Parted by .* the text has .*\.)", r"\1 Give another --DATAseparator, or --DATAvalidation TEXT."),
    (r"leave matmul_precision out", "leave --matmul-precision out"),
    # What a program would do next.
    (r", or pass token=\.\.\.\.", "."),
    (r"a tokenizer's save\(\) wrote", "tinygpt tokenizer train wrote"),
    (r"tinygpt\.interop\.huggingface\.from_transformers reads", "tinygpt import reads"),
    (r"load the folder with GPT\.from_pretrained", "the other commands read it as it is"),
    (r", the out_dir of its TrainerConfig", ""),
    (r", or load the weights alone with GPT\.from_pretrained", ""),
)


def as_typed(message: str, options: argparse.Namespace | None) -> str:
    """Return a message of the library with arguments of Python replaced by what the command has in their place."""
    data = "data." if hasattr(options, "overrides") else ""
    for said, typed in _TYPED:
        message = re.sub(said, typed.replace("DATA", data), message)
    if options is not None and hasattr(options, "run_folder"):  # resume, which has no --out
        again = command("train", options.run_folder, "--out", "NEW")
        message = message.replace("choose another folder for --out", f"choose another folder, by {again},")
    return message


def ways_on(error: "ResumeRefusedError", out: Path, options: argparse.Namespace, *, steps_left: int) -> str:
    """Return the message of a refused resume with its ways on as commands.

    Args:
        error: The refusal.
        out: Folder of the run.
        options: Of `train` or `resume`.
        steps_left: Steps of the run after that checkpoint.
    """
    changed = [word for name, value in options.overrides.items() for word in (f"--{name}", value)]
    changed += [word for name in options.tracker or () for word in ("--tracker", name)]
    if hasattr(options, "run_folder"):
        same, recipe = ["resume", options.run_folder], [options.run_folder]
    else:
        length = f"--tokens-per-parameter={options.tokens_per_parameter}"
        recipe = [options.recipe] if options.depth is None else ["--depth", str(options.depth), length]
        same = ["train", *recipe, "--out", str(out)]
    branching = error.folder.resolve().parent != (out / "checkpoints").resolve()
    if branching:
        same += ["--from", str(error.folder)]
    topics = _topics(error.changes)
    ways = []
    if not branching and topics != ["data"] and (changed or same[0] == "train"):
        ways.append(f"keep the settings of the checkpoint: {command('resume', str(out))}")
    if "data" in topics:
        ways.append("keep the data: put its files back as they were, or leave the change of them out")
    if "optimizer" not in topics and error.fits:  # what nothing takes over
        rest = _accepting(_topics(change for change in error.changes if change not in error.rates))
        if error.rates and steps_left > 0:
            ways.append(
                f"go over gradually: {command(*same, *changed, *rest, '--rewarm-steps', str(min(50, steps_left)))}"
            )
        if error.branch_from is not None:
            branch = ["train", *recipe, *changed, *rest, "--from", str(error.branch_from), "--out", f"{out}-branch"]
            ways.append(f"branch from before the decay, where no rate jumps: {command(*branch)}")
        ways.append(f"accept it knowingly: {command(*same, *changed, *_accepting(topics))}")
    begin = command("train", *recipe, *changed, "--out", f"{out}-new")
    ways.append(f"begin another run: {begin}")
    found = str(error).partition("Ways to go on:")[0]
    return f"{found}Ways to go on:\n" + "\n".join(f"  - {way}" for way in ways)


def _topics(changes: "Iterable[Change]") -> list[str]:
    return sorted({change.topic for change in changes})


def _accepting(topics: list[str]) -> list[str]:
    return [word for topic in topics for word in ("--accept", topic)]


def no_memory(error: BaseException, options: argparse.Namespace | None) -> str:
    """Return what to do where memory was too little."""
    if not hasattr(options, "trains"):
        return "there is too little memory for this; take fewer rows, texts or tokens at a time, or a smaller model."
    where = "GPU" if type(error).__name__ == "OutOfMemoryError" else "machine"
    return (
        f"the {where} has too little memory; --micro-batch-rows auto computes as many rows at a time as fit; "
        "if it is on, --activation-checkpointing block keeps the least, and tinygpt plan tells what would fit."
    )


def as_sentence(error: Exception) -> str:
    """Return what an error says; one of the system that names a file without what Python puts around it."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)} cannot be read or written: {error.strerror}; choose another path."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU or this machine had no memory left; torch has a class of its own for GPUs alone."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def fitted(text: str) -> str:
    """Return text whose lines end between words where the terminal does, the rest under the first; else as it is.

    Labels take the first ten columns.
    """
    if not sys.stdout.isatty():
        return text
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(line) if len(line) > wrapper.width else line for line in text.splitlines())


def command(*words: str) -> str:
    """Return a command as it is typed in a shell, whatever its words hold."""
    return shlex.join(["tinygpt", *words])
