"""Shows the fields of a `Config` as its arguments on the API pages; its own `__init__` only says `**fields`."""

from typing import Any

import griffe

keyword_only = griffe.ParameterKind.keyword_only


class ConfigSignatures(griffe.Extension):
    """Gives each subclass of `Config` the constructor that pydantic makes at run time."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add an `__init__` with one keyword argument for each annotated field."""
        if "Config" not in [str(base) for base in cls.bases]:
            return
        fields = [
            griffe.Parameter(field.name, annotation=field.annotation, kind=keyword_only, default=field.value)
            for field in cls.attributes.values()
            if field.annotation is not None and "property" not in field.labels and not field.name.startswith("_")
        ]
        itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(itself, *fields)))
