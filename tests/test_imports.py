"""`import tinygpt` does no work, and the package imports nothing it does not declare."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "tinygpt").rglob("*.py"))

SNAPSHOT = """
import logging, os, random, signal, sys, warnings
import numpy, torch

def snapshot():
    return {
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "path": list(sys.path),
        "hooks": (sys.excepthook, sys.displayhook),
        "signals": {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)},
        "log level": logging.root.level,
        "log handlers": list(logging.root.handlers),
        "loggers with handlers": {
            name for name, value in logging.root.manager.loggerDict.items() if getattr(value, "handlers", None)
        },
        "warning filters": list(warnings.filters),
        "python randomness": random.getstate(),
        "numpy randomness": str(numpy.random.get_state()),
        "torch randomness": torch.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "cuda in use": torch.cuda.is_initialized(),
        "compiler": (torch._dynamo.config.get_config_copy() if "torch._dynamo" in sys.modules else None),
    }

before = snapshot()
import tinygpt
after = snapshot()
changed = [name for name in before if before[name] != after[name]]
print(",".join(changed))
"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_leaves_the_process_as_it_was() -> None:
    assert run("-c", SNAPSHOT) == ""


def test_import_is_quiet_when_warnings_are_errors() -> None:
    assert run("-W", "error", "-c", "import tinygpt") == ""


def test_import_pulls_in_nothing_that_only_some_need() -> None:
    heavy = {"huggingface_hub", "matplotlib", "tiktoken", "rustbpe", "pyarrow", "lm_eval", "yaml"}
    heavy |= {"starlette", "uvicorn", "prompt_toolkit", "openai"}
    heavy |= {"tensorboard", "trackio", "wandb", "mlflow", "transformers"}
    loaded = run("-c", "import sys, tinygpt; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert sorted(heavy & set(loaded)) == []


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for_users = [line for extra, lines in extras.items() if extra not in ("dev", "docs") for line in lines]
    wanted = [*project["dependencies"], *for_users]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted}  # type: ignore[index]
    distributions = importlib.metadata.packages_distributions()
    available = {*sys.stdlib_module_names, "compression", "tinygpt"}  # compression: Python 3.14 has it
    undeclared = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in {name.partition(".")[0] for name in names} - available:
                owners = {owner.lower().replace("_", "-") for owner in distributions.get(name, [name])}
                if not owners & declared:
                    undeclared.add(f"{source.relative_to(ROOT)} imports {name}")
    assert not undeclared
