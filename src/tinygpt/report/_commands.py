"""What to type next. Every command that a report names is here, and nowhere else."""

import shlex

from tinygpt.report._log import RunLog
from tinygpt.report._page import Command


def next_commands(log: RunLog, status: str) -> list[Command]:
    """Return the commands that make sense for a run in this state."""
    run = shlex.quote(log.folder.as_posix())
    commands = []
    if status == "running":
        commands.append(Command(f"tinygpt report {run}", "The run goes on; look again later"))
    if status == "stopped" and log.checkpoints:
        commands.append(
            Command(f"tinygpt resume {run}", f"Go on from step {log.checkpoints[-1].step:,}, the newest checkpoint")
        )
    if log.checkpoints:
        commands += [
            Command(f"tinygpt eval {run}", "Measure bits per byte and the CORE tasks"),
            Command(f"tinygpt chat {run}", "Let it write, in the terminal"),
            Command(f'tinygpt generate {run} --prompt "Call me"', "Or a single text"),
            Command(f"tinygpt push {run} USER/REPO", "Put model and tokenizer on the Hugging Face Hub"),
        ]
    commands.append(Command(f"tinygpt compare {run} OTHER_RUN", "Set it against another run"))
    return commands
