"""Trying again after what may pass, and saying what happened in one sentence."""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tinygpt.errors import ConfigError, HubError

_Result = TypeVar("_Result")

_logger = logging.getLogger("tinygpt")

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0
_LONGEST_ASKED_SECONDS = 300.0  # the Hub counts requests in windows of five minutes
_LOG_IN = "run `hf auth login` or set HF_TOKEN, or pass token=...."
# Of its own: the state of Python's generator belongs to the training run and is saved with it.
_jitter = random.Random()


class DamagedFileError(Exception):
    """A file arrived with other bytes than the Hub announced."""


class PassingHubError(HubError):
    """A failure that another try may not see: no answer, a server error, too many requests."""


def check_retries(retries: int) -> None:
    """Raise `ConfigError` if the number is negative."""
    if retries < 0:
        raise ConfigError(f"retries={retries} is negative; choose 0 to try once.")


def with_retries(action: Callable[[], _Result], task: str, retries: int) -> _Result:
    """Run `action`, trying again after failures that may pass.

    The client repeats some requests by itself, but not a download that begins with a 5xx, nor a plain commit.
    """
    check_retries(retries)
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:  # the client raises errors of its own, of its HTTP library and of Xet
            if isinstance(error, HubError):
                raise
            passing = _may_pass(error)
            asked, reason = _asked_wait(error), _without_tokens(_reason(error))
            if attempt == retries or not passing or asked > _LONGEST_ASKED_SECONDS:
                tries = f" after {attempt + 1} tries" if attempt else ""
                kind = PassingHubError if passing else HubError
                # Errors of requests and answers can quote the token; any other is worth its traceback.
                cause = None if passing or http_status(error) else error
                raise kind(f"{task}{tries}: {reason}") from cause
        # A quarter more or less, so that many who lost the Hub at once do not all come back at once.
        wait = min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS) * _jitter.uniform(0.75, 1.25)
        _logger.info("%s: %s Trying again in %.0f s.", task, reason, max(wait, asked))
        time.sleep(max(wait, asked))
    raise AssertionError("unreachable: the last attempt returns or raises")


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, or `None` if the server gave no answer."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it: the client hides the HTTP status one or two levels down."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _asked_wait(error: BaseException) -> float:
    """Return the seconds a server asks to wait, in `Retry-After` or in the Hub's `ratelimit`; 0 if it does not."""
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", {})
        if str(headers.get("retry-after", "")).isdigit():
            return float(headers["retry-after"])
        if match := re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("ratelimit", "")):
            return float(match[1])
    return 0.0


def _lost_connection(error: BaseException) -> bool:
    """Return whether no answer came: refused, reset, timed out."""
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library differs between versions of the client (httpx, httpx2), so its base error is read off here.
    transport_error = HfHubHTTPError.__mro__[1]
    return http_status(error) is None and any(
        isinstance(link, (transport_error, ConnectionError, TimeoutError)) for link in _chain(error)
    )


def _arrived_damaged(error: BaseException) -> bool:
    # The client reports a body of the wrong length as a bare OSError; one of the system has a number.
    return any(isinstance(link, DamagedFileError) or _is_bare(link) for link in _chain(error))


def _is_bare(error: BaseException) -> bool:
    return type(error) is OSError and error.errno is None


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return False
    status = http_status(error)
    if status is None:
        return _lost_connection(error) or _arrived_damaged(error)
    return status in (408, 429) or status >= 500


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

    status = http_status(error)
    if caused_by(GatedRepoError):
        return f"access is gated; accept the terms on the repository's page, then {_LOG_IN}"
    if caused_by(RevisionNotFoundError):
        return "the repository has no such revision; check the branch, tag or commit."
    if caused_by(RepositoryNotFoundError):
        # The Hub answers 401 for a missing repository to those without access, so that private names do not leak.
        return f"no such repository (HTTP {status}); check the name, and if it is private {_LOG_IN}"
    if status in (401, 403):
        return f"access denied (HTTP {status}); the account needs permission: {_LOG_IN}"
    if status == 404:
        return "the Hub does not have it (HTTP 404); check the name and the revision."
    if status == 429:
        asked = _asked_wait(error)
        when = f"in {asked:.0f} seconds" if asked else "later"
        return f"the Hub has had too many requests (HTTP 429); try again {when}."
    if status is not None and status >= 500:
        return f"the Hub answers with a server error (HTTP {status}); try again later."
    if caused_by(OfflineModeIsEnabled):
        return "the client is offline (HF_HUB_OFFLINE is set); unset it to allow requests."
    if _lost_connection(error):
        return "the Hub cannot be reached; check the network and HF_ENDPOINT."
    if caused_by(DamagedFileError):
        return f"{error}; it was removed from the cache. Try again later, or ask the owner of the repository."
    if caused_by(EntryNotFoundError):
        return "download it once with local_files_only=False."
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_tokens(text: str) -> str:
    """Blank out what looks like an access token: some servers and proxies repeat what they were sent."""
    return re.sub(r"(?:hf|api_org)_[A-Za-z0-9]{4,}|(?i:bearer)\s+\S+", "<token>", text)
