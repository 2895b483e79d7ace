from collections.abc import Iterator

import pytest

from chat_model import chat_model
from chat_server import serving

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A server with the default limits but for the slots, which are few so that texts wait for each other."""
    with serving(*chat_model(), num_slots=4) as address:
        yield address
