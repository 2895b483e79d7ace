"""Documents in a dataset repository of the Hugging Face Hub."""

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import closing
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tinygpt.data._faults import WHOLE_FILE, Faults, OnError
from tinygpt.data._files import FileSource, ListedFile
from tinygpt.data._formats import MAX_DOCUMENT_BYTES, Format, JsonFormat, TextFormat
from tinygpt.data._hub_cache import DamagedDownloadError, FileCache, RemoteFile
from tinygpt.data._parquet import ParquetFormat
from tinygpt.errors import ConfigError, DataError
from tinygpt.hub._retry import with_retries

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB_SCHEME = "hf://"

# A revision with a slash is written `refs%2Fpr%2F1`, as the client does, or plainly if it is one of the Hub's own.
_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?/(?P<pattern>.+)"
)


class HubFiles(FileSource):
    """Files of a dataset repository on the Hugging Face Hub, fetched a little ahead of use into a limited cache.

    Files are read in sorted order. While one is read the next are fetched in the background; each is checked against
    size and hash in the repository's listing before it is used; an interrupted download goes on where it stopped.
    When the cache is full, files already read make room. The revision is looked up once, when the source is made,
    and everything is read at that commit; the fingerprint covers names, sizes and hashes of the files, so other
    commits that leave them alone do not change it.

    Args:
        address: `hf://datasets/USER/NAME/PATTERN` or `hf://datasets/USER/NAME@REVISION/PATTERN`. In the pattern `*`
            stands for any characters but `/`, `**/` for any folders, `?` for one character.
        text_key: Key of a JSON line, or column of a parquet file, that holds the text.
        separator: What stands between two documents of a text file; None makes each file one document.
        max_document_bytes: A longer document is a fault.
        on_error: `"raise"` stops at a file or document that cannot be used; `"skip"` passes over it, counts it in
            `skipped`, and warns once for each kind of fault. A Hub that cannot be reached always raises.
        cache_dir: Folder for fetched files. None is a folder `tinygpt` in the Hub client's home (`HF_HOME`).
        cache_bytes: How much the files of this dataset may take there; at least the largest one.
        files_ahead: How many files to fetch before they are needed.
        retries: How often a failed connection, a server error (5xx) or a damaged download is tried again.
        token: Access token. None is the one the client is logged in with, if any.
        endpoint: Address of the Hub. None is the client's own (`HF_ENDPOINT`).

    Raises:
        ConfigError: If a number is out of range, `on_error` is not known, or a file is larger than `cache_bytes`.
        DataError: If the address is not one, or no file matches, or they are of several kinds or none that is known;
            and, unless skipped, if a file is empty.
        HubError: If there is no such repository or revision, access is refused, or the Hub keeps failing; from
            reading, too.

    Example:
        ```python no-run: needs a network
        from tinygpt.data import HubFiles

        source = HubFiles("hf://datasets/HuggingFaceFW/fineweb-edu@main/sample/10BT/*.parquet", cache_bytes=20 << 30)
        ```
    """

    def __init__(
        self,
        address: str,
        *,
        text_key: str = "text",
        separator: str | None = None,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        on_error: OnError = "raise",
        cache_dir: str | Path | None = None,
        cache_bytes: int = 20 << 30,
        files_ahead: int = 1,
        retries: int = 4,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise DataError(f"{address!r} is not an address; it reads hf://datasets/USER/NAME[@REVISION]/PATTERN.")
        if files_ahead < 0:
            raise ConfigError(f"files_ahead={files_ahead} is negative; choose 0 to fetch each file when it is needed.")
        faults = Faults(on_error)
        from huggingface_hub import HfApi, constants, hf_hub_download

        repo, revision = match["repo"], unquote(match["revision"]) if match["revision"] else None
        api = HfApi(endpoint=endpoint, token=token)
        where = f"{repo!r} at revision {revision!r}" if revision else repr(repo)
        commit, files = with_retries(
            partial(_list, api, repo, revision), f"Listing the dataset {where} failed", retries
        )
        form, matched = _choose(files, match["pattern"], where, text_key, separator, max_document_bytes)
        largest = max(matched, key=lambda file: file.size)
        if largest.size > cache_bytes:
            raise ConfigError(
                f"cache_bytes={cache_bytes:,} has no room for {largest.path} of {largest.size:,} bytes; choose more, "
                "best room for three such files."
            )
        usable = []
        for file in matched:
            if file.size:
                usable.append(file)
            else:
                faults.note(file.path, WHOLE_FILE, "empty", f"{file.path} in {where} is empty; leave it out.")
        super().__init__([ListedFile(*file) for file in usable], form, faults)
        root = Path(constants.HF_HOME) / "tinygpt" if cache_dir is None else Path(cache_dir)
        folder = root.expanduser() / repo.replace("/", "--") / commit
        self._repo = repo
        self._files_ahead = files_ahead
        download = partial(
            hf_hub_download,
            repo,
            repo_type="dataset",
            revision=commit,
            local_dir=folder,
            token=token,
            endpoint=endpoint,
        )
        self._make_cache = partial(FileCache, folder, usable, cache_bytes, download, retries)
        self._cache: FileCache | None = None

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of names, sizes and hashes of the files, as the repository lists them."""
        listing = [self._repo, self._settings, self._files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def __getstate__(self) -> dict[str, object]:
        """Leave the cache's locks behind, so that a worker process can be given the source."""
        return {**self.__dict__, "_cache": None}

    def _open_from(self, first: int) -> Generator[BufferedReader | None, None, None]:
        self._cache = self._cache or self._make_cache()
        with closing(self._cache.read_from(first, self._files_ahead)) as opened:
            for index, file in enumerate(opened, start=first):
                if isinstance(file, DamagedDownloadError):
                    self._faults.note(self._files[index].name, WHOLE_FILE, "damaged on arrival", str(file))
                    yield None
                else:
                    yield file


def _list(api: "HfApi", repo: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """Return the commit of a revision and every file in it."""
    from huggingface_hub.hf_api import RepoFile

    commit = api.dataset_info(repo, revision=revision).sha
    assert commit is not None, "the Hub names the commit of every repository"
    tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
    files = [
        RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile)
    ]
    return commit, sorted(files)


def _choose(
    files: list[RemoteFile], pattern: str, where: str, text_key: str, separator: str | None, limit: int
) -> tuple[Format, list[RemoteFile]]:
    """Return the files that match a pattern, and the format they all have.

    Raises:
        DataError: If there are none, or they are not of one known format.
    """
    wanted = _glob(pattern)
    matched = [file for file in files if wanted.fullmatch(file.path)]
    if not matched:
        some = ", ".join(file.path for file in files[:10])
        raise DataError(f"no file of the dataset {where} matches {pattern!r}; it has {len(files)} files: {some}.")
    formats: list[Format] = [
        TextFormat(separator, limit),
        JsonFormat(text_key, limit),
        ParquetFormat(text_key, limit),
    ]
    fitting = [form for form in formats if any(file.path.lower().endswith(form.suffixes) for file in matched)]
    if len(fitting) != 1 or not all(file.path.lower().endswith(fitting[0].suffixes) for file in matched):
        some = ", ".join(file.path for file in matched[:10])
        raise DataError(
            f"{pattern!r} must match files of one kind, .txt, .jsonl or .parquet, in the dataset {where}; "
            f"it matches {some}; choose a narrower pattern."
        )
    return fitting[0], matched


def _glob(pattern: str) -> re.Pattern[str]:
    """Return a regular expression for a pattern of paths."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(wild.get(part) or re.escape(part) for part in parts))
