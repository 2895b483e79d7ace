"""The application: endpoints, guards, the page, and the worker that lives as long as it does."""

import base64
import contextlib
import hashlib
import importlib.resources
import re
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tinygpt.serve._calls import Served
from tinygpt.serve._config import ServerConfig
from tinygpt.serve._errors import RequestError
from tinygpt.serve._guards import HostGuard, KeyGuard
from tinygpt.serve._routes import Routes
from tinygpt.serve._worker import Worker


def build_app(served: Served, worker: Worker, config: ServerConfig) -> Starlette:
    """Return the application; the worker's thread starts and ends with it."""
    routes = Routes(served, worker, config)
    page = _page()

    async def show_page(request: Request) -> Response:
        return page

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    guards = []
    if config.is_local:
        guards.append(Middleware(HostGuard, host=config.host))
    if config.allow_origins:
        guards.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.allow_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    # At each route of the API and not by path, which changes where the application is mounted. Page and health stay
    # open: the page asks for the key.
    keyed = [] if config.api_key is None else [Middleware(KeyGuard, key=config.api_key)]
    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", routes.health),
            Route("/v1/models", routes.models, middleware=keyed),
            Route("/v1/models/{name:path}", routes.model, middleware=keyed),
            Route("/v1/completions", routes.completions, methods=["POST"], middleware=keyed),
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"], middleware=keyed),
        ],
        middleware=guards,
        exception_handlers={RequestError: _refusal, HTTPException: _no_such_route, Exception: _failure},
        lifespan=lifespan,
    )


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "no endpoint" if error.status_code == 404 else f"no {request.method} of"
    answer = RequestError(error.status_code, f"there is {what} {request.url.path[:100]}.", code="not_found")
    return JSONResponse(answer.body(), error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    """Say nothing of what went wrong inside: the server's log has it."""
    return JSONResponse(RequestError(500, "the server failed.", kind="server_error").body(), 500)


def _page() -> Response:
    """Return the page, allowed to run its own script and to speak to this server, and nothing else."""
    text = importlib.resources.files("tinygpt.serve").joinpath("page.html").read_text("utf-8")
    sources = []
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    policy = ["default-src 'none'", *sources, "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    policy += ["form-action 'none'", "frame-ancestors 'none'"]
    headers = {
        "content-security-policy": "; ".join(policy),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)
