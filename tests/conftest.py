"""Settings every test shares: seeded hypothesis runs, fair threads, and `gpu` tests only where there is a GPU."""

import os

import pytest
from hypothesis import settings

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Before torch is imported, and for child processes too: more threads than cores wait for each other, tenfold.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# huggingface_hub reads it once, when it is first imported, and then shows no bar in this process, ours included.
os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)

# cuBLAS repeats its sums with it alone, and torch reads it at its first product in a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

settings.register_profile("tinygpt", derandomize=True, deadline=None)
settings.load_profile("tinygpt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and say so, what cannot run on this machine."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
