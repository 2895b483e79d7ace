"""The shape of the library: what is exported is what is there, documented, annotated, in one place and short."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import tinygpt

PACKAGE = Path(tinygpt.__file__).parent


def public_modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(tinygpt.__path__, "tinygpt.")]
    return ["tinygpt", *(name for name in found if "._" not in name)]


def exporting_modules() -> Iterator[tuple[str, ModuleType]]:
    for name in public_modules():
        module = importlib.import_module(name)
        if hasattr(module, "__path__") or hasattr(module, "__all__"):
            yield name, module


MODULES = dict(exporting_modules())
TORCH_HOOKS = {"extra_repr"}  # torch documents what they are for
BELOW_TOP = {name: module for name, module in MODULES.items() if name != "tinygpt"}


def names_bound_in(module: ModuleType) -> set[str]:
    """Return the public names a module defines; for a package's `__init__` also those it imports by name."""
    names: set[str] = set()
    for node in ast.parse(Path(str(module.__file__)).read_text("utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Assign():
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.ImportFrom() if hasattr(module, "__path__"):
                names.update(alias.asname or alias.name for alias in node.names)
            case ast.If(test=ast.Attribute(attr="TYPE_CHECKING")):  # what the top imports on first use
                imports = [item for item in node.body if isinstance(item, ast.ImportFrom)]
                names.update(alias.name for item in imports for alias in item.names)
    return {name for name in names if not name.startswith("_")}


def exported() -> list[Any]:
    """Return each exported class and function once, with its address as the test's name."""
    seen: dict[int, Any] = {}
    for name, module in MODULES.items():
        for item in getattr(module, "__all__", ()):
            value = getattr(module, item)
            if inspect.isclass(value) or inspect.isfunction(value):
                seen.setdefault(id(value), pytest.param(value, id=f"{name}.{item}"))
    return list(seen.values())


def functions_of(value: Any) -> Iterator[tuple[str, FunctionType]]:
    """Yield a function itself, or the methods that a class of ours defines and shows."""
    if inspect.isfunction(value):
        yield value.__name__, value
        return
    for name, member in vars(value).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        function = function.fget if isinstance(function, property) else function
        if not inspect.isfunction(function) or not function.__module__.startswith("tinygpt"):
            continue
        generated = function.__code__.co_filename == "<string>"  # what a dataclass writes
        if not generated and (name == "__init__" or not name.startswith("_")):
            yield f"{value.__name__}.{name}", function


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_is_there(name: str) -> None:
    listed = [item for item in MODULES[name].__all__ if not item.startswith("__")]
    assert sorted(listed) == sorted(names_bound_in(MODULES[name]))
    assert len(set(listed)) == len(listed)


def test_below_the_top_every_name_has_one_address() -> None:
    addresses: dict[int, list[str]] = {}
    for name, module in BELOW_TOP.items():
        for item in module.__all__:
            value = getattr(module, item)
            if inspect.isclass(value) or inspect.isfunction(value):
                addresses.setdefault(id(value), []).append(f"{name}.{item}")
    assert not [where for where in addresses.values() if len(where) > 1]


@pytest.mark.parametrize("value", exported())
def test_public_names_are_documented_and_annotated(value: Any) -> None:
    doc = value.__doc__ or ""
    assert doc, "no docstring"
    assert not doc.startswith(f"{value.__name__}("), "only the docstring a dataclass or NamedTuple writes itself"
    for name, function in functions_of(value):
        excused = {"__init__", *TORCH_HOOKS}
        assert name.rpartition(".")[2] in excused or function.__doc__, f"{name} has no docstring"
        signature = inspect.signature(function)
        bare = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare, f"{name} leaves {bare} without annotation"
        assert signature.return_annotation is not signature.empty, f"{name} has no return annotation"


def test_every_public_module_says_what_it_is() -> None:
    assert not [name for name in public_modules() if not (importlib.import_module(name).__doc__ or "").strip()]


def test_no_file_is_over_400_lines() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text("utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 400}
