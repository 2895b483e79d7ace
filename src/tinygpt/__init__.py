"""Train a small modern GPT from scratch, understand each part, change one, resume without harm, publish.

The four names below are the short way in. Everything else has one address each:
`tinygpt.layers`, `tinygpt.optim`, `tinygpt.schedules`, `tinygpt.scaling`, `tinygpt.data`, `tinygpt.tokenizer`,
`tinygpt.losses`, `tinygpt.generate`, `tinygpt.checkpoint`, `tinygpt.evals`, `tinygpt.hub`, `tinygpt.errors`.
"""

__version__ = "0.1.0"  # first, since the modules below read it

from tinygpt.model import GPT as GPT
from tinygpt.model import GPTConfig as GPTConfig
from tinygpt.trainer import Trainer as Trainer
from tinygpt.trainer import TrainerConfig as TrainerConfig

__all__ = ["GPT", "GPTConfig", "Trainer", "TrainerConfig", "__version__"]
