"""What clients may send: the fields of OpenAI's completions and chat completions that this server knows."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinygpt.serve._errors import RequestError

# Fields that change nothing here, and what they may hold: what OpenAI does when they are left out.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_BOOKKEEPING = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user")  # nothing is kept here

_Text = Annotated[str, Field(min_length=1)]
_Positive = Annotated[int, Field(ge=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Options(_Body):
    """What both kinds of request share. `top_k`, `min_p` and `repetition_penalty` are not OpenAI's."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: _Positive | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    max_tokens: _Positive | None = None
    n: _Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class CompletionBody(Options):
    """A request to continue text."""

    prompt: str | _TokenIds | Annotated[list[str] | list[_TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        """The message as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Options):
    """A request to answer in a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


AnyBody = TypeVar("AnyBody", bound=Options)


def parse(kind: type[AnyBody], body: bytes) -> AnyBody:
    """Return a request's body as its fields.

    Raises:
        RequestError: If it is no JSON object, or a field is unknown, wrong or not supported.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body of the request is not valid JSON.") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the body of the request must be a JSON object.")
    kept = {}
    for name, value in fields.items():
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise RequestError(400, f"{name} is not supported; leave it out.", param=name, code="unsupported_parameter")
        if name not in _NEUTRAL and name not in _BOOKKEEPING:
            kept[name] = value
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _readable(error) from None


def _readable(error: ValidationError) -> RequestError:
    """Return the first fault; what was given is not repeated, as it may be long."""
    faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    # Where several types are allowed pydantic names those it tried; a client knows its own fields and places.
    place = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
    place = place.removesuffix(".str")
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])[:100]  # a client may send any name
        return RequestError(400, f"there is no field {name}.", param=name, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(400, f"the field {place} is missing.", param=place, code="missing_required_parameter")
    allowed = dict.fromkeys(fault["msg"] for fault in faults if fault["loc"][:1] == first["loc"][:1])
    message = ", or ".join(text[0].lower() + text[1:] for text in allowed)
    # A fault has no place where the name itself is no text.
    return RequestError(
        400, f"{place}: {message}." if place else f"the name of a field: {message}.", param=place or None
    )
