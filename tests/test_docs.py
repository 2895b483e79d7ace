"""Every Python block in README.md and docs/ runs: top to bottom, one namespace a file, in an empty folder.

A block that cannot run is fenced as `python no-run: <reason>`; without a reason that is an error.
"""

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in path.read_text("utf-8")
]
BLOCK = re.compile(r"^(?P<indent> *)```python(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


def runnable_blocks(page: Path) -> list[str]:
    """Return each block to run, padded with empty lines so that a traceback names the line in the page."""
    text = page.read_text("utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        info = match["info"].strip()
        if info.startswith("no-run"):
            assert re.fullmatch(r"no-run: \S.*", info), f"{page.name}: `{info}` gives no reason"
            continue
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        blocks.append("\n" * text.count("\n", 0, match.start("code")) + code)
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", namespace)  # dataclasses and pickle look their module up
    for block in runnable_blocks(page):
        exec(compile(block, str(page), "exec"), vars(namespace))


def test_the_readme_shows_code() -> None:
    assert runnable_blocks(ROOT / "README.md")
