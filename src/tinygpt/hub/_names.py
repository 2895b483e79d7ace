"""What things on the Hub are called, checked before a request is made."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from tinygpt.errors import HubError

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken")
"""What a saved model and its tokenizer consist of, as patterns on the names in the top folder."""

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# Narrower than git's rules: nothing that a shell, an address or another file system would read in its own way.
_REFERENCE = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that match one of the glob patterns at least; `*` spans folders, as in the client."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_repo_id(name: str) -> bool:
    """Return whether this is the name of a repository, `user/repo`."""
    return _REPO_ID.fullmatch(name) is not None


def check_repo_id(repo_id: str) -> None:
    """Raise `HubError` unless this is the name of a repository, `user/repo`."""
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        raise HubError(f"{repo_id!r} is not a Hub name; give 'user/repo', in letters, digits, '-', '_' and '.'.")


def check_token(token: str | None) -> None:
    """Raise `HubError` unless a token can be sent: with a line end in it no request leaves, and the client repeats it.

    The message does not show the token.
    """
    if token is not None and not (isinstance(token, str) and re.fullmatch("[!-~]+", token)):
        raise HubError(
            "the access token is no word of printable ASCII characters; pass the one from the Hub's settings page, "
            "such as 'hf_...', without spaces or line ends, or token=None for that of the login."
        )


def check_tags(tags: str | Sequence[str]) -> list[str]:
    """Return the names of tags or branches as a list; one may be given as a string.

    Raises:
        HubError: If one cannot be such a name.
    """
    names = list(tags) if isinstance(tags, Sequence) and not isinstance(tags, str) else [tags]
    for name in names:
        bad = not isinstance(name, str) or not _REFERENCE.fullmatch(name) or ".." in name or name.endswith(".lock")
        if bad or name.endswith("."):
            raise HubError(f"{name!r} is no name for a tag or branch; use letters, digits, '-', '_', '.', '+' and '/'.")
    return list(dict.fromkeys(names))
