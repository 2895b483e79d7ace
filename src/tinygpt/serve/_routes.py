"""What the server does with each request."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinygpt.generate import TokenEvent
from tinygpt.serve._answers import usage_of
from tinygpt.serve._calls import Call, Served, chat_call, completion_call, unknown_model
from tinygpt.serve._config import ServerConfig
from tinygpt.serve._errors import RequestError
from tinygpt.serve._requests import AnyBody, ChatBody, CompletionBody, parse
from tinygpt.serve._worker import Job, Worker

_BODY_SECONDS = 30.0  # a body of the allowed length takes no longer, unless its sender means to hold the connection
_SEND_SECONDS = 5.0  # after its time a stream may still say so


class Routes:
    """The endpoints.

    Args:
        served: The model.
        worker: Runs it.
        config: The limits.
    """

    def __init__(self, served: Served, worker: Worker, config: ServerConfig) -> None:
        self._served = served
        self._worker = worker
        self._config = config

    async def health(self, request: Request) -> Response:
        """Say whether texts can be asked for."""
        ok = self._worker.takes_jobs
        body = {"status": "ok" if ok else "stopping", "model": self._served.name, "texts": self._worker.num_texts}
        return JSONResponse(body, 200 if ok else 503)

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        name = request.path_params["name"]
        if name != self._served.name:
            raise unknown_model(name, self._served)
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        """Continue text."""
        return await self._answer(request, CompletionBody, completion_call)

    async def chat_completions(self, request: Request) -> Response:
        """Answer in a conversation."""
        return await self._answer(request, ChatBody, chat_call)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": 0,
            "owned_by": "tinygpt",
            "max_model_len": self._served.max_tokens,  # this and the next are not OpenAI's
            "chat": self._served.template is not None,
        }

    async def _answer(
        self, request: Request, kind: type[AnyBody], to_call: Callable[[AnyBody, Served], Call]
    ) -> Response:
        body = parse(kind, await self._body(request))
        call = await asyncio.to_thread(to_call, body, self._served)  # a long text holds up no other request
        job = Job(call.prompts, call.config, call.num_samples)
        self._worker.submit(job)
        if call.stream:
            return _EventStream(call, job, self._worker, self._config.timeout_seconds)
        try:
            return await self._whole(request, call, job)
        finally:
            self._worker.cancel(job)

    async def _whole(self, request: Request, call: Call, job: Job) -> Response:
        collecting = asyncio.ensure_future(_collected(job))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            done, _ = await asyncio.wait(
                {collecting, leaving}, timeout=self._config.timeout_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if collecting in done:
                texts = collecting.result()
                num_new = sum(event.token_id is not None for events in texts for event in events)
                return JSONResponse(call.shape.whole(texts, usage_of(call.prompts, num_new)))
            if leaving in done:
                return Response(status_code=499)  # nobody reads it
            raise _too_slow(self._config.timeout_seconds)
        finally:
            collecting.cancel()
            leaving.cancel()

    async def _body(self, request: Request) -> bytes:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # other types a page of any web site could send without being asked
            raise RequestError(415, "send the request as JSON, with the header Content-Type: application/json.")
        limit = self._config.max_body_bytes
        too_long = RequestError(413, f"the body of a request may have {limit} bytes.", code="request_too_large")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > 16 * limit:
            raise too_long
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        body += chunk
                    elif size > 16 * limit:  # up to there it is read and thrown away: many clients send all, then read
                        raise too_long
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s.") from None
        except ClientDisconnect:
            raise RequestError(499, "the client left.") from None
        if size > limit:
            raise too_long
        return bytes(body)


class _EventStream(StreamingResponse):
    """Sends a job's texts as they come; however that ends, the job ends with it."""

    def __init__(self, call: Call, job: Job, worker: Worker, timeout_seconds: float) -> None:
        self._job = job
        self._worker = worker
        self._timeout_seconds = timeout_seconds
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_lines(call, job, timeout_seconds), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_seconds + _SEND_SECONDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the client does not read, so it cannot be told
        finally:
            self._worker.cancel(self._job)


async def _lines(call: Call, job: Job, timeout_seconds: float) -> AsyncIterator[str]:
    """Yield the lines of a stream; an error that comes too late for a status is a line as well."""
    offsets = [0] * job.num_texts
    num_new = 0
    for choice in range(job.num_texts):
        if (chunk := call.shape.opening(choice)) is not None:
            yield _line(chunk)
    events = job.events()
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    choice, event = await anext(events)
            except StopAsyncIteration:
                break
            num_new += event.token_id is not None
            if event.text or event.logprobs is not None or event.finish_reason:
                yield _line(call.shape.chunk(choice, event, offsets[choice]))
            offsets[choice] += len(event.text)
    except TimeoutError:
        yield _line(_too_slow(timeout_seconds).body())
    except RequestError as error:
        yield _line(error.body())
    else:
        if call.include_usage:
            yield _line(call.shape.usage(usage_of(call.prompts, num_new)))
        yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _collected(job: Job) -> list[list[TokenEvent]]:
    texts: list[list[TokenEvent]] = [[] for _ in range(job.num_texts)]
    async for choice, event in job.events():
        texts[choice].append(event)
    return texts


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_slow(seconds: float) -> RequestError:
    return RequestError(
        504, f"the request took longer than {seconds:g} s; ask for fewer tokens.", kind="server_error", code="timeout"
    )
