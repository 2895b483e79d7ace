"""A folder into a repository, in one commit, with tags."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.errors import HubError
from tinygpt.hub._download import git_hash, sha256
from tinygpt.hub._names import MODEL_FILES, check_repo_id, check_tags, check_token, matching
from tinygpt.hub._retry import check_retries, http_status, with_retries

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    commit_message: str | None = None,
    tags: str | Sequence[str] = (),
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    retries: int = 4,
) -> str:
    """Upload a folder to a model repository in one commit, creating repository and branch where missing.

    The same call again changes nothing: files that are there already are not sent, an unchanged folder makes no
    commit, and a tag that is on a commit with this very model counts as done. So an upload cut off anywhere is
    finished by repeating it.

    Args:
        folder: The folder whose contents become the repository's.
        repo_id: `user/repo`.
        private: Create the repository as private. An existing public repository is refused, not made private.
        branch: Branch to commit to. `None` is the main branch.
        commit_message: First line of the commit.
        tags: One or several tags for the commit, such as `"step-87000"`. Tags are never moved: one that is on
            another model is an error, before anything is uploaded.
        token: Access token with write permission. `None` is the one the client is logged in with.
        allow_patterns: Which files to upload, as glob patterns on the path in the folder. `None` is all. Names that
            begin with a dot, such as half-written files, never go.
        retries: How often a failed connection, too many requests (429) or a server error (5xx) is tried again, after
            about 1, 2, 4, ... seconds, or when the Hub says.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: If `retries` is negative.
        HubError: If the folder or a name is wrong, there is no token, access is refused, a tag is taken, or the Hub
            keeps failing.

    Example:
        ```python
        url = upload_folder("runs/d12/checkpoints/step-087000", "user/d12", private=True, tags="step-87000")
        ```
    """
    source = Path(folder).expanduser()
    if not str(folder) or not source.is_dir():  # an empty setting must not publish the working directory
        raise HubError(f"{str(folder)!r} is not an existing folder; save the model first, then upload its folder.")
    check_repo_id(repo_id)
    tags = check_tags(tags)
    if branch is not None:
        check_tags(branch)
    check_token(token)
    check_retries(retries)

    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    visible = [p for p in source.rglob("*") if not any(x.startswith(".") for x in p.relative_to(source).parts)]
    names = sorted(path.relative_to(source).as_posix() for path in visible if path.is_file())
    files = {n: source / n for n in matching(names, ["*"] if allow_patterns is None else allow_patterns)}
    if not files:
        raise HubError(f"{str(folder)!r} holds no file to upload.")

    task = f"Uploading {source.resolve().name!r} to {repo_id!r} failed"
    if token is None and get_token() is None:
        raise HubError(
            f"{task}: there is no access token. Make one with write permission on the Hub's settings page, then "
            "run `hf auth login` or set HF_TOKEN, or pass token=...."
        )
    api = HfApi(token=token)
    with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True), task, retries)
    if private and not with_retries(lambda: api.model_info(repo_id), task, retries).private:
        raise HubError(
            f"{repo_id!r} exists and is public, but private=True was asked for; make it private in its settings on "
            "the Hub, or choose another name. Nothing was uploaded."
        )
    if branch is not None:
        with_retries(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), task, retries)
    taken = _taken_tags(api, repo_id, tags, files, task, retries) if tags else {}
    commit = _commit_on_branch(api, repo_id, branch, set(taken.values()), task, retries) if taken else None

    def send() -> str:
        info = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            revision=branch,
            commit_message=commit_message or f"Upload {source.resolve().name}",
        )
        return info.oid

    commit = commit or with_retries(send, task, retries)
    for tag in tags:
        if tag not in taken:
            with_retries(partial(_create_tag, api, repo_id, tag, commit), task, retries)
    return f"{api.endpoint}/{repo_id}/commit/{commit}"


def _taken_tags(
    api: "HfApi", repo_id: str, tags: Sequence[str], files: Mapping[str, Path], task: str, retries: int
) -> dict[str, str]:
    """Return the commits of those tags that exist already, each with this very model.

    Raises:
        HubError: If a tag is on another model.
    """
    found = with_retries(partial(_all_tags, api, repo_id), task, retries)
    taken = {tag: found[tag] for tag in tags if tag in found}
    for tag, commit in taken.items():
        if not with_retries(partial(_holds, api, repo_id, commit, files), task, retries):
            raise HubError(_refusal(repo_id, tag, commit) + " Nothing was uploaded.")
    return taken


def _all_tags(api: "HfApi", repo_id: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}


def _commit_on_branch(
    api: "HfApi", repo_id: str, branch: str | None, commits: set[str], task: str, retries: int
) -> str | None:
    """Return the one of these commits that is in a branch's history, if any: it need not be made again."""
    history = with_retries(lambda: api.list_repo_commits(repo_id, revision=branch), task, retries)
    return next((item.commit_id for item in history if item.commit_id in commits), None)


def _holds(api: "HfApi", repo_id: str, commit: str, files: Mapping[str, Path]) -> bool:
    """Return whether a commit holds this model: a card or a picture may differ, as times in them do."""
    from huggingface_hub.hf_api import RepoFile

    names = matching(files, MODEL_FILES) or list(files)
    infos = api.get_paths_info(repo_id, names, revision=commit)
    there = {info.path: info for info in infos if isinstance(info, RepoFile)}
    return all(name in there and _is_same(files[name], there[name]) for name in names)


def _is_same(path: Path, info: "RepoFile") -> bool:
    if info.size != path.stat().st_size:
        return False
    return bool(info.lfs.sha256 == sha256(path) if info.lfs is not None else info.blob_id == git_hash(path))


def _create_tag(api: "HfApi", repo_id: str, tag: str, commit: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except Exception as error:
        if http_status(error) != 409:
            raise
        # Made by a request of ours whose answer was lost, or by somebody else since the tags were looked at.
        there = _all_tags(api, repo_id).get(tag)
        if there is not None and there != commit:
            uploaded = f" The files are uploaded, as commit {commit[:12]}."
            raise HubError(_refusal(repo_id, tag, there) + uploaded) from None


def _refusal(repo_id: str, tag: str, commit: str) -> str:
    return (
        f"the tag {tag!r} of {repo_id!r} is on commit {commit[:12]} with another model, and tags are never moved: "
        f"choose another tag or repository, or delete it with `hf repos tag delete {repo_id} {tag}`."
    )
