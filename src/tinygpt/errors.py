"""Every error tinygpt raises on purpose.

```
TinyGPTError
├── ConfigError              (also ValueError)    an argument or a config field is wrong
├── DataError                (also ValueError)    text, tokens or a tokenizer is not usable
├── CheckpointError          (also RuntimeError)  a checkpoint is missing, damaged or does not fit
├── HubError                 (also RuntimeError)  the Hugging Face Hub could not be read or written
├── NonFiniteError           (also RuntimeError)  a loss or gradient became NaN or infinite
└── MissingDependencyError   (also ImportError)   an optional package is not installed
```

Each message names what was given, what is allowed and what to do. `except TinyGPTError` catches them all.
"""


class TinyGPTError(Exception):
    """Base of every error raised by tinygpt."""


class ConfigError(TinyGPTError, ValueError):
    """An argument or a config field has a value that cannot work."""


class DataError(TinyGPTError, ValueError):
    """Text, tokens or a tokenizer cannot be used."""


class CheckpointError(TinyGPTError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class HubError(TinyGPTError, RuntimeError):
    """The Hugging Face Hub could not be read from or written to."""


class NonFiniteError(TinyGPTError, RuntimeError):
    """A loss or a gradient became NaN or infinite; the weights were not changed by that step."""


class MissingDependencyError(TinyGPTError, ImportError):
    """An optional dependency is needed for what was asked and is not installed."""
