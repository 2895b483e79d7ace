"""Several sources read as one, in given shares."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from tinygpt._numbers import check_real
from tinygpt.data._documents import Cursor, DocumentSource
from tinygpt.data._faults import Skipped, skipped_of
from tinygpt.errors import ConfigError, DataError

_PARTS = "give a source and its weight by name, such as {'prose': (source, 0.8)}"


@dataclass
class _Part:
    """How far one source of a mixture was read: its cursor, how often to its end, and what it has given so far."""

    source: DocumentSource
    cursor: Cursor | None = None
    passes: int = 0
    characters: int = 0


class Mixture:
    """Several sources read as one, so that each gives its share of the characters.

    Next comes a document of the source that is furthest behind its share, so at any place the shares are right to
    within the longest documents. Characters, and not documents, because they are close to tokens: a source of long
    documents is not read more than was asked for. Every document counts one character more than it has, for the
    token that starts it.

    A source that ends before the others starts again. An epoch of the mixture ends when each source was read to
    its end at least once; the next one starts every source at its beginning.

    Args:
        parts: A source and its weight by name. Weights are relative to each other; 0 leaves a source out, until
            `with_weights` brings it in.
        seed: Decides which source comes first, and so how their documents interleave.

    Raises:
        ConfigError: If there is no part, a weight is negative or not finite, or all are 0.

    Example:
        ```python
        from tinygpt.data import Mixture, TextDocuments

        prose, code = TextDocuments(["Call me Ishmael."] * 9), TextDocuments(["print('hello')"] * 9)
        mixture = Mixture({"prose": (prose, 0.8), "code": (code, 0.2)}, seed=1)

        later = mixture.with_weights({"prose": 0.5, "code": 0.5})  # continues at a cursor of `mixture`
        ```
    """

    def __init__(self, parts: Mapping[str, tuple[DocumentSource, float]], *, seed: int = 0) -> None:
        if not parts:
            raise ConfigError("a mixture of no parts has no documents; give at least one source and its weight.")
        if not isinstance(parts, Mapping):
            raise ConfigError(f"a mixture is made of a dict, not of a {type(parts).__name__}; {_PARTS}.")
        for name, part in parts.items():
            if not (isinstance(part, tuple | list) and len(part) == 2 and hasattr(part[0], "read")):
                raise ConfigError(f"the part {name!r} of a mixture is no source with a weight; {_PARTS}.")
        self._sources = {name: source for name, (source, _) in parts.items()}
        self._seed = seed
        # Weights of earlier phases first, the present ones last.
        self._phases = [_checked({name: weight for name, (_, weight) in parts.items()}, self._sources)]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each source by name, as given."""
        return dict(self._phases[-1])

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What the sources passed over; files are named `part/file`."""
        return tuple(
            Skipped(f"{name}/{skipped.file}", skipped.reason, skipped.count, skipped.first)
            for name, source in self._sources.items()
            for skipped in skipped_of(source)
        )

    def with_weights(self, weights: Mapping[str, float]) -> Self:
        """Return a mixture of the same sources that goes on where this one stopped, with other weights from there.

        It accepts this mixture's cursors and, having the same fingerprint, its saved loader states. A run that
        continues in the new phase builds both in the same way: first this mixture, then `with_weights`.

        Args:
            weights: The new weight of every source.

        Raises:
            ConfigError: If a name is unknown or missing, or a weight cannot be used.
        """
        changed = type(self)({name: (source, 1.0) for name, source in self._sources.items()}, seed=self._seed)
        changed._phases = [*self._phases, _checked(weights, self._sources)]
        return changed

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """Yield documents until every source with a weight was read to its end at least once.

        Raises:
            DataError: If the cursor is not one of this mixture, a source has no document, or one cannot be read.
        """
        parts = self._parts(cursor)
        weights = self._phases[-1]
        reading = {name: part.source.read(part.cursor) for name, part in parts.items()}
        lag = self._first_lag()
        while any(weights[name] and not part.passes for name, part in parts.items()):
            name = min(
                (name for name in parts if weights[name]),
                key=lambda name: ((parts[name].characters + lag[name]) / weights[name], name),
            )
            part = parts[name]
            item = next(reading[name], None)
            if item is None:
                if part.cursor is None:
                    raise DataError(f"the part {name!r} of the mixture has no documents; leave it out.")
                part.cursor, part.passes = None, part.passes + 1
                reading[name] = part.source.read()
                continue
            text, part.cursor = item
            part.characters += len(text) + 1
            yield text, self._cursor(parts)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of names, sources, seed and first weights; `with_weights` does not change it."""
        sources = {name: source.fingerprint() for name, source in self._sources.items()}
        parts = ["mixture", 1, sources, self._seed, self._phases[0]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _first_lag(self) -> dict[str, float]:
        """Return a head start of less than a character for each source, by the seed: it only decides between equals."""
        keys = {name: hashlib.sha256(f"{self._seed} {name}".encode()).digest() for name in self._sources}
        return {name: int.from_bytes(key[:6], "little") / 2**48 for name, key in keys.items()}

    def _cursor(self, parts: Mapping[str, _Part]) -> Cursor:
        return {
            "weights": self._phases[-1],
            "parts": {name: [part.cursor, part.passes, part.characters] for name, part in parts.items()},
        }

    def _parts(self, cursor: Cursor | None) -> dict[str, _Part]:
        """Return how far each source was read at a cursor."""
        if cursor is None:
            return {name: _Part(source) for name, source in self._sources.items()}
        saved, weights = cursor.get("parts"), cursor.get("weights")
        if not isinstance(saved, dict) or set(saved) != set(self._sources):
            raise DataError(f"cursor {cursor} does not belong to this mixture of {', '.join(self._sources)}.")
        if weights not in self._phases:
            raise DataError(
                f"the cursor was saved with the weights {weights} and this mixture has {self._phases[-1]}; build it "
                "with those, then change them by with_weights."
            )
        # A share is owed from where the weights changed: what was given before does not count.
        same = weights == self._phases[-1]
        return {
            name: _Part(source, saved[name][0], saved[name][1], saved[name][2] if same else 0)
            for name, source in self._sources.items()
        }


def _checked(weights: Mapping[str, float], sources: Mapping[str, DocumentSource]) -> dict[str, float]:
    """Return weights that can be used, one for each source."""
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights are a {type(weights).__name__}; give a dict of a number by name.")
    if set(weights) != set(sources):
        raise ConfigError(
            f"weights are for {sorted(weights)} and the sources are {sorted(sources)}; give one for each."
        )
    for name, weight in weights.items():
        check_real(**{f"the weight of {name!r}": weight})
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight {weight} of {name!r} is not a share; choose 0 or a positive number.")
    if not any(weights.values()):
        raise ConfigError("every weight is 0, so nothing would be read; choose a positive one.")
    return {name: float(weights[name]) for name in sources}
