"""The thread that runs the model, and the jobs that requests leave with it."""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.generate import Engine, GenerationConfig, TokenEvent
from tinygpt.serve._errors import RequestError

_logger = logging.getLogger("tinygpt.serve")


class Job:
    """The texts of one request: given by the event loop, written by the engine's thread, read by the event loop.

    Args:
        prompts: Token ids of each prompt.
        config: Options of all texts.
        num_samples: Texts a prompt.
    """

    def __init__(self, prompts: Sequence[list[int]], config: GenerationConfig, num_samples: int) -> None:
        self.prompts = prompts
        self.config = config
        self.num_samples = num_samples
        self.num_texts = len(prompts) * num_samples
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[list[tuple[int, TokenEvent]] | RequestError] = asyncio.Queue()
        # What follows belongs to the engine's thread.
        self.requests: dict[int, int] = {}  # the engine's id: which prompt
        self.num_open = self.num_texts

    def put(self, item: list[tuple[int, TokenEvent]] | RequestError) -> None:
        """Hand over events or an end; from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield the number of a text and what happened to it, until all texts have ended.

        Raises:
            RequestError: If the model failed or the server stops.
        """
        left = self.num_texts
        while left:
            item = await self._arrived.get()
            if isinstance(item, RequestError):
                raise item
            for choice, event in item:
                left -= event.finish_reason is not None
                yield choice, event


class Worker:
    """Runs an engine in a thread of its own, on what comes in by `submit`.

    Texts are begun in the order in which their requests came, as soon as slots are free, and written side by side.

    Args:
        engine: The engine; from now on it belongs to the worker.
        max_queue: Texts that may wait for a slot.
    """

    def __init__(self, engine: Engine, *, max_queue: int) -> None:
        self._engine = engine
        self._most = engine.num_slots + max_queue
        self._condition = threading.Condition()
        self._inbox: deque[tuple[Callable[[Job], None], Job]] = deque()
        self._num_texts = 0  # accepted and not ended
        self._refusing = self._stopping = False
        self._jobs: dict[int, Job] = {}  # by the engine's ids; belongs to the thread
        self._thread = threading.Thread(target=self._run, name="tinygpt-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def takes_jobs(self) -> bool:
        """Whether the thread runs and the server does not stop."""
        return self._thread.is_alive() and not self._refusing

    @property
    def num_texts(self) -> int:
        """Texts that are being written or wait."""
        return self._num_texts

    def submit(self, job: Job) -> None:
        """Leave a job.

        Raises:
            RequestError: If too many texts wait, or the server stops.
        """
        with self._condition:
            if self._refusing:
                raise _stopping()
            if self._num_texts + job.num_texts > self._most:
                raise RequestError(
                    429,
                    f"the server is busy: {self._num_texts} texts are being written or wait, and {self._most} is the "
                    "most; try again later.",
                    kind="rate_limit_error",
                    code="server_busy",
                )
            self._num_texts += job.num_texts
            self._inbox.append((self._begin, job))
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Drop what is left of a job; nothing if it has ended."""
        with self._condition:
            self._inbox.append((self._drop, job))
            self._condition.notify()

    def stop(self) -> None:
        """End all texts with an error, take no more, and wait for the thread."""
        with self._condition:
            self._refusing = self._stopping = True
            self._condition.notify()
        if self._thread.ident is not None:  # a server that could not start never started it
            self._thread.join()

    def refuse(self) -> None:
        """Take no more jobs; those that are here go on."""
        with self._condition:
            self._refusing = True

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._inbox or self._engine.has_work or self._stopping):
                    self._condition.wait()
                inbox, self._inbox = self._inbox, deque()
                stop = self._stopping
            for act, job in inbox:
                act(job)
            if stop:
                self._end_all(_stopping())
                return
            if self._engine.has_work:
                self._step()

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # whatever a model may raise; the next request may be one it can write
            _logger.error("the model failed: %s", error, exc_info=not isinstance(error, NonFiniteError))
            self._end_all(RequestError(500, "the model failed on this request.", kind="server_error"))
            return
        arrived: dict[Job, list[tuple[int, TokenEvent]]] = {}
        for event in events:
            job = self._jobs[event.request_id]
            choice = job.requests[event.request_id] * job.num_samples + event.sample
            arrived.setdefault(job, []).append((choice, event))
        for job, found in arrived.items():
            # First this: whoever has an answer may ask the next question at once and find the place free.
            self._ended(job, sum(event.finish_reason is not None for _, event in found))
            job.put(found)

    def _begin(self, job: Job) -> None:
        try:
            for number, prompt in enumerate(job.prompts):
                request_id = self._engine.add(prompt, job.config, num_samples=job.num_samples)
                job.requests[request_id] = number
                self._jobs[request_id] = job
        except ConfigError as error:
            self._drop(job)
            job.put(RequestError(400, str(error)))

    def _drop(self, job: Job) -> None:
        for request_id in job.requests:
            self._engine.cancel(request_id)
        self._ended(job, job.num_open)

    def _ended(self, job: Job, num_texts: int) -> None:
        job.num_open -= num_texts
        with self._condition:
            self._num_texts -= num_texts
        if not job.num_open:
            for request_id in job.requests:
                self._jobs.pop(request_id, None)

    def _end_all(self, error: RequestError) -> None:
        for job in set(self._jobs.values()):
            self._drop(job)
            job.put(error)


def _stopping() -> RequestError:
    """Return the error for requests that a stopping server cannot finish."""
    return RequestError(503, "the server is stopping.", kind="server_error", code="server_stopping")
