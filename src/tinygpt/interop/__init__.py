"""Weights and tokenizers to and from other projects, one module each; nothing here is imported by `import tinygpt`."""

__all__: list[str] = []
