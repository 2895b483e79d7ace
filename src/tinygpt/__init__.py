"""Train a small modern GPT from scratch, understand each part, change one, resume without harm, publish.

The four names below are the short way in. Everything else has one address each:
`tinygpt.layers`, `tinygpt.optim`, `tinygpt.schedules`, `tinygpt.scaling`, `tinygpt.data`, `tinygpt.tokenizer`,
`tinygpt.losses`, `tinygpt.generate`, `tinygpt.checkpoint`, `tinygpt.evals`, `tinygpt.hub`, `tinygpt.errors`.
"""

import importlib
import typing

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from tinygpt.model import GPT as GPT
    from tinygpt.model import GPTConfig as GPTConfig
    from tinygpt.trainer import Trainer as Trainer
    from tinygpt.trainer import TrainerConfig as TrainerConfig
else:
    # On first use, so that the command line and processes that only tokenize do not wait for torch.
    def __getattr__(name: str) -> object:
        homes = {"GPT": "model", "GPTConfig": "model", "Trainer": "trainer", "TrainerConfig": "trainer"}
        module = f"tinygpt.{homes.get(name, name)}"
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module 'tinygpt' has no attribute {name!r}") from None
        return getattr(found, name) if name in homes else found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["GPT", "GPTConfig", "Trainer", "TrainerConfig", "__version__"]
