"""A folder for a name: the folder itself, or a repository's files."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tinygpt.errors import HubError
from tinygpt.hub._names import MODEL_FILES, check_token, is_repo_id, matching
from tinygpt.hub._retry import DamagedFileError, with_retries


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
    the whole revision, the client returns the cached copy. Each file in the cache is compared with the hash that the
    Hub announced for it; a damaged one is removed and fetched again. Where the system has no symbolic links, as on
    many Windows machines, the client keeps no hash, and sizes are all that is compared.

    Args:
        name_or_path: A folder, or `user/repo`.
        revision: Branch, tag or commit of the repository. `None` is its main branch.
        cache_dir: Where downloads are kept. `None` is the client's own cache.
        local_files_only: Use only what is in the cache, without any request.
        token: Access token. `None` is the one the client is logged in with, if any.
        allow_patterns: Which files to download, as glob patterns on the path in the repository. `None` is the files
            of a saved model in the repository's top folder.
        retries: How often a failed connection, a damaged file, too many requests (429) or a server error (5xx) is
            tried again, after about 1, 2, 4, ... seconds, or when the Hub says.

    Returns:
        The folder that holds the files.

    Raises:
        ConfigError: If `retries` is negative.
        HubError: If there is no such folder and no such repository, the revision or the token is no text that could
            be one, access is refused, the Hub keeps failing, or what it sends is damaged every time.

    Example:
        ```python
        folder = resolve("tinygpt-dev/d12-rtx4070", revision="step-87000")
        ```
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise HubError(f"{name_or_path!r} is neither a folder nor a Hub name; give a path, or 'user/repo'.")
    path = Path(name_or_path).expanduser()
    if path.is_dir() and str(name_or_path):  # Path("") is the working folder, which an empty setting does not mean
        return path
    if path.is_file():
        raise HubError(f"{str(name_or_path)!r} is a file; pass the folder that holds it: {str(path.parent)!r}.")
    repo_id = str(name_or_path)
    if isinstance(name_or_path, Path) or not is_repo_id(repo_id):
        raise HubError(
            f"{repo_id!r} is neither an existing folder (looked in {str(path.absolute().parent)!r}) nor a Hub name, "
            "which reads 'user/repo'; check the spelling of the path."
        )

    check_token(token)
    if revision is not None and not (isinstance(revision, str) and revision.isprintable() and revision.strip()):
        raise HubError(f"revision={revision!r} is no name of a branch, tag or commit; None is the main branch.")

    from huggingface_hub import snapshot_download

    # Only the top folder: a repository may also hold training states of several GB.
    allow = list(MODEL_FILES if allow_patterns is None else allow_patterns)
    ignore = ["*/*"] if allow_patterns is None else None

    def download() -> Path:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=allow,
                ignore_patterns=ignore,
            )
        )
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()]
        for name in matching(names, allow):
            if allow_patterns is not None or "/" not in name:
                _check_cached_file(folder / name)
        return folder

    where = f"{repo_id!r} at revision {revision!r}" if revision else repo_id
    if local_files_only:
        task = f"No folder {repo_id!r} exists, and the local Hub cache has no complete copy of {where}"
    else:
        task = f"No folder {repo_id!r} exists, and downloading {where} from the Hub failed"
    return with_retries(download, task, 0 if local_files_only else retries)


def git_hash(path: Path) -> str:
    """Return git's name for the contents of a file, which the Hub gives to small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which the Hub gives to large files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_cached_file(link: Path) -> None:
    """Compare a file with its name in the client's cache, which is the hash that the Hub announced for it.

    Raises:
        DamagedFileError: If they differ; both the file and the link to it are then gone, so that the client, which
            trusts its cache, fetches the file again.
    """
    stored = link.resolve()
    hashes = {40: git_hash, 64: sha256}
    if len(stored.name) not in hashes or hashes[len(stored.name)](stored) == stored.name:
        return
    with contextlib.suppress(OSError):  # a cache that can only be read
        link.unlink()
        stored.unlink()
    raise DamagedFileError(f"{link.name} does not have the hash {stored.name[:12]} that the Hub announced for it")
