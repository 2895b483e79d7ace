"""Checkpoints of nanochat: weights, tokenizer, optimizer state, and where the run stood."""

from tinygpt.interop.nanochat._checkpoint import Metadata as Metadata
from tinygpt.interop.nanochat._checkpoint import load_checkpoint as load_checkpoint
from tinygpt.interop.nanochat._convert import convert_state_dict as convert_state_dict
from tinygpt.interop.nanochat._optimizer import load_optimizer_state as load_optimizer_state
from tinygpt.interop.nanochat._tokenizer import load_tokenizer_pickle as load_tokenizer_pickle

__all__ = ["Metadata", "convert_state_dict", "load_checkpoint", "load_optimizer_state", "load_tokenizer_pickle"]
