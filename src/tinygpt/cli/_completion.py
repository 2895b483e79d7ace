"""`tinygpt completion`: a script that completes commands and options in a shell."""

import argparse


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "completion",
        help="print a completion script for a shell",
        description='Print a script that completes commands, options and files; needs "tinygpt[cli]". For bash put it '
        "into ~/.local/share/bash-completion/completions/tinygpt, for zsh as _tinygpt into a folder of $fpath, for "
        "fish into ~/.config/fish/completions/tinygpt.fish.",
        epilog="example: tinygpt completion bash > ~/.local/share/bash-completion/completions/tinygpt",
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="which shell")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.cli._main import build_parser
    from tinygpt.errors import MissingDependencyError

    try:
        import shtab
    except ImportError:
        raise MissingDependencyError('completion scripts need shtab: pip install "tinygpt[cli]".') from None
    parser, _ = build_parser()
    print(shtab.complete(parser, shell=options.shell))
