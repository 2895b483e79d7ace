"""Writing text in one call."""

from collections.abc import Iterator, Sequence
from typing import Any

from tinygpt.generate._config import GenerationConfig
from tinygpt.generate._engine import Engine
from tinygpt.generate._requests import Completion, TokenEvent, TokenLogprobs, check_prompt
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer


def stream_tokens(
    model: GPT, token_ids: Sequence[int], *, max_new_tokens: int, use_cache: bool = True, **options: Any
) -> Iterator[int]:
    """Yield new tokens as they are drawn, until a stop token (not yielded) or the limit.

    Args:
        model: The model; its training mode is put back after every token.
        token_ids: The prompt, at least one token; models of this library expect `<|bos|>` first.
        max_new_tokens: Most tokens to write.
        use_cache: Keep keys and values of what was read; `False` reads everything again for each token.
        **options: Other fields of `GenerationConfig`.

    Yields:
        Token ids.

    Raises:
        ConfigError: If the prompt is empty, prompt and new tokens exceed the model's context, or an option is out of
            range.
        NonFiniteError: If the model gives logits that are not finite.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens, **options)
    engine = _engine_for(model, None, check_prompt(token_ids, model.vocab_size), config, use_cache=use_cache)
    return (event.token_id for event in engine.run() if event.token_id is not None)


def generate(
    model: GPT, token_ids: Sequence[int], *, max_new_tokens: int, use_cache: bool = True, **options: Any
) -> list[int]:
    """Return the new tokens as a list; arguments and errors as in `stream_tokens`.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.generate import generate

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        new_tokens = generate(model, [256, 72, 105], max_new_tokens=8, seed=0)
        ```
    """
    return list(stream_tokens(model, token_ids, max_new_tokens=max_new_tokens, use_cache=use_cache, **options))


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, **options: Any) -> Iterator[str]:
    """Yield pieces of text that continue a prompt, until the model begins a new document or the limit.

    A piece is never half a character: bytes wait until their character is whole, and text that may begin a stop string
    waits until that is decided.

    Args:
        model: The model.
        tokenizer: The one it was trained with.
        prompt: Text to continue; may be empty.
        max_new_tokens: Most tokens to write.
        **options: Other fields of `GenerationConfig`.

    Yields:
        Text.

    Raises:
        ConfigError: As in `stream_tokens`, or if the tokenizer has more ids than the model.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens, **options)
    token_ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
    engine = _engine_for(model, tokenizer, token_ids, config)
    return (event.text for event in engine.run() if event.text)


def _engine_for(
    model: GPT, tokenizer: Tokenizer | None, token_ids: list[int], config: GenerationConfig, *, use_cache: bool = True
) -> Engine:
    """Return an engine that holds this one request, with no more memory than it needs."""
    needed = len(token_ids) + config.max_new_tokens
    length = needed if model.max_seq_len is None else min(needed, model.max_seq_len)
    engine = Engine(model, tokenizer=tokenizer, num_slots=1, max_seq_len=length, use_cache=use_cache)
    engine.add(token_ids, config)
    return engine


def generate_batch(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    num_samples: int = 1,
) -> list[list[Completion]]:
    """Write texts for many prompts, as many at a time as the engine has slots.

    Args:
        engine: The engine; requests it already holds go on, and their events are lost.
        prompts: Token ids, or text where the engine has a tokenizer.
        config: The options of all of them.
        num_samples: Texts for each prompt.

    Returns:
        A list a prompt, in their order, of `num_samples` texts.

    Raises:
        ConfigError: As in `Engine.add`.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.generate import Engine, GenerationConfig, generate_batch
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        engine = Engine(model, tokenizer=ByteTokenizer(), num_slots=4)
        texts = generate_batch(engine, ["Yes", "No"], GenerationConfig(max_new_tokens=8, seed=0), num_samples=2)
        ```
    """
    ids = [engine.add(prompt, config, num_samples=num_samples) for prompt in prompts]
    events: dict[tuple[int, int], list[TokenEvent]] = {
        (request_id, sample): [] for request_id in ids for sample in range(num_samples)
    }
    while any(not found or found[-1].finish_reason is None for found in events.values()):
        for event in engine.step():
            if (event.request_id, event.sample) in events:
                events[event.request_id, event.sample].append(event)
    return [[_completion(events[request_id, sample]) for sample in range(num_samples)] for request_id in ids]


def _completion(events: list[TokenEvent]) -> Completion:
    logprobs: list[TokenLogprobs] = [event.logprobs for event in events if event.logprobs is not None]
    reason = events[-1].finish_reason
    assert reason is not None
    return Completion(
        token_ids=[event.token_id for event in events if event.token_id is not None],
        text="".join(event.text for event in events),
        finish_reason=reason,
        logprobs=logprobs or None,
    )
