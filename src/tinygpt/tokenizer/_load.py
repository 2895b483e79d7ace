"""Reading a saved tokenizer."""

import hashlib
import os
from pathlib import Path

from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer._base import Tokenizer
from tinygpt.tokenizer._bpe import BPETokenizer
from tinygpt.tokenizer._bytes import ByteTokenizer
from tinygpt.tokenizer._files import CONFIG_FILE, RANKS_FILE, TokenizerConfig, parse_ranks, read_file


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer that `save` wrote, checking every byte of it; nothing is unpickled or executed.

    Args:
        folder: The folder given to `save`; it may hold other files, such as a model's.

    Returns:
        A `ByteTokenizer` or a `BPETokenizer` with the fingerprint of the saved one.

    Raises:
        DataError: If a file is missing, damaged, too large to be a tokenizer, or from another version.

    Example:
        ```python
        from tinygpt.tokenizer import ByteTokenizer, load_tokenizer

        ByteTokenizer().save("my-tokenizer")
        tokenizer = load_tokenizer("my-tokenizer")
        ```
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = TokenizerConfig.from_json(read_file(path).decode("utf-8"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or from another version of tinygpt: {error}") from None
    if config.kind == "byte":
        byte_tokenizer = ByteTokenizer()
        if config != TokenizerConfig(kind="byte", special_tokens=byte_tokenizer.special_tokens):
            raise DataError(f"{path} is damaged: a byte tokenizer has {byte_tokenizer.special_tokens} and no ranks.")
        return byte_tokenizer

    if config.pattern is None or config.ranks_sha256 is None:
        raise DataError(f"{path} is damaged: a bpe tokenizer needs pattern and ranks_sha256.")
    ranks_path = Path(folder) / RANKS_FILE
    text = read_file(ranks_path)
    found = hashlib.sha256(text).hexdigest()
    if found != config.ranks_sha256:
        raise DataError(
            f"{ranks_path} does not belong to {CONFIG_FILE} or is damaged: its sha256 is {found}, "
            f"expected {config.ranks_sha256}; copy both files again from where the tokenizer was saved."
        )
    ranks = parse_ranks(text, ranks_path)
    special = sorted(config.special_tokens, key=config.special_tokens.__getitem__)
    tokenizer = BPETokenizer(ranks, pattern=config.pattern, special_tokens=special)
    if tokenizer.special_tokens != config.special_tokens:
        raise DataError(
            f"{path} is damaged: special tokens must take the ids after the {len(ranks)} ranks, "
            f"got {config.special_tokens}."
        )
    return tokenizer
