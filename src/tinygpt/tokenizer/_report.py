"""What a tokenizer does to text, in numbers and to look at."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer._base import TextSource, Tokenizer, read_texts

_LONGEST = 20
_SAMPLES = 3
_SAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class TextMeasure:
    """How much text was encoded, and into how many tokens.

    Attributes:
        documents: Texts encoded.
        num_bytes: Their UTF-8 bytes.
        num_tokens: Their tokens, without special ones.
        tokens_seen: How many different tokens of the vocabulary came up.
    """

    documents: int
    num_bytes: int
    num_tokens: int
    tokens_seen: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token stands for on average: the more, the shorter the sequences."""
        return self.num_bytes / self.num_tokens


@dataclass(frozen=True)
class TokenizerReport:
    """What `tokenizer_report` found; `str` gives it as text.

    Attributes:
        vocab_size: Number of token ids.
        train: Measured on training text.
        validation: Measured on validation text. Fewer bytes per token than on training text mean that the vocabulary
            has learnt the training text by heart, or that the texts differ in kind.
        longest: The longest tokens; those that are no word of any language show what the training text is full of.
        samples: The beginning of some validation texts, cut into tokens.
    """

    vocab_size: int
    train: TextMeasure
    validation: TextMeasure
    longest: tuple[bytes, ...]
    samples: tuple[tuple[bytes, ...], ...]

    def __str__(self) -> str:
        lines = [f"{self.vocab_size:,} token ids", ""]
        lines.append(f"{'':12}{'bytes/token':>12}{'documents':>12}{'bytes':>16}{'tokens':>16}{'ids seen':>12}")
        for name, text in (("train", self.train), ("validation", self.validation)):
            numbers = f"{text.documents:>12,}{text.num_bytes:>16,}{text.num_tokens:>16,}{text.tokens_seen:>12,}"
            lines.append(f"{name:12}{text.bytes_per_token:>12.3f}{numbers}")
        lines += ["", "longest tokens:", *(f'  "{_shown(token)}"' for token in self.longest)]
        for sample in self.samples:
            lines += ["", "a sample of validation, cut into tokens:", "  " + "|".join(map(_shown, sample))]
        return "\n".join(lines)


def tokenizer_report(
    tokenizer: Tokenizer,
    train: Iterable[str] | TextSource,
    validation: Iterable[str] | TextSource,
    *,
    max_characters: int = 10_000_000,
) -> TokenizerReport:
    """Measure a tokenizer on text it was trained on and on text it was not.

    Args:
        tokenizer: Any tokenizer.
        train: Texts, or a document source, for training.
        validation: Texts, or a document source, held out.
        max_characters: Read no further than the document in which this many are reached, in each of the two.

    Raises:
        ConfigError: If `max_characters` is not positive.
        DataError: If one of the two has no text, or it cannot be read.

    Example:
        ```python
        from tinygpt.data import embedded_corpus
        from tinygpt.tokenizer import train_bpe, tokenizer_report

        train, validation = embedded_corpus("train"), embedded_corpus("validation")
        report = tokenizer_report(train_bpe(train, vocab_size=2048), train, validation)
        print(report)
        ```
    """
    if max_characters < 1:
        raise ConfigError(f"max_characters={max_characters} is not positive; choose 1 or more.")
    sizes = tokenizer.token_bytes()
    longest = sorted(range(len(sizes)), key=lambda token_id: -sizes[token_id])[:_LONGEST]
    measured_train, _ = _measure(tokenizer, train, max_characters, "train")
    measured_validation, beginnings = _measure(tokenizer, validation, max_characters, "validation")
    return TokenizerReport(
        vocab_size=tokenizer.vocab_size,
        train=measured_train,
        validation=measured_validation,
        longest=tuple(tokenizer.decode_bytes([token_id]) for token_id in longest if sizes[token_id]),
        samples=tuple(
            tuple(tokenizer.decode_bytes([token_id]) for token_id in tokenizer.encode(text)) for text in beginnings
        ),
    )


def _measure(
    tokenizer: Tokenizer, texts: Iterable[str] | TextSource, max_characters: int, name: str
) -> tuple[TextMeasure, list[str]]:
    """Return the figures of some text, and the beginnings of its first documents."""
    seen = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    beginnings: list[str] = []
    documents = characters = num_bytes = num_tokens = 0
    for text in read_texts(texts):
        token_ids = tokenizer.encode(text)
        seen[token_ids] = True
        documents += 1
        characters += len(text)
        num_bytes += len(text.encode())
        num_tokens += len(token_ids)
        if text and len(beginnings) < _SAMPLES:
            beginnings.append(text[:_SAMPLE_CHARACTERS])
        if characters >= max_characters:
            break
    if not num_tokens:
        raise DataError(f"the {name} texts have nothing to encode; give documents with text.")
    return TextMeasure(documents, num_bytes, num_tokens, int(seen.sum())), beginnings


def _shown(token: bytes) -> str:
    """Return a token on one line: control characters, and bytes that are no character, as escapes."""
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
