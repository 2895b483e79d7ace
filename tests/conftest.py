"""Settings every test shares: seeded hypothesis runs, and `gpu` tests only where there is a GPU."""

import pytest
import torch
from hypothesis import settings

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
