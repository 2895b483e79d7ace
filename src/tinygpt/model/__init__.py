"""The GPT model and the config that names a standard one."""

from tinygpt.model._checkpointing import ActivationCheckpointing as ActivationCheckpointing
from tinygpt.model._config import GPTConfig as GPTConfig
from tinygpt.model._counts import ParameterCounts as ParameterCounts
from tinygpt.model._files import check_device as check_device
from tinygpt.model._files import check_tokenizer as check_tokenizer
from tinygpt.model._files import describe_blocks as describe_blocks
from tinygpt.model._files import independent_tensors as independent_tensors
from tinygpt.model._files import write_model as write_model
from tinygpt.model._gpt import GPT as GPT
from tinygpt.model._parts import PartFactory as PartFactory

__all__ = [
    "GPT",
    "ActivationCheckpointing",
    "GPTConfig",
    "ParameterCounts",
    "PartFactory",
    "check_device",
    "check_tokenizer",
    "describe_blocks",
    "independent_tensors",
    "write_model",
]
