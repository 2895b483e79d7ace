"""To and from the files of other projects, one module for each, imported by name: `tinygpt.interop.nanochat`."""

__all__: list[str] = []
