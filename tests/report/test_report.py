"""The report as a reader gets it: whatever state the run is in, in one page, with nothing slipping out of the files."""

import json
import math
import os
import re
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_run import START, documented_run, evaluation, step_line, write_lines
from tinygpt.errors import ConfigError, DataError, MissingDependencyError
from tinygpt.report import summarize_run, write_report
from tinygpt.report._page import Page, Paragraph, Section, to_markdown

VOID = {"meta", "br", "img", "input", "link", "hr"}
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> | `x` [a](javascript:b) $x$ \ud800 \x00'


class Structure(HTMLParser):
    """Collects what a page is made of and checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(html: str) -> Structure:
    """Return the page's structure if it is one whole page that runs nothing and asks nobody for anything."""
    page = Structure(html)
    assert not {"script", "iframe", "object", "embed", "link", "form", "img", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    targets = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith("#") for value in targets)
    assert all(not re.search(r"url\((?!#)", value) for _, value in page.attributes)
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert len(set(page.ids)) == len(page.ids)
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | {value[1:] for value in targets}
    assert used <= set(page.ids)
    return page


def test_a_report_is_markdown_one_page_and_pictures(tmp_path: Path) -> None:
    files = write_report(documented_run(tmp_path / "run"))
    assert files.html == tmp_path / "run" / "report" / "report.html"
    names = {path.stem for path in files.pictures}
    expected = {"loss", "validation", "learning_rate", "weight_decay", "momentum", "gradient_norm", "speed", "memory"}
    assert names == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.pictures)
    page = checked(files.html.read_text("utf-8"))
    assert page.tags.count("svg") == 8
    assert {"main", "header", "footer", "table", "figure", "h1"} <= set(page.tags)
    markdown = files.markdown.read_text("utf-8")
    for text in (page.text, markdown):
        for heading in ("Key observations", "Loss progression", "Performance", "Schedule of each phase", "Next"):
            assert heading in text
        assert "After step 300 the training loss jumped by" in text
        assert f"tinygpt compare {(tmp_path / 'run').as_posix()} OTHER_RUN" in text
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown):
        assert (files.markdown.parent / picture).exists()
    assert sorted(path.name for path in files.html.parent.iterdir()) == sorted(
        ["report.md", "report.html", *(f"{name}.png" for name in expected)]
    )


def test_the_progression_has_differences_and_the_places_around_a_resume(tmp_path: Path) -> None:
    run = documented_run(tmp_path / "run", num_steps=3000, resume=1000)
    markdown = write_report(run, pictures=False).markdown.read_text("utf-8")
    table = markdown.split("## Loss progression")[1]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("| ")][1:]
    rows = rows[: next((i for i, row in enumerate(rows) if not row[0][:1].isdigit()), len(rows))]
    assert rows[0][0] == "50"
    assert rows[-1][0] == "3,000"
    assert {"1,000", "1,050"} <= {row[0] for row in rows}
    for before, after in pairwise(rows):
        loss = float(after[2]) - float(before[2])
        bpb = float(after[4].split()[0]) - float(before[4].split()[0])
        assert float(after[3]) == pytest.approx(loss, abs=2e-4)
        assert float(after[5]) == pytest.approx(bpb, abs=2e-4)


def test_the_phases_say_how_the_rates_went(tmp_path: Path) -> None:
    markdown = write_report(documented_run(tmp_path / "run"), pictures=False).markdown.read_text("utf-8")
    assert "| 1 to 300 | 0.02, falling to 0.001063 | constant 0.1 | constant 0.9 |" in markdown
    assert "| 301 to 600 | 0.02, falling to 0.01336 | constant 0.1 | constant 0.97 |" in markdown


@pytest.mark.parametrize("text", ["", "\n\n", '{"event": "step", "st', "\x00\xff garbage", "[1, 2]\n3\nnull\n"])
def test_a_file_without_a_step_still_makes_a_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, "utf-8")
    files = write_report(tmp_path)
    assert files.summary["status"] == "empty"
    assert files.pictures == ()
    assert "No step was finished yet." in checked(files.html.read_text("utf-8")).text


def test_a_cut_off_line_and_damaged_lines_are_told(tmp_path: Path) -> None:
    lines = [step_line(step, 3.0) for step in range(50)]
    run = write_lines(tmp_path / "run", lines, tail='not json\n{"no": "step"}\n{"event": "step", "step": 50, "lo')
    text = write_report(run, pictures=False).markdown.read_text("utf-8")
    assert "The last line is cut off" in text
    assert "2 lines could not be read and were left out, the first is line 51." in text
    assert summarize_run(run)["steps"] == 50


def test_a_step_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    lines = [step_line(step, 3.0) for step in [*range(50), *range(40, 60)]]
    summary = summarize_run(write_lines(tmp_path / "run", lines))
    assert summary["steps"] == 60
    assert any("10 steps are there more than once" in o["text"] for o in summary["observations"])


def test_running_stopped_and_complete_are_told_apart(tmp_path: Path) -> None:
    record = {"event": "run", "step": -1, "time": START, "settings": {"num_steps": 50}}
    now = time.time()
    running = [record, *(step_line(step, 3.0, time=now - 50 + step) for step in range(40))]
    assert summarize_run(write_lines(tmp_path / "a", running))["status"] == "running"
    stopped = [record, *(step_line(step, 3.0) for step in range(40))]
    assert summarize_run(write_lines(tmp_path / "b", stopped))["status"] == "stopped"
    complete = [record, *(step_line(step, 3.0) for step in range(50))]
    assert summarize_run(write_lines(tmp_path / "c", complete))["status"] == "complete"
    markdown = write_report(tmp_path / "b", pictures=False).markdown.read_text("utf-8")
    assert "| still to go | 10.0 s at this speed |" in markdown


def test_what_is_in_the_files_stays_text(tmp_path: Path) -> None:
    run = tmp_path / "<b>run&"
    lines = [step_line(step, 3.0) for step in range(60)]
    group = {"name": EVIL, "kind": EVIL, "num_parameters": EVIL, "settings": {"lr": 0.3, EVIL: EVIL}}
    muon = {"name": "m", "kind": "muon", "settings": {"lr": 0.02}}
    lines += [
        {"event": "sample", "step": 9, "prompt": EVIL, "text": EVIL + "\n```\n<h1>out</h1>"},
        {"event": "resume", "step": 20, "checkpoint": EVIL, "changes": [[EVIL, EVIL, EVIL]]},
        {"event": "stop", "step": 60, "reason": EVIL},
        {"event": "run", "step": 30, EVIL: EVIL, "model": {"config": {EVIL: EVIL}, "parameters": {EVIL: 3},
         "num_parameters": 3, "blocks": [{"description": EVIL, "layers": [0]}]},
         "optimizer": {"name": EVIL, "groups": [group, muon]}, "schedules": {EVIL: EVIL}, "settings": {EVIL: [EVIL]},
         "environment": {"device_name": EVIL}, "data": {"tokenizer": EVIL}, "batch": {"tokens": EVIL}},
        evaluation(40, 1.0, **{EVIL: 2.0}) | {"data_hash": EVIL},
        {"event": "run", "step": 31, "model": {"num_parameters": 10**400, "config": {"dim": 10**400}},
         "settings": {"num_steps": 10**400}, "optimizer": {"groups": [{"settings": {"lr": 10**400}}]}},
        {"event": "resume", "step": 31, "changes": [["lr", 10**400, 1], ["momentum", 0.5, 10**400]] * 1000},
        evaluation(50, 1.0),
    ]  # fmt: skip
    write_lines(run, lines)
    (run / "run.json").write_text(json.dumps({EVIL: EVIL}), "utf-8")
    files = write_report(run)
    page = checked(files.html.read_text("utf-8"))
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "b" not in [tag for tag in page.tags if tag == "run&"]
    assert page.tags.count("h1") == 1
    markdown = re.sub(r"^(`{3,})text\n.*?^\1$", "", files.markdown.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"<(?!b>run)[a-z/]", markdown)
    assert "<h1>" not in markdown  # its fence was longer than that of the sample
    assert "](javascript" not in markdown.replace(r"\]", "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["loss", "time", "lr", "tokens", "tokens_per_second", "bpb", "momentum", "changes", "text", "model",
          "settings", "optimizer", "schedules", "num_steps", "batch", "data", "elapsed_seconds"]  # fmt: skip
LINES = st.lists(
    st.fixed_dictionaries(
        {"event": st.sampled_from(["step", "step", "evaluation", "resume", "run", "sample", "stop"]),
         "step": st.integers(-1, 60)},
        optional={field: JSON | st.floats(0, 10) for field in FIELDS},
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=40)
@given(lines=LINES, identity=JSON)
def test_whatever_the_files_hold_a_whole_page_comes_of_it(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]], identity: Any
) -> None:
    run = write_lines(tmp_path_factory.mktemp("fuzz"), lines)
    (run / "run.json").write_text(json.dumps(identity))
    files = write_report(run, pictures=False)
    checked(files.html.read_text("utf-8"))
    json.dumps(files.summary, allow_nan=False)


def test_numbers_of_any_size_are_drawn_or_left_out(tmp_path: Path) -> None:
    sizes = [0.0, -1.0, 1e308, 1e-308, math.inf, math.nan, 10**400, "x", None, True]
    lines = [
        step_line(step, 3.0) | {"loss": sizes[step % 10], "lr": sizes[step % 7], "grad_norm": sizes[(step + 3) % 10]}
        for step in range(120)
    ]
    files = write_report(write_lines(tmp_path / "run", lines))
    checked(files.html.read_text("utf-8"))
    assert any("no finite loss" in o["text"] for o in files.summary["observations"])


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    losses = [3.0 + (step % 7) / 100 for step in range(20_000)]
    lines = [step_line(step, loss) for step, loss in enumerate(losses)]
    lines += [evaluation(step, 1.0) for step in range(0, 20_000, 10)]
    lines += [{"event": "sample", "step": step, "text": "whale " * 2000} for step in range(0, 20_000, 100)]
    files = write_report(write_lines(tmp_path / "run", lines))
    html = files.html.read_text("utf-8")
    assert len(html) < 500_000
    assert "a line is the mean of every 50 steps" in html
    assert "12 of 200 samples, evenly chosen." in html
    assert files.markdown.stat().st_size < 200_000


def test_without_matplotlib_there_is_a_report_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = documented_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[plot\]"'):
        write_report(run)
    assert not (run / "report").exists()
    assert write_report(run, pictures=False).pictures == ()


def test_a_run_that_is_not_there_and_a_folder_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for read in (write_report, summarize_run):
        with pytest.raises(DataError, match="absent does not exist; give the folder of a run"):
            read(tmp_path / "absent")
        with pytest.raises(DataError, match=r"has no metrics\.jsonl; give the folder of a run"):
            read(tmp_path)
    run = documented_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the report cannot be written to .*choose another folder"):
        write_report(run, tmp_path / "file" / "report", pictures=False)
    assert (
        write_report(run / "metrics.jsonl", tmp_path / "out", pictures=False).html == tmp_path / "out" / "report.html"
    )


def test_commands_fit_the_state_of_the_run(tmp_path: Path) -> None:
    lines = [{"event": "run", "step": -1, "settings": {"num_steps": 90}}, *(step_line(s, 3.0) for s in range(40))]
    run = write_lines(tmp_path / "my run", lines)
    checkpoint = run / "checkpoints" / "step-000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(3 << 20))
    (checkpoint / "state.json").write_text("{half")
    markdown = write_report(run, pictures=False).markdown.read_text("utf-8")
    assert f"tinygpt resume '{run.as_posix()}'" in markdown
    assert "Go on from step 30, the newest checkpoint" in markdown
    assert "| checkpoint | 3.0 MiB: model.safetensors 3.0 MiB, state.json 5 B |" in markdown
    assert "tinygpt chat" in markdown


@pytest.mark.skipif(os.name == "nt" or not Path("/usr/bin/chromium").exists(), reason="needs /usr/bin/chromium")
@pytest.mark.slow
def test_a_browser_shows_the_page_without_an_error(tmp_path: Path) -> None:
    import subprocess

    files = write_report(documented_run(tmp_path / "run"))
    command = ["/usr/bin/chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
               files.html.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Key observations" in done.stdout
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_text_of_a_run_is_no_markup_of_the_page() -> None:
    def written(text: str) -> str:
        return to_markdown(Page("", "", [Section("", [Paragraph(text)])], "")).splitlines()[4]

    for text in ("_a_", "# a", "~~a~~", "> a", "- a", "*a*", "a|b", "[a](b)"):
        assert re.search(r"(?<!\\)[_~*|\[]|^[#>-]", written(text)) is None
        assert re.sub(r"\\(.)", r"\1", written(text)) == text
    assert written("weight_decay -0.1, 2 - 1 > 0") == "weight_decay -0.1, 2 - 1 > 0"
