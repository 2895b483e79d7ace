"""nanochat's pickled tokenizer, read without unpickling it."""

import os
import pickletools
from pathlib import Path
from typing import Any

from tinygpt.errors import DataError
from tinygpt.tokenizer import BPETokenizer

# A vocabulary of 200,000 entries takes about 4 MB and 600,000 opcodes.
_MAX_BYTES = 32 << 20
_MAX_OPCODES = 2_000_000
_ENCODING = ("tiktoken.core", "Encoding")
_FIELDS = ("name", "pat_str", "mergeable_ranks", "special_tokens")
_CONSTANTS = ("BININT", "BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES")


def load_tokenizer_pickle(path: str | os.PathLike[str]) -> BPETokenizer:
    """Read nanochat's `tokenizer.pkl`, a pickled `tiktoken.Encoding`, without running anything it says.

    The pickle is not loaded. Its opcodes are followed one by one by a reader that knows dictionaries, texts, bytes
    and integers, takes the name of tiktoken's class for a mark, and refuses everything else, so a file made to do harm
    is refused before anything has happened.

    Args:
        path: The file.

    Returns:
        A tokenizer that gives text the same ids; save it with `save`.

    Raises:
        DataError: If the file cannot be read, is too large, holds anything but an encoding, or its ids are not
            those of a `BPETokenizer`: ranks without gaps, then the special tokens, `<|bos|>` among them.

    Example:
        ```python no-run: needs the file
        tokenizer = load_tokenizer_pickle("nanochat/tokenizer/tokenizer.pkl")
        ```
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"no tokenizer can be read from {path}: {error.strerror}.") from None
    if len(content) > _MAX_BYTES:
        raise DataError(f"{path} is larger than {_MAX_BYTES:,} bytes and cannot be a pickled tokenizer.")
    try:
        ranks, pattern, special = _fields(_follow(content))
        tokens = sorted(special, key=special.__getitem__)
        tokenizer = BPETokenizer(ranks, pattern=pattern, special_tokens=tokens)
        if tokenizer.special_tokens != special:
            raise DataError(f"special tokens must take the ids after the {len(ranks)} ranks, got {special}")
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return tokenizer


class _Encoding:
    """What stands for the pickled object: its state and nothing else."""

    state: Any = None


def _follow(content: bytes) -> Any:
    """Return what the pickle describes, made of inert values only.

    Raises:
        DataError: At the first opcode that describes anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count >= _MAX_OPCODES:
                raise DataError(f"the pickle has more than {_MAX_OPCODES:,} opcodes and cannot be a tokenizer.")
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                return stack.pop()
            if name in _CONSTANTS:
                stack.append(argument)
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_TUPLE":
                stack.append(())
            elif name in ("SETITEM", "SETITEMS"):
                start = marks.pop() if name == "SETITEMS" else len(stack) - 2
                items = stack[start:]
                del stack[start:]
                _set_items(stack[-1], items)
            elif name == "GLOBAL":
                stack.append(_known_class(*argument.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known_class(module, attribute))
            elif name == "NEWOBJ":
                if stack.pop() != () or stack.pop() is not _Encoding:
                    raise DataError("the pickle makes an object of arguments; an encoding has none.")
                stack.append(_Encoding())
            elif name == "BUILD":
                state = stack.pop()
                if type(stack[-1]) is not _Encoding:
                    raise DataError("the pickle gives a state to something that is no encoding.")
                stack[-1].state = state
            else:
                raise DataError(f"the pickle uses {name}, which a pickled tiktoken.Encoding does not; nothing was run.")
    except DataError:
        raise
    except Exception as error:  # whatever damaged bytes make of the opcodes' arguments
        raise DataError(f"it is not a pickle, or a damaged one ({type(error).__name__}: {error}).") from None
    raise DataError("the pickle does not end.")


def _known_class(module: Any, name: Any) -> type[_Encoding]:
    if (module, name) != _ENCODING:
        raise DataError(
            f"the pickle asks for {module!s:.60}.{name!s:.60}; only {'.'.join(_ENCODING)} is known. Nothing was run."
        )
    return _Encoding


def _set_items(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    # Only flat keys: the hash of nested ones can take for ever.
    if type(target) is not dict or len(keys) != len(values) or not all(type(key) in (str, bytes) for key in keys):
        raise DataError("the pickle fills something that is no dictionary of texts or bytes.")
    target.update(zip(keys, values, strict=True))


def _fields(encoding: Any) -> tuple[dict[bytes, int], str, dict[str, int]]:
    state = encoding.state if type(encoding) is _Encoding else None
    if type(state) is str:
        raise DataError(
            f"the pickle names tiktoken's own encoding {state!r:.60} and does not hold it; read that with "
            "tinygpt.tokenizer.load_tiktoken."
        )
    if type(state) is not dict or set(state) != set(_FIELDS):
        raise DataError(f"the pickle is not that of a tiktoken.Encoding, which holds {', '.join(_FIELDS)}.")
    pattern, ranks, special = (state[name] for name in _FIELDS[1:])
    if type(pattern) is not str or not _maps(ranks, bytes) or not _maps(special, str):
        raise DataError(
            "the pickled encoding must hold a pattern, ranks from bytes and special tokens from text to integers."
        )
    return ranks, pattern, special


def _maps(value: Any, keys: type) -> bool:
    return type(value) is dict and all(type(key) is keys and type(item) is int for key, item in value.items())
