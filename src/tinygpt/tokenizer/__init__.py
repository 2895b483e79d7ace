"""Text to token ids and back: a byte tokenizer that needs nothing and a trainable byte-pair encoding.

Anything with the methods of `Tokenizer` works wherever a tokenizer is asked for; no base class is needed.
"""

from tinygpt.tokenizer._base import BOS_TOKEN as BOS_TOKEN
from tinygpt.tokenizer._base import CHAT_TOKENS as CHAT_TOKENS
from tinygpt.tokenizer._base import TextSource as TextSource
from tinygpt.tokenizer._base import Tokenizer as Tokenizer
from tinygpt.tokenizer._bpe import SPLIT_PATTERN as SPLIT_PATTERN
from tinygpt.tokenizer._bpe import BPETokenizer as BPETokenizer
from tinygpt.tokenizer._bytes import ByteTokenizer as ByteTokenizer
from tinygpt.tokenizer._chat import ChatTemplate as ChatTemplate
from tinygpt.tokenizer._chat import Message as Message
from tinygpt.tokenizer._huggingface import load_tokenizer_json as load_tokenizer_json
from tinygpt.tokenizer._huggingface_write import save_tokenizer_json as save_tokenizer_json
from tinygpt.tokenizer._load import load_tokenizer as load_tokenizer
from tinygpt.tokenizer._pool import EncodedTexts as EncodedTexts
from tinygpt.tokenizer._pool import EncoderPool as EncoderPool
from tinygpt.tokenizer._pool import encode_array as encode_array
from tinygpt.tokenizer._report import TextMeasure as TextMeasure
from tinygpt.tokenizer._report import TokenizerReport as TokenizerReport
from tinygpt.tokenizer._report import tokenizer_report as tokenizer_report
from tinygpt.tokenizer._tiktoken import TIKTOKEN_PATTERNS as TIKTOKEN_PATTERNS
from tinygpt.tokenizer._tiktoken import load_tiktoken as load_tiktoken
from tinygpt.tokenizer._train import train_bpe as train_bpe

__all__ = [
    "BOS_TOKEN",
    "CHAT_TOKENS",
    "SPLIT_PATTERN",
    "TIKTOKEN_PATTERNS",
    "BPETokenizer",
    "ByteTokenizer",
    "ChatTemplate",
    "EncodedTexts",
    "EncoderPool",
    "Message",
    "TextMeasure",
    "TextSource",
    "Tokenizer",
    "TokenizerReport",
    "encode_array",
    "load_tiktoken",
    "load_tokenizer",
    "load_tokenizer_json",
    "save_tokenizer_json",
    "tokenizer_report",
    "train_bpe",
]
