"""What stands before the endpoints: who may ask, and under which name the server is asked."""

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tinygpt.serve._errors import RequestError


class HostGuard:
    """Refuses requests for other names than those of this machine.

    A page of any web site can make its own name point to 127.0.0.1 and would then be let in by the browser as being
    of the same origin. What it cannot change is the name in the `Host` header.

    Args:
        app: What stands behind.
        host: The address that the server listens on.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._allowed = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").lower()
            name, colon, port = host.rpartition(":")
            if (name if colon and port.isdecimal() else host) not in self._allowed:
                error = RequestError(
                    400, f"this server answers to {', '.join(sorted(self._allowed))}, not to {host[:100]!r}."
                )
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class KeyGuard:
    """Refuses requests without the key.

    Args:
        app: What stands behind.
        key: The key.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key)
            if scheme.lower() != "bearer" or not right:
                error = RequestError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY.",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
                answer = JSONResponse(error.body(), error.status, {"www-authenticate": "Bearer"})
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)
