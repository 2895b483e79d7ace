"""How a text is written: the options of one request."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tinygpt.config import Config


def _to_tuple(value: Any) -> Any:
    """Take lists, sets and the like, whose items are then checked, but no text, which would fall into letters."""
    return tuple(value) if isinstance(value, Collection) and not isinstance(value, str | bytes) else value


TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_to_tuple)]
Strings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_to_tuple)]


class GenerationConfig(Config):
    """How to choose the tokens of a text and when to stop.

    The order is: repetition penalty, temperature, `top_k`, `top_p`, `min_p`; then one token is drawn from what is left.

    Args:
        max_new_tokens: Most tokens to write.
        temperature: Divides the logits; 0, and anything below 1e-6, takes the most likely token.
        top_k: Keep the `k` most likely tokens; `None` for all.
        top_p: Keep the fewest most likely tokens whose probabilities reach `p`; `None` for all.
        min_p: Keep tokens at least this share as likely as the most likely one; `None` for all.
        repetition_penalty: Divides positive logits of tokens that prompt or text already hold, and multiplies negative
            ones; 1 for nothing, 1.1 is a usual value.
        seed: Makes the text repeat; `None` draws one from torch's global randomness. Sample `i` of a request takes
            `seed + i`.
        stop_tokens: Token ids that end the text and are left out. `None` takes the tokenizer's `<|bos|>`, which begins
            another document, where there is a tokenizer.
        stop_strings: Texts that end the text and are left out; they may span tokens. They need a tokenizer.
        logprobs: Report the log-probability of each token, and this many of the most likely alternatives (0 for none);
            `None` reports nothing. They are the model's own, before penalty, temperature and filters.
        overflow: What to do when prompt and new tokens exceed the context. `error` refuses the request. `slide` drops
            the oldest tokens but the first: whenever the context is full, the first token and the newest ones, half
            of the context or what lets the rest be written without sliding again, are read anew. The model then
            knows nothing of what was dropped, and each slide costs the reading of a prompt.

    Raises:
        ConfigError: If a field is out of range.

    References:
        `top_p`: Holtzman et al., [The Curious Case of Neural Text
        Degeneration](https://arxiv.org/abs/1904.09751), 2019. `min_p`: Nguyen et al., [Turning Up the
        Heat](https://arxiv.org/abs/2407.01082), 2024. `repetition_penalty`:
        Keskar et al., [CTRL](https://arxiv.org/abs/1909.05858), 2019. Keeping the first token when sliding: Xiao et
        al., [Efficient Streaming Language Models with Attention Sinks](https://arxiv.org/abs/2309.17453), 2023, which
        keeps shifting the cache instead of reading anew.

    Example:
        ```python
        from tinygpt.generate import GenerationConfig

        careful = GenerationConfig(max_new_tokens=64, temperature=0.7, top_p=0.9, stop_strings=["END"])
        greedy = careful.replace(temperature=0.0)
        ```
    """

    max_new_tokens: Annotated[int, Field(ge=0)] = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop_tokens: TokenIds | None = None
    stop_strings: Strings = ()
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    overflow: Literal["error", "slide"] = "error"

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, so that nothing is drawn."""
        return self.temperature < 1e-6
