"""From a request's fields to what the engine is asked for."""

from dataclasses import dataclass

from tinygpt.errors import ConfigError, DataError
from tinygpt.generate import GenerationConfig
from tinygpt.serve._answers import ChatShape, CompletionShape, Shape
from tinygpt.serve._errors import RequestError
from tinygpt.serve._requests import ChatBody, ChatMessage, CompletionBody, Options
from tinygpt.tokenizer import ChatTemplate, Message, Tokenizer

_COMPLETION_TOKENS = 16  # OpenAI's default of this endpoint; a chat's answer may be as long as fits


@dataclass(frozen=True)
class Served:
    """The model that is served, as requests see it.

    Attributes:
        name: What clients call it.
        tokenizer: Its tokenizer.
        template: For conversations; `None` if it only continues text.
        max_tokens: Most tokens of a text, prompt included.
        num_slots: Most texts of a request.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_tokens: int
    num_slots: int


@dataclass(frozen=True)
class Call:
    """What a request asks for.

    Attributes:
        prompts: Token ids of each prompt.
        config: Options of all texts.
        num_samples: Texts a prompt.
        shape: How the answer is written.
        stream: Whether it is sent as it comes.
        include_usage: Whether a stream ends with the numbers of tokens.
    """

    prompts: list[list[int]]
    config: GenerationConfig
    num_samples: int
    shape: Shape
    stream: bool
    include_usage: bool


def completion_call(body: CompletionBody, served: Served) -> Call:
    """Return what a request to continue text asks for.

    Raises:
        RequestError: If the model is another one, or prompts or options do not suit it.
    """
    texts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if texts and isinstance(texts[0], int):
        texts = [texts]
    prompts: list[list[int]] = [_prompt(text, served) for text in texts]  # type: ignore[arg-type]
    shape = CompletionShape(served.name, served.tokenizer)
    wanted = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _call(body, served, prompts, wanted, "prompt", body.logprobs, None, shape)


def chat_call(body: ChatBody, served: Served) -> Call:
    """Return what a request to answer in a conversation asks for.

    Raises:
        RequestError: As in `completion_call`, or if the model only continues text.
    """
    if served.template is None:
        raise RequestError(
            400,
            "this model continues text and was not trained on conversations; use /v1/completions.",
            code="not_a_chat_model",
        )
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError(400, "max_tokens and max_completion_tokens mean the same; give one.", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
    try:
        prompt = served.template.render([_message(message) for message in body.messages])
    except DataError as error:
        raise RequestError(400, str(error), param="messages") from None
    wanted = body.max_tokens or body.max_completion_tokens or max(1, served.max_tokens - len(prompt))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    shape = ChatShape(served.name, served.tokenizer)
    return _call(body, served, [prompt], wanted, "messages", logprobs, served.template.stop_tokens, shape)


def _call(
    body: Options,
    served: Served,
    prompts: list[list[int]],
    max_new_tokens: int,
    param: str,
    logprobs: int | None,
    stop_tokens: tuple[int, ...] | None,
    shape: Shape,
) -> Call:
    if body.model is not None and body.model != served.name:
        raise unknown_model(body.model, served, "model")
    num_samples = body.n or 1
    if len(prompts) * num_samples > served.num_slots:
        raise RequestError(
            400,
            f"{len(prompts)} prompts with n={num_samples} make {len(prompts) * num_samples} texts; a request may ask "
            f"for {served.num_slots}.",
            param="n",
        )
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > served.max_tokens:
        raise RequestError(
            400,
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed the {served.max_tokens} tokens that a text "
            "may have; shorten the prompt or ask for fewer.",
            param=param,
            code="context_length_exceeded",
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options needs stream=true.", param="stream_options")
    given = body.model_dump(include={"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"})
    try:
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            logprobs=logprobs,
            stop_tokens=stop_tokens,
            stop_strings=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            **{name: value for name, value in given.items() if value is not None},
        )
    except ConfigError as error:
        raise RequestError(400, str(error)) from None
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Call(prompts, config, num_samples, shape, bool(body.stream), usage)


def unknown_model(name: str, served: Served, param: str | None = None) -> RequestError:
    """Return the error for another model's name."""
    message = f"there is no model {name!r:.100}; this server has {served.name}."
    return RequestError(404, message, param=param, code="model_not_found")


def _prompt(prompt: str | list[int], served: Served) -> list[int]:
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        try:
            return [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
        except DataError as error:
            raise RequestError(400, str(error), param="prompt") from None
    if max(prompt) >= tokenizer.vocab_size:
        raise RequestError(
            400, f"token id {max(prompt)} is outside the vocabulary of {tokenizer.vocab_size}.", param="prompt"
        )
    return prompt


def _message(message: ChatMessage) -> Message:
    return Message("system" if message.role == "developer" else message.role, message.text)
