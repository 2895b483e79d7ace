"""Push and pull against a real HTTP server; the client runs in a fresh process, as its settings are read at import."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinygpt
from hub_client import client_environment
from hub_server import HubServer, serve_hub
from tinygpt.errors import ConfigError, HubError
from tinygpt.hub import check_tags, resolve, upload_folder

MODEL = {"config.json": b'{"dim": 8}\n', "model.safetensors": bytes(range(256)) * 40, "tokenizer.json": b"{}"}

# `import tinygpt` brings torch, which the hub does not need: an empty package around it starts a second sooner.
PRELUDE = """\
import sys
import types
from pathlib import Path
sys.modules["tinygpt"] = package = types.ModuleType("tinygpt")
package.__path__ = [sys.argv[2]]
from tinygpt import hub
from tinygpt.errors import HubError
from tinygpt.hub import _retry
import time
waits = []
sleep = time.sleep
time.sleep = lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.01)))  # the client's waits too
folder = Path(sys.argv[1])
"""

CODA = """
assert "torch" not in sys.modules
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serve_hub() as server:
        yield server


def client(hub: HubServer, folder: Path, code: str, token: str | None = "hf_test") -> str:
    """Run `code` as a user would, with the Hub at the server's address; return what it prints."""
    environment = client_environment(hub, folder / "home", token)
    package = Path(tinygpt.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code + CODA, str(folder), str(package)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_model(folder: Path) -> Path:
    source = folder / "saved"
    source.mkdir()
    for name, data in MODEL.items():
        (source / name).write_bytes(data)
    return source


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_an_existing_folder_wins_over_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("user/tiny") == Path("user/tiny")


@pytest.mark.parametrize(
    "name", ["./runs/d12", "runs/d12/step-000500", "/no/such/place", "~/nothing-here", "gpt2", "a/b/c", ""]
)
def test_what_is_neither_a_folder_nor_a_name_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        HubError, match=r"neither an existing folder \(looked in .*\) nor a Hub name, which reads 'user/repo'"
    ):
        resolve(name)


def test_a_missing_path_object_is_never_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="neither an existing folder"):
        resolve(Path("user") / "tiny")


def test_a_file_is_refused_with_the_name_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(HubError, match=f"is a file; pass the folder that holds it: '{tmp_path}'"):
        resolve(tmp_path / "model.safetensors")


def test_uploading_needs_a_folder_and_a_full_name(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="'nowhere' is not an existing folder; save the model first"):
        upload_folder("nowhere", "user/tiny")
    with pytest.raises(HubError, match="'tiny' is not a Hub name; give 'user/repo'"):
        upload_folder(tmp_path, "tiny")


def test_a_negative_number_of_retries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="retries=-1 is negative; choose 0 to try once"):
        resolve("user/tiny", retries=-1)
    with pytest.raises(ConfigError, match="retries=-1 is negative; choose 0 to try once"):
        upload_folder(tmp_path, "user/tiny", retries=-1)


def test_what_is_uploaded_comes_back_byte_for_byte(hub: HubServer, tmp_path: Path) -> None:
    (write_model(tmp_path) / ".model.safetensors.tmp").write_bytes(b"half")
    code = """
url = hub.upload_folder(folder / "saved", "user/tiny", private=True, commit_message="First")
again = hub.upload_folder(folder / "saved", "user/tiny", branch="step-10")
back = hub.resolve("user/tiny", revision="step-10", cache_dir=folder / "cache")
print(url, again, back, sep="\\n")
"""
    url, again, back = client(hub, tmp_path, code).split()
    repo = hub.repos["user/tiny"]
    assert repo.private
    assert url == f"{hub.url}/user/tiny/commit/{repo.branches['main']}"
    assert again.startswith(f"{hub.url}/user/tiny/commit/")
    assert set(repo.branches) == {"main", "step-10"}
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes", *MODEL}
    assert read(Path(back)) == MODEL


def test_only_the_files_of_a_model_are_downloaded_unless_others_are_asked_for(hub: HubServer, tmp_path: Path) -> None:
    extra = {"figure.png": b"png", "step-000500/optimizer.safetensors": b"large"}
    hub.add("user/tiny", MODEL | extra)
    code = """
print(hub.resolve("user/tiny", cache_dir=folder / "a"))
print(hub.resolve("user/tiny", cache_dir=folder / "b", allow_patterns=["step-*/*"]))
"""
    default, chosen = client(hub, tmp_path, code).split()
    assert read(Path(default)) == MODEL
    assert read(Path(chosen)) == {"step-000500/optimizer.safetensors": b"large"}


def test_a_download_survives_two_server_errors(hub: HubServer, tmp_path: Path) -> None:
    hub.add("user/tiny", MODEL)
    hub.fail("GET", "/resolve/", status=503, times=2)
    hub.fail("GET", "/api/models/", status=500, times=2)
    back = client(hub, tmp_path, 'print(hub.resolve("user/tiny"))').strip()
    assert read(Path(back)) == MODEL
    assert hub.left_to_fail() == 0


def test_an_upload_survives_two_server_errors(hub: HubServer, tmp_path: Path) -> None:
    write_model(tmp_path)
    hub.fail("POST", "/commit/", status=500, times=2)
    hub.fail("POST", "/repos/create", status=503, times=2)
    client(hub, tmp_path, 'hub.upload_folder(folder / "saved", "user/tiny")')
    repo = hub.repos["user/tiny"]
    assert MODEL.items() <= repo.commits[repo.branches["main"]].items()
    assert hub.left_to_fail() == 0


def test_a_hub_that_keeps_failing_ends_in_an_error_after_the_promised_tries(hub: HubServer, tmp_path: Path) -> None:
    hub.add("user/tiny", MODEL)
    hub.fail("GET", "/api/models/", status=500)
    code = """
try:
    hub.resolve("user/tiny", retries=2)
except HubError as error:
    print(error)
"""
    assert "after 3 tries: the Hub answers with a server error (HTTP 500); try again later." in client(
        hub, tmp_path, code
    )
    assert hub.count("GET", "/api/models/") == 3


def test_waits_double_up_to_a_bound_and_differ_by_a_quarter(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("GET", "/api/models/", status=502)
    code = """
try:
    hub.resolve("user/tiny", retries=7)
except HubError:
    print(*waits)
"""
    waits = [float(wait) for wait in client(hub, tmp_path, code).split()]
    assert len(waits) == 7
    for wait, base in zip(waits, [1, 2, 4, 8, 16, 30, 30], strict=True):
        assert 0.75 * base <= wait <= 1.25 * base
    assert waits[5] != waits[6]


def test_refusals_are_not_repeated_and_say_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    hub.add("user/tiny", MODEL)
    hub.add("user/open", MODEL)
    hub.fail("GET", "/api/models/user/closed", status=403)
    hub.fail("POST", "/api/models/user/tiny/", status=403)
    write_model(tmp_path)
    code = """
def show(call):
    try:
        call()
    except HubError as error:
        print(error)

show(lambda: hub.resolve("user/typo"))
show(lambda: hub.resolve("user/tiny", revision="nope"))
show(lambda: hub.resolve("user/closed"))
show(lambda: hub.upload_folder(folder / "saved", "user/tiny"))
show(lambda: hub.upload_folder(folder / "saved", "user/open", private=True))
show(lambda: hub.resolve("user/tiny", local_files_only=True))
"""
    unknown, revision, closed, upload, public, uncached = client(hub, tmp_path, code).splitlines()
    assert unknown == (
        "No folder 'user/typo' exists, and downloading user/typo from the Hub failed: no such repository (HTTP 401); "
        "check the name, and if it is private run `hf auth login` or set HF_TOKEN, or pass token=...."
    )
    assert revision.endswith("the repository has no such revision; check the branch, tag or commit.")
    assert "access denied (HTTP 403); the account needs permission: run `hf auth login`" in closed
    assert "Uploading" in upload
    assert "access denied (HTTP 403); the account needs permission: run `hf auth login`" in upload
    assert "'user/open' exists and is public, but private=True was asked for" in public
    assert len(hub.repos["user/open"].commits) == 1
    assert "the local Hub cache has no complete copy of user/tiny" in uncached
    assert "local_files_only=False" in uncached
    assert hub.count("GET", "user/typo") == 1


def test_after_a_download_the_cache_serves_without_requests(hub: HubServer, tmp_path: Path) -> None:
    hub.add("user/tiny", MODEL)
    first = client(hub, tmp_path, 'print(hub.resolve("user/tiny"))').strip()
    seen = len(hub.requests)
    second = client(hub, tmp_path, 'print(hub.resolve("user/tiny", local_files_only=True))').strip()
    assert second == first
    assert len(hub.requests) == seen


def test_a_complete_copy_in_the_cache_serves_while_the_hub_is_down(hub: HubServer, tmp_path: Path) -> None:
    hub.add("user/tiny", MODEL)
    first = client(hub, tmp_path, 'print(hub.resolve("user/tiny"))')
    hub.fail("GET", "/api/models/", status=503)
    assert client(hub, tmp_path, 'print(hub.resolve("user/tiny"))') == first


def test_a_hub_that_is_not_there_is_named_as_unreachable(hub: HubServer, tmp_path: Path) -> None:
    code = """
try:
    hub.resolve("user/tiny", retries=1)
except HubError as error:
    print(error)
"""
    with serve_hub() as gone:
        pass
    assert "after 2 tries: the Hub cannot be reached; check the network and HF_ENDPOINT." in client(
        gone, tmp_path, code
    )


def test_an_empty_folder_name_never_publishes_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_model(tmp_path))
    with pytest.raises(HubError, match="'' is not an existing folder"):
        upload_folder("", "user/tiny")


def test_without_a_token_nothing_is_asked_and_the_ways_to_one_are_named(hub: HubServer, tmp_path: Path) -> None:
    write_model(tmp_path)
    code = """
try:
    hub.upload_folder(folder / "saved", "user/tiny")
except HubError as error:
    print(error)
hub.upload_folder(folder / "saved", "user/given", token="hf_given")
"""
    message = client(hub, tmp_path, code, token=None)
    assert "Uploading 'saved' to 'user/tiny' failed: there is no access token." in message
    assert "run `hf auth login` or set HF_TOKEN, or pass token=..." in message
    assert hub.repos.keys() == {"user/given"}


def test_names_of_tags_and_branches_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert check_tags("step-87000") == ["step-87000"]
    assert check_tags(["v1.0", "runs/a+b", "v1.0"]) == ["v1.0", "runs/a+b"]
    for name in ("", "-x", "a b", "a..b", "a.lock", "refs/heads/", "a~1", "a:b", "a.", "@{", "a\nb"):
        with pytest.raises(HubError, match="is no name for a tag or branch; use letters"):
            upload_folder(tmp_path, "user/tiny", tags=name)
        with pytest.raises(HubError, match="is no name for a tag or branch"):
            upload_folder(tmp_path, "user/tiny", branch=name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    with pytest.raises(HubError, match="holds no file to upload"):
        upload_folder(tmp_path, "user/tiny")


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_se cret", "", "hf_sécret", 5])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(tmp_path: Path, token: str) -> None:
    (tmp_path / "config.json").touch()
    for call in (lambda: resolve("user/tiny", token=token), lambda: upload_folder(tmp_path, "user/tiny", token=token)):
        with pytest.raises(HubError, match="the access token is no word of printable ASCII characters") as caught:
            call()
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize("revision", ["", " ", "a\nb", 5, b"main"])
def test_a_revision_that_is_no_name_is_refused_before_a_request(revision: str) -> None:
    with pytest.raises(HubError, match=r"revision=.* is no name of a branch, tag or commit"):
        resolve("user/tiny", revision=revision)


def test_what_is_no_text_is_no_name() -> None:
    with pytest.raises(HubError, match="None is neither a folder nor a Hub name; give a path, or 'user/repo'"):
        resolve(None)  # type: ignore[arg-type]
    with pytest.raises(HubError, match="5 is no name for a tag or branch"):
        check_tags(5)  # type: ignore[arg-type]
