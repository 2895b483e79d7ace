"""Recipes as files, and values laid over them by dotted names."""

import difflib
import json
import runpy
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from tinygpt._disk import write_text
from tinygpt.config import Config
from tinygpt.errors import ConfigError
from tinygpt.recipe._sections import EMBEDDED

if TYPE_CHECKING:
    from tinygpt.recipe._recipe import Recipe

RECIPE_FILE = "recipe.json"
# No recipe is as large; a file named by mistake may be.
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 16
# TOML has no null.
_NONE = "none"


def read_recipe(path: Path, recipe_class: "type[Recipe]") -> dict[str, Any]:
    """Return the nested fields of a recipe file.

    Raises:
        ConfigError: If the file is missing, too large, of an unknown kind, or cannot be read.
    """
    if path.is_dir():
        if not (path / RECIPE_FILE).exists():
            raise ConfigError(f"{path} holds no {RECIPE_FILE}, so it is no run that was made from a recipe.")
        path = path / RECIPE_FILE
    if path.suffix not in (".toml", ".json", ".py"):
        raise ConfigError(f"{path} is no recipe; give a .toml, .json or .py file, or the folder of a run.")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES:,} bytes and cannot be a recipe.")
        if path.suffix == ".py":
            return _from_python(path, recipe_class)
        text = path.read_bytes().decode("utf-8-sig")  # with the mark that Windows' Notepad begins files with
        fields = json.loads(text) if path.suffix == ".json" else _plain(tomllib.loads(text))
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror or error}.") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a recipe.") from None
    except ValueError as error:  # of JSON, TOML and UTF-8
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is no recipe: it holds a {type(fields).__name__}, not named values.")
    return fields


def write_recipe(path: Path, text: str) -> Path:
    """Write a recipe, complete or not at all.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"the recipe cannot be written to {path}: {error.strerror or error}.") from None
    return path


def absolute(path: str | None) -> str | None:
    """Return a path that means the same in every working directory; `"embedded"` and addresses are no paths."""
    if path is None or path == EMBEDDED or "://" in path:
        return path
    return str(Path(path).expanduser().absolute())


def with_overrides(fields: dict[str, Any], overrides: dict[str, str], recipe_class: "type[Recipe]") -> dict[str, Any]:
    """Return nested fields with values, given as text, put where their dotted names say.

    A value is text where the field is text, and otherwise read as TOML: `6`, `0.5`, `true`, `[1, 2]`; `none` is `None`.

    Raises:
        ConfigError: If a name leads nowhere.
    """
    merged: dict[str, Any] = json.loads(json.dumps(fields, default=_jsonable))
    for name, text in overrides.items():
        parts = name.replace("-", "_").split(".")
        _put(merged, parts, _value(text, _annotation(recipe_class, parts)), name)
    return merged


def _put(fields: dict[str, Any], parts: list[str], value: Any, name: str) -> None:
    here: Any = fields
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise ConfigError(f"{name}: {part!r} is none of {len(here)} {parts[index - 1]}, counted from 0.")
            key: Any = int(part)
        else:
            key = part
            if not last and not isinstance(here.get(key), dict | list):
                if parts[index + 1].isdecimal():
                    raise ConfigError(f"{name}: the recipe has no {part} to change; write them into a file.")
                here[key] = {}  # a section that was left out, or written in its short form
        if last:
            here[key] = value
        else:
            here = here[key]


def _annotation(config: type[Config], parts: list[str]) -> Any:
    """Return the type of the field that a dotted name means, `None` where that is not known."""
    annotation: Any = config
    for part in parts:
        inner = [each for each in _alternatives(annotation) if isinstance(each, type) and issubclass(each, Config)]
        if part.isdecimal():
            annotation = next(iter(get_args(annotation)), None)
        elif inner and part in inner[0].model_fields:
            annotation = inner[0].model_fields[part].annotation
        elif inner and inner[0].__name__ == "Recipe":
            near = difflib.get_close_matches(part, inner[0].model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its fields are {', '.join(inner[0].model_fields)}."
            raise ConfigError(f"a recipe has no field {part!r}; {hint}")
        else:
            return None  # what it is is said when the whole is checked
    return annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone, each without its bounds."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(get_args(each)[0] if get_origin(each) is Annotated else each for each in members)


def _value(text: str, annotation: Any) -> Any:
    kinds = set(_alternatives(annotation))
    if NoneType in kinds and text == _NONE:
        return None
    if str in kinds:
        return text
    try:
        read = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    value = read["value"]
    return _plain(value) if read.keys() == {"value"} and isinstance(value, int | float | list | dict) else text


def _plain(value: Any, depth: int = 0) -> Any:
    """Return values of TOML with `"none"` as `None`.

    Raises:
        ConfigError: If they are nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise ConfigError("the recipe is nested too deeply.")
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    return None if value == _NONE else value


def _jsonable(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Config) else str(value)  # a date of TOML becomes text


def _from_python(path: Path, recipe_class: "type[Recipe]") -> dict[str, Any]:
    try:
        found = runpy.run_path(str(path)).get("recipe")
    except (Exception, SystemExit) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{path}: {error}") from None
        raise ConfigError(f"{path} failed with {type(error).__name__}: {error}") from error
    if not isinstance(found, recipe_class):
        raise ConfigError(f"{path} sets no recipe = Recipe(...).")
    return found.model_dump(exclude_unset=True)
