"""How much does `import tinygpt` cost on top of `import torch`?

Each import runs in a fresh Python process. The start of the interpreter itself is the first row. `import tinygpt` alone
is next to nothing, since torch is imported when a name that needs it is first used.
"""

import subprocess
import sys

from _measure import Work, arguments, parse, report, seconds_text, time_rounds, timed_rows

STATEMENTS = ("pass", "import tinygpt", "import torch", "from tinygpt import GPT, Trainer")


def run_statement(statement: str) -> Work:
    """Return work that runs one statement in a fresh interpreter."""
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True)


def main() -> None:
    args = parse(arguments(__doc__ or "", rounds=7))
    # Warm: this process has just read the same files.
    seconds = time_rounds({statement: run_statement(statement) for statement in STATEMENTS}, args.rounds, warm=True)
    rows = timed_rows(seconds, baseline="import torch")
    torch_seconds = rows[2]["median_seconds"]
    for row in rows:
        row["over_torch_seconds"] = row["median_seconds"] - torch_seconds
    report(
        "import_time",
        {},
        rows,
        {
            "time": seconds_text,
            "x time of torch": lambda row: f"{1 / row['speed']:.2f}",
            "over torch": lambda row: f"{row['over_torch_seconds'] * 1e3:+.0f} ms",
        },
        args,
    )


if __name__ == "__main__":
    main()
