"""Training a byte-pair encoding."""

from collections.abc import Callable, Iterable, Iterator

from tinygpt._numbers import check_whole, given
from tinygpt.errors import ConfigError, DataError, MissingDependencyError
from tinygpt.tokenizer._base import BOS_TOKEN, CHAT_TOKENS, TextSource, read_texts, utf8
from tinygpt.tokenizer._bpe import SPLIT_PATTERN, BPETokenizer
from tinygpt.tokenizer._progress import training_bar

_MAX_VOCAB = 2**24  # of GPTConfig


def train_bpe(
    texts: Iterable[str] | TextSource,
    *,
    vocab_size: int,
    pattern: str = SPLIT_PATTERN,
    max_characters: int | None = None,
    progress: bool = False,
) -> BPETokenizer:
    """Learn a byte-pair encoding from texts, with rustbpe.

    The same texts give the same tokenizer, whatever the number of threads.

    Args:
        texts: Documents, or a document source; read once, so a generator over a large corpus is fine.
        vocab_size: Number of token ids wanted, the 256 bytes and 9 special tokens included.
        pattern: Regular expression that cuts text before merging; merges never cross a cut.
        max_characters: Stop reading after the document in which this many are reached; `None` reads all.
        progress: Whether to show on standard error how much text was read, and when merging starts.

    Returns:
        A tokenizer with exactly `vocab_size` ids.

    Raises:
        MissingDependencyError: If rustbpe is not installed.
        ConfigError: If `vocab_size` has no room for the bytes and the special tokens or is more than a model takes, or
            `max_characters` is not positive.
        DataError: If the texts are too small for `vocab_size` merges, one is not usable text, or the pattern is not.

    References:
        [rustbpe](https://github.com/karpathy/rustbpe); Sennrich et al.,
        [Neural Machine Translation of Rare Words with Subword Units](https://arxiv.org/abs/1508.07909), 2016.

    Example:
        ```python
        from tinygpt.data import embedded_corpus
        from tinygpt.tokenizer import train_bpe

        tokenizer = train_bpe(embedded_corpus("train"), vocab_size=4096)
        ```
    """
    try:
        import rustbpe
    except ImportError:
        raise MissingDependencyError('training a tokenizer needs rustbpe: pip install "tinygpt[tokenizer]".') from None
    special_tokens = (BOS_TOKEN, *CHAT_TOKENS)
    smallest = 256 + len(special_tokens)
    check_whole(vocab_size=vocab_size, **given(max_characters=max_characters))
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size={vocab_size} has no room for 256 bytes and {len(special_tokens)} special tokens; "
            f"choose {smallest} or more."
        )
    if vocab_size > _MAX_VOCAB:
        raise ConfigError(f"vocab_size={vocab_size} is more than a model takes; choose {_MAX_VOCAB:,} or less.")
    if max_characters is not None and max_characters < 1:
        raise ConfigError(f"max_characters={max_characters} is not positive; choose 1 or more.")
    # Building the tokenizer with no merges checks the pattern before the long part.
    BPETokenizer({bytes([byte]): byte for byte in range(256)}, pattern=pattern, special_tokens=special_tokens)
    trainer = rustbpe.Tokenizer()
    with training_bar(total=max_characters, enabled=progress) as show:
        read = _checked(read_texts(texts), max_characters, show)
        trainer.train_from_iterator(read, vocab_size=vocab_size - len(special_tokens), pattern=pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    reached = len(ranks) + len(special_tokens)
    if reached < vocab_size:
        raise DataError(
            f"the texts are too small for vocab_size={vocab_size}: every merge they allow gives {reached} ids; "
            f"give more text or choose vocab_size={reached} or less."
        )
    return BPETokenizer(ranks, pattern=pattern, special_tokens=special_tokens)


def _checked(texts: Iterator[str], max_characters: int | None, show: Callable[[int | str], None]) -> Iterator[str]:
    """Pass texts on up to the limit, refusing what is not a string with a UTF-8 form."""
    characters = 0
    for text in texts:
        utf8(text)
        yield text
        characters += len(text)
        show(len(text))
        if max_characters is not None and characters >= max_characters:
            break
    show("merging")  # in rustbpe, which does not say how far it is
