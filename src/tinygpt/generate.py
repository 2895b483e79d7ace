"""Writing text with a model: one token at a time, with a cache of what was read."""

import codecs
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer

_GREEDY_TEMPERATURE = 1e-6


def sample_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token of each row.

    Args:
        logits: `(batch, vocab)`.
        temperature: Divides the logits; 0, and anything below 1e-6, takes the most likely token.
        top_k: Keep the `k` most likely tokens; `None` for all.
        top_p: Keep the fewest most likely tokens whose probabilities reach `p`; `None` for all. Applied after `top_k`.
        generator: Source of randomness on the device of `logits`; `None` for torch's global one.

    Returns:
        `(batch,)` int64.

    Raises:
        ConfigError: If an option is out of range.

    References:
        Nucleus sampling: Holtzman et al., [The Curious Case of Neural Text
        Degeneration](https://arxiv.org/abs/1904.09751), 2019.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature < _GREEDY_TEMPERATURE:
        return logits.argmax(dim=-1)
    # Shifted first, so that a small temperature makes the others vanish instead of everything overflow.
    scaled = (logits.float() - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        best = scaled.topk(top_k, dim=-1)
        scaled = torch.full_like(scaled, float("-inf")).scatter(1, best.indices, best.values)
    if top_p is not None and top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token goes when those before it already reach p, so the first one always stays.
        dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
        scaled = scaled.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} must be 0 or positive.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1, or None to keep all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} must lie in (0, 1], or be None to keep all tokens.")


def stream_tokens(
    model: GPT,
    token_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield new tokens as they are drawn, until a stop token (not yielded) or the limit.

    Args:
        model: The model; its training mode is put back at the end.
        token_ids: The prompt, at least one token; models of this library expect `<|bos|>` first.
        max_new_tokens: Most tokens to write.
        temperature: See `sample_token`.
        top_k: See `sample_token`.
        top_p: See `sample_token`.
        seed: Makes the text repeat; `None` draws from torch's global randomness.
        stop_tokens: Token ids that end the text.
        use_cache: Keep keys and values of what was read; `False` reads everything again for each token.

    Yields:
        Token ids.

    Raises:
        ConfigError: If the prompt is empty, prompt and new tokens exceed the model's context, or an option is out of
            range.
        NonFiniteError: If the model gives logits that are not finite.
    """
    if isinstance(token_ids, str):
        raise ConfigError("the prompt is text; give token ids, or use stream_text(model, tokenizer, prompt).")
    token_ids = [int(token) for token in token_ids]
    if not token_ids:
        raise ConfigError("the prompt is empty: give at least one token, usually the tokenizer's bos_token_id.")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must not be negative.")
    needed = len(token_ids) + max_new_tokens
    if model.max_seq_len is not None and needed > model.max_seq_len:
        raise ConfigError(
            f"{len(token_ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.max_seq_len}; ask for at most {max(0, model.max_seq_len - len(token_ids))} or shorten the prompt."
        )
    _check_sampling(temperature, top_k, top_p)
    device = next(model.parameters()).device
    return _stream(
        model,
        torch.tensor([token_ids], device=device),
        max_new_tokens,
        (temperature, top_k, top_p, None if seed is None else torch.Generator(device).manual_seed(seed)),
        frozenset(stop_tokens),
        use_cache,
    )


def _stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    options: tuple[float, int | None, float | None, torch.Generator | None],
    stop_tokens: frozenset[int],
    use_cache: bool,
) -> Iterator[int]:
    temperature, top_k, top_p, generator = options
    cache = model.new_cache(1, max_seq_len=tokens.shape[1] + max_new_tokens) if use_cache else None
    was_training = model.training
    model.eval()
    try:
        unread = tokens
        for _ in range(max_new_tokens):
            # Every new length would be compiled anew, until torch gives up and runs training eagerly as well.
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
                # Only the last position is needed: the head, a third of a small model, runs on one token.
                logits = model.head(model.hidden_states(unread, cache=cache)[:, -1])
                if not bool(logits.isfinite().all()):
                    raise NonFiniteError("the model's logits are not finite: its weights are damaged or diverged.")
                token = sample_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if int(token) in stop_tokens:
                return
            yield int(token)
            unread = token[:, None] if cache is not None else torch.cat((unread, token[:, None]), dim=1)
    finally:
        model.train(was_training)


def generate(
    model: GPT,
    token_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    use_cache: bool = True,
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
    return list(
        stream_tokens(
            model,
            token_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_tokens=stop_tokens,
            use_cache=use_cache,
        )
    )


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield pieces of text that continue a prompt, until the model begins a new document or the limit.

    A piece is never half a character: bytes wait until their character is whole.

    Args:
        model: The model.
        tokenizer: The one it was trained with.
        prompt: Text to continue; may be empty.
        max_new_tokens: Most tokens to write.
        temperature: See `sample_token`.
        top_k: See `sample_token`.
        top_p: See `sample_token`.
        seed: Makes the text repeat.

    Yields:
        Text.

    Raises:
        ConfigError: As in `stream_tokens`.
    """
    if model.config is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size="
            f"{model.config.vocab_size}: use the tokenizer the model was trained with."
        )
    tokens = stream_tokens(
        model,
        [tokenizer.bos_token_id, *tokenizer.encode(prompt)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=(tokenizer.bos_token_id,),
    )
    return _pieces(tokenizer, tokens)


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
