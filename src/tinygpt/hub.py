"""Files to and from the Hugging Face Hub: folders in, folders out, no model and no tensor.

`huggingface_hub` is imported when a function needs it, so a local folder costs nothing. Where the client looks and
who it is come from its own settings (`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`); nothing here reads or changes them.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tinygpt.errors import ConfigError, HubError

__all__ = ["check_repo_id", "resolve", "upload_folder"]

_Result = TypeVar("_Result")

# What a saved model consists of. Only the top folder: a repository may also hold training states of several GB.
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken")
_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    retries: int = 4,
) -> Path:
    """Return a local folder for a path or a Hub repository, downloading the repository if needed.

    An existing folder wins over a repository of the same name. When the Hub cannot be reached and the cache holds
    the whole revision, the client returns the cached copy.

    Args:
        name_or_path: A folder, or `user/repo`.
        revision: Branch, tag or commit of the repository. `None` is its main branch.
        cache_dir: Where downloads are kept. `None` is the client's own cache.
        local_files_only: Use only what is in the cache, without any request.
        token: Access token. `None` is the one the client is logged in with, if any.
        allow_patterns: Which files to download, as glob patterns on the path in the repository. `None` is the files
            of a saved model in the repository's top folder.
        retries: How often a failed connection or a server error (5xx) is tried again, after 1, 2, 4, ... seconds.

    Returns:
        The folder that holds the files.

    Raises:
        ConfigError: If `retries` is negative.
        HubError: If there is no such folder and no such repository, access is refused, or the Hub keeps failing.

    Example:
        ```python
        folder = resolve("tinygpt-dev/d12-rtx4070", revision="step-87000")
        ```
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() and str(name_or_path):  # Path("") is the working folder, which an empty setting does not mean
        return path
    if path.is_file():
        raise HubError(f"{str(name_or_path)!r} is a file; pass the folder that holds it: {str(path.parent)!r}.")
    repo_id = str(name_or_path)
    if isinstance(name_or_path, Path) or not _REPO_ID.fullmatch(repo_id):
        raise HubError(
            f"{repo_id!r} is neither an existing folder (looked in {str(path.absolute().parent)!r}) nor a Hub name, "
            "which reads 'user/repo'; check the spelling of the path."
        )

    from huggingface_hub import snapshot_download

    def download() -> str:
        return snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=list(_MODEL_FILES if allow_patterns is None else allow_patterns),
            ignore_patterns=["*/*"] if allow_patterns is None else None,
        )

    where = f"{repo_id!r} at revision {revision!r}" if revision else repo_id
    if local_files_only:
        task = f"No folder {repo_id!r} exists, and the local Hub cache has no complete copy of {where}"
    else:
        task = f"No folder {repo_id!r} exists, and downloading {where} from the Hub failed"
    return Path(_with_retries(download, task, 0 if local_files_only else retries))


def check_repo_id(repo_id: str) -> None:
    """Raise `HubError` unless this is the name of a repository, `user/repo`."""
    if not _REPO_ID.fullmatch(repo_id):
        raise HubError(f"{repo_id!r} is not a Hub name; give 'user/repo', in letters, digits, '-', '_' and '.'.")


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    retries: int = 4,
) -> str:
    """Upload a folder to a model repository in one commit, creating repository and branch where missing.

    Args:
        folder: The folder whose contents become the repository's.
        repo_id: `user/repo`.
        private: Create the repository as private. An existing public repository is refused, not made private.
        branch: Branch to commit to. `None` is the main branch.
        commit_message: First line of the commit.
        token: Access token with write permission. `None` is the one the client is logged in with.
        allow_patterns: Which files to upload, as glob patterns on the path in the folder. `None` is all. Names that
            begin with a dot, such as half-written files, never go.
        retries: How often a failed connection or a server error (5xx) is tried again, after 1, 2, 4, ... seconds.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: If `retries` is negative.
        HubError: If the folder or the name is wrong, access is refused, or the Hub keeps failing.

    Example:
        ```python
        url = upload_folder("runs/d12", "user/d12", private=True)
        ```
    """
    source = Path(folder).expanduser()
    if not str(folder) or not source.is_dir():  # an empty setting must not publish the working directory
        raise HubError(f"{str(folder)!r} is not an existing folder; save the model first, then upload its folder.")
    check_repo_id(repo_id)

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    task = f"Uploading {str(folder)!r} to {repo_id!r} failed"
    _with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True), task, retries)
    if private and not _with_retries(lambda: api.model_info(repo_id), task, retries).private:
        raise HubError(
            f"{repo_id!r} exists and is public, but private=True was asked for; make it private in its settings on "
            "the Hub, or choose another name. Nothing was uploaded."
        )
    if branch is not None:
        _with_retries(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), task, retries)

    def commit() -> str:
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=source,
            revision=branch,
            commit_message=commit_message or f"Upload {source.resolve().name}",
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            ignore_patterns=[".*", "*/.*"],
        )
        return str(info.commit_url)

    return _with_retries(commit, task, retries)


def _with_retries(action: Callable[[], _Result], task: str, retries: int) -> _Result:
    """Run `action`, trying again after failures that may pass.

    The client repeats some requests by itself, but not a download that begins with a 5xx, nor a plain commit.
    """
    if retries < 0:
        raise ConfigError(f"retries={retries} is negative; choose 0 to try once.")
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:  # the client raises errors of its own, of its HTTP library and of Xet
            if attempt == retries or not _may_pass(error):
                tries = f" after {attempt + 1} tries" if attempt else ""
                raise HubError(f"{task}{tries}: {_reason(error)}") from error
        time.sleep(min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it: the client hides the HTTP status one or two levels down."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, or `None` if the server gave no answer."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _lost_connection(error: BaseException) -> bool:
    """Return whether no answer came: refused, reset, timed out."""
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library differs between versions of the client (httpx, httpx2), so its base error is read off here.
    transport_error = HfHubHTTPError.__mro__[1]
    return _status(error) is None and any(
        isinstance(link, (transport_error, ConnectionError, TimeoutError)) for link in _chain(error)
    )


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return False
    status = _status(error)
    return _lost_connection(error) if status is None else status in (408, 429) or status >= 500


def _reason(error: BaseException) -> str:
    """Say in one sentence what went wrong and what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    links = list(_chain(error))

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in links)

    status = _status(error)
    if caused_by(GatedRepoError):
        return "access is gated; accept the terms on the repository's page and pass a token of that account."
    if caused_by(RevisionNotFoundError):
        return "the repository has no such revision; check the branch, tag or commit."
    if caused_by(RepositoryNotFoundError):
        # The Hub answers 401 for a missing repository to those without access, so that private names do not leak.
        return f"no such repository (HTTP {status}); check the name, or pass a token if it is private."
    if status in (401, 403):
        return f"access denied (HTTP {status}); pass token=... with the needed permission, or run `hf auth login`."
    if status == 404:
        return "the Hub does not have it (HTTP 404); check the name and the revision."
    if status is not None and status >= 500:
        return f"the Hub answers with a server error (HTTP {status}); try again later."
    if caused_by(OfflineModeIsEnabled):
        return "the client is offline (HF_HUB_OFFLINE is set); unset it to allow requests."
    if _lost_connection(error):
        return "the Hub cannot be reached; check the network and HF_ENDPOINT."
    if caused_by(EntryNotFoundError):
        return "download it once with local_files_only=False."
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
