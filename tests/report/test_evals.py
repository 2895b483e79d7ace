"""What the pictures of evaluations say is read back from SVG files, in which text stays text."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from tinygpt.errors import ConfigError, MissingDependencyError
from tinygpt.evals import BpbReport, CoreReport, DomainReport, PositionCurve, TaskScore
from tinygpt.report import plot_core, plot_domains, plot_positions


def domains(**bpb: float) -> DomainReport:
    return DomainReport({name: BpbReport(value, 2.0, 10, 40, "5f1c") for name, value in bpb.items()})


def curve(shift: float) -> PositionCurve:
    bpb = (1.5 + shift, 1.25 + shift)
    return PositionCurve((0, 8), (8, 16), (3.0, 2.5), (0.1, 0.1), bpb, (0.1, math.nan), (80, 80), "5f1c")


def core(shift: float, *labels: str) -> CoreReport:
    tasks = tuple(
        TaskScore(label, "schema", 0, 10, 0.6, 0.5, 0.2 + shift, (0.1, 0.3), 0, {})
        for label in labels or ("a", "b$c$d")
    )
    return CoreReport(0.2 + shift, (0.15, 0.25), tasks)


PICTURES: list[tuple[Callable[[Any, Path], Path], Any, Any, list[str]]] = [
    (plot_domains, domains(prose=1.25, code=0.75), domains(prose=1.2, code=0.7), ["prose", "code", "1.250", "0.750"]),
    (plot_positions, curve(0), curve(0.1), ["bits per byte", "position in the row"]),
    (plot_core, core(0), core(0.1), ["b$c$d", "CORE 0.2000"]),
]
IDS = ["domains", "positions", "core"]


@pytest.fixture(autouse=True)
def text_stays_text() -> Iterator[None]:
    with mpl.rc_context({"svg.fonttype": "none"}):
        yield


@pytest.mark.parametrize(("draw", "one", "other", "texts"), PICTURES, ids=IDS)
def test_one_and_several_are_drawn(
    draw: Callable[[Any, Path], Path], one: Any, other: Any, texts: list[str], tmp_path: Path
) -> None:
    picture = draw(one, tmp_path / "one.svg")
    assert picture == tmp_path / "one.svg"
    assert [text for text in texts if text not in picture.read_text("utf-8")] == []
    both = draw({"before": one, "after": other}, tmp_path / "both.svg").read_text("utf-8")
    assert [text for text in [*texts, "before", "after"] if text not in both] == []
    assert draw(one, tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(("draw", "one", "other", "texts"), PICTURES, ids=IDS)
def test_nothing_to_draw_and_no_matplotlib_are_told(
    draw: Callable[[Any, Path], Path],
    one: Any,
    other: Any,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw({}, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[plot\]"'):
        draw(one, tmp_path / "a.png")


def test_reports_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'b' has the domains talk; the first has prose"):
        plot_domains({"a": domains(prose=1.0), "b": domains(talk=1.0)}, tmp_path / "a.png")
    with pytest.raises(ConfigError, match="'b' has other tasks than the first report: x"):
        plot_core({"a": core(0, "x"), "b": core(0, "y")}, tmp_path / "a.png")
