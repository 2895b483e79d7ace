"""Pushing a model of a run, and loading it again by its name, with the real client and all that can go wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hub_client import ClientError, HubClient
from hub_server import HubServer, yaml_errors
from tinygpt.errors import CheckpointError
from tinygpt.publish import files_to_push, push_model
from tinygpt.publish._push import stage, write_card

PUSH = """
from tinygpt.publish import push_model
result = push_model(source, "user/tiny", **options)
"""
LOAD = """
import torch
from tinygpt import GPT
loaded, local = GPT.from_pretrained("user/tiny", cache_dir=cache, **options), GPT.from_pretrained(checkpoint)
ids = torch.tensor([[256, 1, 2]])
result = torch.equal(loaded(ids), local(ids))
"""
MODEL = {"config.json", "model.safetensors", "tokenizer_config.json"}


def push(client: HubClient, source: Path, **options: object) -> str:
    return client.run(PUSH, source=str(source), options=options)


def test_what_is_pushed_loads_by_name_and_tag_with_its_tokenizer_and_card(
    run: Path, hub: HubServer, client: HubClient, tmp_path: Path
) -> None:
    url = push(client, run, step=4, tags=["step-4"], license="mit", private=True, commit_message="Four")
    push(client, run, tags="step-6")
    repo = hub.repos["user/tiny"]
    assert repo.private
    assert url == f"{hub.url}/user/tiny/commit/{repo.tags['step-4']}"
    assert repo.titles[repo.tags["step-4"]] == "Four"
    files = repo.files("step-4")
    assert files.keys() == MODEL | {"README.md", "curve.png", ".gitattributes"}
    assert files["curve.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    assert yaml_errors(card) == []
    assert "license: mit" in card
    assert 'resolve("user/tiny", revision="step-4")' in card
    assert "![Loss, validation and rates against steps](curve.png)" in card
    for step in (4, 6):
        assert files_are_those_of(run / "checkpoints" / f"step-{step:06d}", repo.files(f"step-{step}"))
        loaded = client.run(
            LOAD,
            cache=str(tmp_path / "cache"),
            checkpoint=str(run / "checkpoints" / f"step-{step:06d}"),
            options={"revision": f"step-{step}"},
        )
        assert loaded
    code = card.split("```python\n")[1].split("```")[0]
    client.run(code + "\nresult = tokenizer.decode([65])")


def files_are_those_of(folder: Path, files: dict[str, bytes]) -> bool:
    return all(files[name] == (folder / name).read_bytes() for name in MODEL)


@pytest.fixture(scope="session")
def other(plain: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same kind."""
    copy = tmp_path_factory.mktemp("other") / "step-000002"
    shutil.copytree(run / "checkpoints" / "step-000002", copy)
    shutil.copy(plain / "README.md", copy)
    return copy


def test_only_model_tokenizer_and_card_leave_a_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "step-000006", copy)
    (copy / ".model.safetensors.tmp").touch()
    (copy / "notes.py").touch()
    (copy / "README.md").touch()
    assert {path.name for path in files_to_push(copy)} == MODEL | {"README.md"}
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is no model: it lacks config\.json"):
        files_to_push(copy)
    with pytest.raises(CheckpointError, match=r"there is no folder .*gone; give a checkpoint or a saved model"):
        files_to_push(tmp_path / "gone")


def test_a_card_of_ones_own_goes_as_it_is(run: Path, hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "step-000006", copy)
    (copy / "README.md").write_text("---\nlibrary_name: tinygpt\n---\nmine\n")
    push(client, copy)
    assert hub.repos["user/tiny"].files()["README.md"].endswith(b"mine\n")
    (copy / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(Exception, match=r"HubError.*Invalid metadata in README\.md"):
        push(client, copy)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_picture_of_ones_own_goes_as_it_is_and_stays_what_it_was(
    run: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    copy = tmp_path / "run" / "checkpoints" / "step-000006"
    shutil.copytree(run, tmp_path / "run")
    (copy / "curve.png").write_bytes(b"mine")
    stage(copy, tmp_path / "staged", link)
    write_card(tmp_path / "staged", run=tmp_path / "run", repo_id="user/tiny")
    assert (copy / "curve.png").read_bytes() == b"mine"
    assert "](curve.png)" in (tmp_path / "staged" / "README.md").read_text("utf-8")


def test_a_damaged_model_is_never_published(run: Path, hub: HubServer, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "step-000006", copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="its sha256 is not the one in"):
        push_model(copy, "user/tiny")
    assert not hub.requests


def test_the_same_push_again_changes_nothing(plain: Path, hub: HubServer, client: HubClient) -> None:
    first = push(client, plain, tags="a")
    commits = len(hub.repos["user/tiny"].commits)
    assert push(client, plain, tags="a") == first
    assert push(client, plain) == first  # without a tag it is known by its contents
    assert push(client, plain, tags=["a", "b"]) == first
    repo = hub.repos["user/tiny"]
    assert len(repo.commits) == commits
    assert repo.tags["a"] == repo.tags["b"]


def test_a_tag_is_never_moved(plain: Path, other: Path, hub: HubServer, client: HubClient) -> None:
    push(client, other, tags="kept")
    repo = hub.repos["user/tiny"]
    commits, tag = len(repo.commits), repo.tags["kept"]
    message = client.refusal(PUSH, source=str(plain), options={"tags": "kept"})
    assert "the tag 'kept' of 'user/tiny' is on commit" in message
    assert "`hf repos tag delete user/tiny kept`. Nothing was uploaded." in message
    assert (len(repo.commits), repo.tags["kept"]) == (commits, tag)


def test_a_tag_that_appears_during_the_upload_is_told(
    plain: Path, other: Path, hub: HubServer, client: HubClient
) -> None:
    push(client, other)
    hub.repos["user/tiny"].tags["late"] = hub.repos["user/tiny"].branches["main"]
    code = (
        """
from huggingface_hub import HfApi
look, looks = HfApi.list_repo_refs, []
def blind_once(*arguments, **options):
    found = look(*arguments, **options)
    looks.append(1)
    return type(found)(branches=[], converts=[], tags=[]) if len(looks) == 1 else found
HfApi.list_repo_refs = blind_once
try:
"""
        + "\n".join("    " + line for line in PUSH.splitlines())
        + "\nfinally:\n    HfApi.list_repo_refs = look\n"
    )
    message = client.refusal(code, source=str(plain), options={"tags": "late"})
    assert "the tag 'late'" in message
    assert "The files are uploaded, as commit" in message


FAILURES = [
    ("POST", "/api/repos/create", 503),
    ("GET", "/refs", 500),
    ("POST", "/preupload/", 429),
    ("POST", "/commit/", 500),
    ("POST", "/tag/", 502),
    ("POST", "/validate-yaml", 503),
]


@pytest.mark.parametrize(("method", "part", "status"), FAILURES, ids=lambda value: str(value))
def test_a_push_survives_what_passes(
    plain: Path, hub: HubServer, client: HubClient, method: str, part: str, status: int
) -> None:
    hub.fail(method, part, status=status, times=2)
    push(client, plain, tags="t")
    assert hub.left_to_fail() == 0
    assert files_are_those_of(plain, hub.repos["user/tiny"].files("t"))


@pytest.mark.parametrize("done", [False, True], ids=["half the request", "the answer is lost"])
@pytest.mark.parametrize("part", ["/api/repos/create", "/preupload/", "/commit/", "/tag/"])
def test_a_push_survives_a_server_that_hangs_up(
    plain: Path, hub: HubServer, client: HubClient, part: str, done: bool
) -> None:
    hub.drop("POST", part, done=done)
    push(client, plain, tags="t")
    repo = hub.repos["user/tiny"]
    assert hub.left_to_fail() == 0
    assert repo.tags["t"] == repo.branches["main"]
    assert len(repo.commits) == 2  # the one that made the repository, and ours, once
    assert files_are_those_of(plain, repo.files("t"))


def test_large_files_go_their_own_way_and_survive_too(plain: Path, hub: HubServer, client: HubClient) -> None:
    hub.large_from = 5_000
    hub.drop("PUT", "/objects/", times=2)
    hub.fail("POST", "/objects/batch", status=503, times=1)
    push(client, plain, tags="t")
    repo = hub.repos["user/tiny"]
    assert hub.left_to_fail() == 0
    assert len(hub.objects) == 1
    assert files_are_those_of(plain, repo.files("t"))
    uploads = hub.count("PUT", "/objects/")
    assert push(client, plain, tags="t").endswith(repo.tags["t"])
    assert hub.count("PUT", "/objects/") == uploads


def test_a_wait_that_the_hub_asks_for_is_kept(plain: Path, hub: HubServer, client: HubClient) -> None:
    hub.fail("GET", "/refs", status=429, times=1, headers={"Retry-After": "42"})
    hub.fail("POST", "/tag/", status=429, times=1, headers={"ratelimit": '"api";r=0;t=77'})
    waited = client.run(PUSH + "result = list(waits)\n", source=str(plain), options={"tags": "t"})
    assert {42.0, 77.0} <= set(waited)


def test_a_wait_longer_than_the_hub_s_window_is_not_kept(plain: Path, hub: HubServer, client: HubClient) -> None:
    hub.fail("GET", "/refs", status=429, headers={"Retry-After": "3600"})
    message = client.refusal(PUSH, source=str(plain), options={"tags": "t"})
    assert "the Hub has had too many requests (HTTP 429); try again in 3600 seconds." in message
    assert hub.count("GET", "/refs") == 1


@pytest.mark.parametrize(
    ("status", "headers", "text"),
    [
        (
            401,
            {},
            "access denied (HTTP 401); the account needs permission: run `hf auth login` or set HF_TOKEN, or pass",
        ),
        (403, {}, "access denied (HTTP 403)"),
        (429, {}, "after 5 tries: the Hub has had too many requests (HTTP 429); try again later."),
        (500, {}, "after 5 tries: the Hub answers with a server error (HTTP 500); try again later."),
        (400, {"X-Error-Message": "sent: Bearer hf_secret123"}, "sent: <token>"),
    ],
)
def test_what_does_not_pass_ends_in_one_sentence_without_the_token(
    plain: Path, hub: HubServer, client: HubClient, status: int, headers: dict[str, str], text: str
) -> None:
    hub.fail("POST", "/commit/", status=status, headers=headers)
    message = client.refusal(PUSH, source=str(plain), options={"tags": "t"})
    assert text in message
    assert "hf_secret123" not in message
    assert "\n" not in message
    with pytest.raises(ClientError) as caught:
        client.run(PUSH, source=str(plain), options={"tags": "t"})
    assert "hf_secret123" not in str(caught.value)  # nor in the traceback
    assert hub.repos["user/tiny"].tags == {}


# Loading: what arrives wrong is fetched again or refused, and never left where it would be loaded.


@pytest.fixture
def published(plain: Path, hub: HubServer) -> HubServer:
    hub.add("user/tiny", {path.name: path.read_bytes() for path in files_to_push(plain)})
    return hub


def load(client: HubClient, run: Path, cache: Path, **options: object) -> bool:
    checkpoint = str(run / "checkpoints" / "step-000006")
    return client.run(LOAD, cache=str(cache), checkpoint=checkpoint, options=options)


@pytest.mark.parametrize("large_from", [10**12, 5_000], ids=["git hash", "sha256"])
@pytest.mark.parametrize("fault", ["corrupt", "cut", "shorten", "429", "500", "503", "hang up"])
def test_loading_survives_what_passes(
    run: Path, published: HubServer, client: HubClient, tmp_path: Path, fault: str, large_from: int
) -> None:
    published.large_from = large_from
    if fault == "corrupt":
        published.corrupt("model.safetensors", times=2)
    elif fault in ("cut", "shorten"):
        getattr(published, fault)("model.safetensors", keep=0.5, times=2)
    elif fault == "hang up":
        published.drop("GET", "/resolve/", times=2)
    else:
        published.fail("GET", "/resolve/", status=int(fault), times=2)
    assert load(client, run, tmp_path)
    assert published.left_to_fail() == 0


@pytest.mark.parametrize("large_from", [10**12, 5_000], ids=["git hash", "sha256"])
def test_a_file_that_is_damaged_every_time_is_refused_and_not_left_in_the_cache(
    run: Path, published: HubServer, client: HubClient, tmp_path: Path, large_from: int
) -> None:
    published.large_from = large_from
    published.corrupt("model.safetensors")
    checkpoint = str(run / "checkpoints" / "step-000006")
    values = {"cache": str(tmp_path), "checkpoint": checkpoint}
    message = client.refusal(LOAD, **values, options={})
    assert "after 5 tries: model.safetensors does not have the hash" in message
    assert "it was removed from the cache" in message
    assert not list(tmp_path.rglob("model.safetensors"))
    assert "no complete copy" in client.refusal(LOAD, **values, options={"local_files_only": True})
    published.heal()
    assert load(client, run, tmp_path)


def test_a_cache_that_rots_is_noticed_and_fetched_again(
    run: Path, published: HubServer, client: HubClient, tmp_path: Path
) -> None:
    assert load(client, run, tmp_path)
    (weights,) = tmp_path.rglob("model.safetensors")
    blob = weights.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    values = {"cache": str(tmp_path), "checkpoint": str(run / "checkpoints" / "step-000006")}
    offline = client.refusal(LOAD, **values, options={"local_files_only": True})
    assert "does not have the hash" in offline
    assert load(client, run, tmp_path)


@pytest.mark.parametrize("part", ["/resolve/", "/tree/"])
def test_a_download_that_fails_for_good_leaves_nothing_to_load(
    run: Path, published: HubServer, client: HubClient, tmp_path: Path, part: str
) -> None:
    published.fail("GET", f"{part}", status=503)
    values = {"cache": str(tmp_path), "checkpoint": str(run / "checkpoints" / "step-000006")}
    assert "server error (HTTP 503)" in client.refusal(LOAD, **values, options={})
    assert client.refusal(LOAD, **values, options={"local_files_only": True})
    assert not list(tmp_path.rglob("model.safetensors"))


def test_gated_and_missing_repositories_say_what_to_do(
    run: Path, published: HubServer, client: HubClient, tmp_path: Path
) -> None:
    values = {"cache": str(tmp_path), "checkpoint": str(run / "checkpoints" / "step-000006")}
    assert "no such revision; check the branch, tag or commit" in client.refusal(
        LOAD, **values, options={"revision": "step-9"}
    )
    published.fail("GET", "/api/models/", status=403, headers={"X-Error-Code": "GatedRepo"})
    message = client.refusal(LOAD, **values, options={})
    assert "access is gated; accept the terms on the repository's page" in message
    published.heal()
    published.repos.clear()
    assert "no such repository (HTTP 401)" in client.refusal(LOAD, **values, options={})


def test_a_slow_hub_is_waited_for(run: Path, published: HubServer, client: HubClient, tmp_path: Path) -> None:
    published.stall("GET", "/resolve/", seconds=0.3, times=2)
    published.stall("GET", "/api/models/", seconds=0.3)
    assert load(client, run, tmp_path)
    assert published.left_to_fail() == 0


def test_a_pushed_folder_tells_its_files_and_nothing_of_this_machine(
    run: Path, hub: HubServer, client: HubClient
) -> None:
    push(client, run)
    text = hub.repos["user/tiny"].files()["README.md"].decode()
    assert str(run.parent) not in text
    assert json.loads(hub.repos["user/tiny"].files()["config.json"])["model_type"] == "tinygpt"
