"""Whether torch.compile works is found out by trying, and told in a line."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tinygpt import compiler
from tinygpt.compiler import compiler_problem
from tinygpt.errors import ConfigError

WITHOUT_COMPILER = """
import warnings
import torch
from small_runs import make_trainer
from tinygpt.compiler import compiler_problem
from tinygpt.optim import MuonAdamW

print(compiler_problem("cpu"))
plain = [step.loss for step in make_trainer(compile=False)]
for setting in ("block", "model", True, "auto"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(compile=setting, optimizer=lambda model: MuonAdamW.for_model(model, compile="auto"))
        losses = [step.loss for step in trainer]
    print(setting, losses == plain, [str(each.message) for each in caught])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimized = [s.loss for s in make_trainer(optimizer=lambda model: MuonAdamW.for_model(model, compile=True))]
print("optimizer", optimized == plain, [str(each.message) for each in caught])
"""


@pytest.fixture
def asked_anew() -> Iterator[None]:
    compiler._problem.cache_clear()
    yield
    compiler._problem.cache_clear()


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_there_is_no_problem_where_a_compiler_works() -> None:
    assert compiler_problem("cpu") is None
    assert compiler_problem(torch.device("cpu")) is None


@pytest.mark.skipif(sys.platform == "win32", reason="another variable names the compiler there")
def test_without_a_compiler_training_goes_on_after_one_warning(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-such-compiler"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert finished.returncode == 0, finished.stderr
    problem, *lines = finished.stdout.splitlines()
    assert problem.startswith("torch.compile does not work on cpu here (")
    assert "no-such-compiler" in problem
    warning = [f"training runs uncompiled, compile=False says so silently: {problem}"]
    assert lines == [
        *(f"{setting} True {warning}" for setting in ("block", "model", True)),
        "auto True []",
        f"optimizer True {[f'the Muon update is not compiled: {problem}']}",
    ]


def test_a_compiler_that_fails_or_computes_something_else_is_told(
    asked_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(function: Callable[..., Any], **options: Any) -> Any:
        raise RuntimeError("Python 9 is not supported\nby this torch")

    monkeypatch.setattr(torch, "compile", fail)
    assert compiler_problem("cpu") == (
        "torch.compile does not work on cpu here (RuntimeError: Python 9 is not supported)."
    )
    compiler._problem.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x: x)
    assert compiler_problem("cpu") == "torch.compile computes wrong numbers on cpu here."


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='gpu' is none that torch knows; choose cpu, cuda"):
        compiler_problem("gpu")


def test_a_device_that_is_not_there_is_a_problem_and_no_error() -> None:
    device = "mps" if not torch.backends.mps.is_available() else "xpu"
    assert (compiler_problem(device) or "").startswith(f"torch.compile does not work on {device} here (")
