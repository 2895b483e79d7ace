"""A small run with evaluations and a changed resume, a hub, and a client process, made once for all tests here."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_client import HubClient, start_client
from hub_server import HubServer, serve_hub
from tiny_run import train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, gone on with to 6 under a stretched schedule; tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(out, 4)
    train(out, 6, accept=("schedule",))
    return out


@pytest.fixture(scope="session")
def plain(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of the run with a card in place: pushing it draws no picture, which takes the longest."""
    copy = tmp_path_factory.mktemp("plain") / "step-000006"
    shutil.copytree(run / "checkpoints" / "step-000006", copy)
    (copy / "README.md").write_text("---\nlibrary_name: tinygpt\n---\nA card.\n")
    return copy


@pytest.fixture(scope="session")
def shared_hub() -> Iterator[HubServer]:
    with serve_hub() as server:
        yield server


@pytest.fixture(scope="session")
def client(shared_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    with start_client(shared_hub, tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.fixture
def hub(shared_hub: HubServer) -> HubServer:
    """The hub, empty and healthy."""
    shared_hub.heal()
    shared_hub.repos.clear()
    shared_hub.requests.clear()
    shared_hub.objects.clear()
    shared_hub.large_from = 10**12
    return shared_hub
