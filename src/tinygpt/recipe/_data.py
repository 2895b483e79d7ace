"""The sources, tokenizer and validation set that a recipe names."""

from pathlib import Path

from tinygpt.data import (
    BatchLoader,
    DocumentSource,
    Mixture,
    TokenShards,
    ValidationSet,
    embedded_corpus,
    hash_split,
    open_source,
)
from tinygpt.data._shards import holds_shards
from tinygpt.errors import ConfigError
from tinygpt.recipe._sections import EMBEDDED, DataRecipe, TokenizerRecipe
from tinygpt.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

Source = DocumentSource | TokenShards


def is_shards(path: str) -> bool:
    """Return whether a path is a folder of token shards."""
    return path != EMBEDDED and holds_shards(Path(path))


def open_text(path: str, data: DataRecipe) -> DocumentSource:
    """Open text of any kind as the recipe says."""
    if path == EMBEDDED:
        return embedded_corpus("train")
    return open_source(path, text_key=data.text_key, separator=data.separator, on_error=data.on_error)


def open_training(data: DataRecipe, train: str | None = None) -> tuple[Source, DocumentSource | None]:
    """Return what to train on, and the documents to measure on where the section leaves them to the training text.

    Args:
        data: The section.
        train: Another path than the section's, of a phase. What is held out of the run's text is held out of it too.

    Raises:
        ConfigError: If a mixture has token shards.
        DataError: If a source cannot be opened.
    """
    own = data.train or (None if data.mixture else EMBEDDED)
    path = train or own
    source: DocumentSource
    if path is None:
        if shards := [each for each in data.mixture if is_shards(each)]:
            raise ConfigError(f"data.mixture mixes text, and {shards[0]} is a folder of token shards.")
        source = Mixture({each: (open_text(each, data), weight) for each, weight in data.mixture.items()})
    elif is_shards(path):
        return TokenShards(path), None
    else:
        source = open_text(path, data)
    if data.validation is not None or (own is not None and is_shards(own)):
        return source, None
    if own == EMBEDDED:
        return source, embedded_corpus("validation")
    return hash_split(source, validation_fraction=data.held_out)


def make_tokenizer(section: TokenizerRecipe, source: Source, *, progress: bool) -> Tokenizer:
    """Return the tokenizer that a section names, trained on the source if that is what it says.

    Raises:
        ConfigError: If a tokenizer is to be trained on token shards.
    """
    if section.folder is not None:
        return load_tokenizer(section.folder)
    if isinstance(source, TokenShards):
        if section.vocab_size is not None:
            raise ConfigError("token shards bring their tokenizer; leave tokenizer.vocab_size out.")
        return source.tokenizer
    if section.vocab_size is None:
        return ByteTokenizer()
    return train_bpe(source, vocab_size=section.vocab_size, max_characters=section.max_characters, progress=progress)


def vocab_size(section: TokenizerRecipe, data: DataRecipe) -> int:
    """Return how many ids the tokenizer has or is going to have, without training it."""
    if section.folder is not None:
        return load_tokenizer(section.folder).vocab_size
    if data.train is not None and is_shards(data.train):
        return TokenShards(data.train).tokenizer.vocab_size
    return section.vocab_size or ByteTokenizer().vocab_size


def make_loader(data: DataRecipe, source: Source, tokenizer: Tokenizer, seq_len: int) -> BatchLoader:
    """Return the loader of a source."""
    return BatchLoader(
        source,
        tokenizer,
        rows=data.rows,
        seq_len=seq_len,
        overflow=data.overflow,
        seed=data.shuffle_seed,
        shuffle_documents=data.shuffle_documents,
        buffer_documents=data.buffer_documents,
    )


def open_validation(data: DataRecipe, held_out: DocumentSource | None) -> DocumentSource | ValidationSet | None:
    """Return what to measure on, as text or as rows; `None` if there is nothing."""
    if data.validation is None:
        return held_out
    if data.validation.endswith(".safetensors"):
        return ValidationSet.load(data.validation, rows=data.rows)
    return embedded_corpus("validation") if data.validation == EMBEDDED else open_text(data.validation, data)


def make_validation(
    data: DataRecipe, held_out: DocumentSource | None, tokenizer: Tokenizer, seq_len: int
) -> ValidationSet | None:
    """Return the rows to measure on; `None` if there are none."""
    opened = open_validation(data, held_out)
    if opened is None or isinstance(opened, ValidationSet):
        return opened
    return ValidationSet.from_source(
        opened, tokenizer, rows=data.rows, seq_len=seq_len, max_tokens=data.validation_tokens
    )
