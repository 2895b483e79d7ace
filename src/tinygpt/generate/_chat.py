"""Whether a model has learned to converse."""

import torch

from tinygpt.model import GPT
from tinygpt.tokenizer import ChatTemplate, Message, Tokenizer


def is_chat_tuned(model: GPT, tokenizer: Tokenizer) -> bool:
    """Return whether a model has learned the marks of a conversation, and not only its tokenizer reserves them.

    A model that was trained on plain text has seen that `<|assistant_end|>` never comes. One that was trained on
    conversations expects it at the end of an answer. So the model reads a greeting and its answer, and somewhere in the
    answer it must give the mark at least twice the probability of blind chance.

    Args:
        model: The model.
        tokenizer: The one it was trained with.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.generate import is_chat_tuned
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        is_chat_tuned(model, ByteTokenizer())  # False: no marks
        ```
    """
    if not ChatTemplate.fits(tokenizer):
        return False
    template = ChatTemplate(tokenizer)
    greeting = [Message("user", "Hello!")]
    first = len(template.render(greeting)) - 1
    *token_ids, end = template.render([*greeting, Message("assistant", "Hello! How can I help you?")], reply=False)
    if model.max_seq_len is not None and len(token_ids) > model.max_seq_len:
        return False
    training = model.training
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([token_ids], device=next(model.parameters()).device))
    model.train(training)
    chances = logits[0, first:, : tokenizer.vocab_size].float().softmax(dim=-1)
    return bool(chances[:, end].max() > 2 / tokenizer.vocab_size)
