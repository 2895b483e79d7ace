"""The guide *The command line*: its table is what there is, and its commands run in order."""

import re
import shlex
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.cli._main import build_parser
from tinygpt.recipe import Recipe

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "command_line.md").read_text("utf-8")
SMALL = [
    "--num-steps=4", "--model.max-seq-len=64", "--batch-tokens=128", "--data.rows=2", "--data.validation-tokens=200",
    "--evaluate-every=4", "--samples.every=none", "--report=false",
]  # fmt: skip


def test_the_table_lists_every_command_with_the_words_of_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    rows = dict(re.findall(r"^\| `tinygpt (\w+)` \| (.*) \|$", GUIDE, re.MULTILINE))
    parser, commands = build_parser()
    assert list(rows) == commands
    help_text = " ".join(parser.format_help().split())
    for name, text in rows.items():
        assert f"{name} {text}" in help_text


def test_the_commands_run_in_the_order_of_the_page(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    Path("books").mkdir()
    Path("books/whales.txt").write_text("\n\n".join(f"Whale number {n} swam past the ship. " * 9 for n in range(80)))
    ((name, recipe),) = re.findall(r"^```toml\n# (\S+)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    Path(name).write_text(recipe.replace("1_024", "300"))
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 15
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "tinygpt"
        if command == "train" and not arguments[0].startswith("runs/"):
            arguments += SMALL + (["--schedules.lr.warmup-steps", "1"] if arguments[0] == name else [])
            arguments += [] if "--model.depth" in arguments else ["--model.dim=32", "--model.num-heads=1"]
        if command == "resume" and "--num-steps" in arguments:
            arguments += ["--num-steps", "6", "--rewarm-steps", "1"]
        if "--from" in arguments:
            arguments[arguments.index("--from") + 1] = "runs/first/checkpoints/step-000006"
            arguments += ["--num-steps", "8", "--rewarm-steps", "1"]
        if command in ("train", "resume"):
            arguments.append("--quiet")
        assert main([command, *arguments]) == 0, f"{line}\n{capsys.readouterr().err}"
    ends = [f"{run}/checkpoints/step-000004/model.safetensors" for run in ("runs/mine", "runs/mine-again")]
    assert Path(ends[0]).read_bytes() == Path(ends[1]).read_bytes()
    assert Recipe.load("runs/other").model.num_layers == 3
