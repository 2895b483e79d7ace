"""The base class of everything that is written to disk as settings."""

import difflib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tinygpt.errors import ConfigError


class Config(BaseModel):
    """Frozen, strict settings that refuse unknown fields and repeat every check in `replace`.

    Strict means that `steps=True` or `steps="10"` is an error instead of 1 or 10. A mistake raises
    `ConfigError` with one line a field.

    Raises:
        ConfigError: If a field is missing, unknown, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def __init__(self, /, *positional: Any, **fields: Any) -> None:
        if positional:
            first = next(iter(type(self).model_fields))
            raise ConfigError(f"name the fields of {type(self).__name__}, for example {first}={positional[0]!r}.")
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_readable(type(self), error)) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})

    def to_json(self) -> str:
        """Return the fields as indented JSON with a final newline."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: If the text is not a JSON object or a field is wrong.
        """
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{cls.__name__} cannot be read: not valid JSON ({error}).") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{cls.__name__} cannot be read: expected a JSON object, got {type(fields).__name__}.")
        return cls(**fields)


def _readable(config: type[Config], error: ValidationError) -> str:
    """Turn pydantic's report into one line a field: what was given, what is allowed."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        given = item["input"]
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, config.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its fields are {', '.join(config.model_fields)}."
            lines.append(f"{config.__name__} has no field {field!r}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{config.__name__} needs {field}.")
        elif item["type"] == "value_error":
            # A whole section is not shown again: what is wrong in it was named by the section itself.
            shown = "" if isinstance(given, dict | list) else f"={given!r}"
            prefix = f"{field}{shown}: " if field else ""
            lines.append(prefix + item["msg"].removeprefix("Value error, "))
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{config.__name__}.{field}={given!r}: {message}.")
    return "\n".join(lines)
