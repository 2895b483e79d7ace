"""What is uploaded to the package index: it holds what it should, and runs with nothing but what it declares."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

TRAIN = """
from importlib.util import find_spec
for name in ("pytest", "matplotlib", "rustbpe", "pyarrow"):
    assert find_spec(name) is None, f"{name} is visible, so this run proves nothing"

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import BatchLoader, embedded_corpus
from tinygpt.optim import MuonAdamW
from tinygpt.tokenizer import ByteTokenizer

model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
loader = BatchLoader(embedded_corpus("train"), ByteTokenizer(), rows=4, seq_len=128, overflow="carry")
trainer = Trainer(model, MuonAdamW.for_model(model), loader, TrainerConfig(num_steps=3))
losses = [step.loss for step in trainer]
assert len(losses) == 3, losses
assert losses[-1] < losses[0], losses

import tinygpt
print(tinygpt.__file__)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)  # the sdist, and the wheel from the sdist
    return folder


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"]]


def with_what_they_need(requirements: list[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that `pip install` of the requirements would bring, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(requirement, "") for requirement in requirements]
    visited: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        distribution = found.setdefault(name, importlib.metadata.distribution(name))
        for wanted in {"", *requirement.extras} - {seen for owner, seen in visited if owner == name}:
            visited.add((name, wanted))
            waiting += [(Requirement(line), wanted) for line in distribution.requires or ()]
    return found


def show_in(site_packages: Path, distribution: importlib.metadata.Distribution) -> None:
    """Make a distribution importable in another environment, by links to what it installed at the top level."""
    assert distribution.files is not None
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        source, link = Path(str(distribution.locate_file(top))), site_packages / top
        if link.exists():
            continue
        if source.is_file():
            shutil.copyfile(source, link)
        elif sys.platform == "win32":  # symbolic links need a privilege there, junctions do not
            run("cmd", "/c", "mklink", "/J", link, source)
        else:
            link.symlink_to(source, target_is_directory=True)


def test_the_wheel_holds_the_package_its_types_and_its_corpus_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = importlib.metadata.PathDistribution(
            zipfile.Path(archive, f"{wheel.name.rsplit('-', 3)[0]}.dist-info/")
        )
        wanted = [line for line in metadata.requires or () if "extra ==" not in line]
    sources = ROOT / "src"
    expected = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name and "/." not in name}  # tools leave caches
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "tinygpt/py.typed" in names
    assert any(name.startswith("tinygpt/data/corpus/") and name.endswith(".txt") for name in names)
    assert any(name.startswith("tinygpt/data/corpus/") and name.endswith(".md") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {str(Requirement(line)) for line in wanted} == {str(requirement) for requirement in declared()}


def test_the_sdist_leaves_the_tests_out(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert tops >= {"src", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}
    assert "tests" not in tops


def test_the_package_index_accepts_both(built: Path) -> None:
    assert "FAILED" not in run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


@pytest.mark.slow
def test_the_wheel_trains_with_only_what_it_declares(built: Path, tmp_path: Path) -> None:
    """A fresh environment sees the wheel, the declared dependencies and what those need; nothing is downloaded."""
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for distribution in with_what_they_need(declared()).values():
        show_in(site_packages, distribution)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    assert Path(run(python, "-I", "-c", TRAIN, cwd=tmp_path)).is_relative_to(site_packages)
