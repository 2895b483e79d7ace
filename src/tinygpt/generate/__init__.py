"""Writing text with a model: one token at a time, with a cache of what was read.

`generate`, `stream_tokens` and `stream_text` write one text. An `Engine` writes many at once, which come and go.
"""

from tinygpt.generate._chat import is_chat_tuned as is_chat_tuned
from tinygpt.generate._config import GenerationConfig as GenerationConfig
from tinygpt.generate._engine import Engine as Engine
from tinygpt.generate._functions import generate as generate
from tinygpt.generate._functions import generate_batch as generate_batch
from tinygpt.generate._functions import stream_text as stream_text
from tinygpt.generate._functions import stream_tokens as stream_tokens
from tinygpt.generate._requests import Completion as Completion
from tinygpt.generate._requests import TokenEvent as TokenEvent
from tinygpt.generate._requests import TokenLogprobs as TokenLogprobs
from tinygpt.generate._sampling import sample_token as sample_token
from tinygpt.generate._weights import reading_copy as reading_copy

__all__ = [
    "Completion",
    "Engine",
    "GenerationConfig",
    "TokenEvent",
    "TokenLogprobs",
    "generate",
    "generate_batch",
    "is_chat_tuned",
    "reading_copy",
    "sample_token",
    "stream_text",
    "stream_tokens",
]
