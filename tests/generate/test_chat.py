import torch

from chat_model import chat_model
from tinygpt import GPT, GPTConfig
from tinygpt.data import BatchLoader, IterableDocuments
from tinygpt.generate import is_chat_tuned
from tinygpt.losses import next_token_loss
from tinygpt.tokenizer import ByteTokenizer


def test_a_model_that_learned_conversations_is_known_and_its_mode_left() -> None:
    model, tokenizer = chat_model()
    model.train()
    assert is_chat_tuned(model, tokenizer)
    assert model.training
    model.eval()


def test_an_untrained_model_and_one_of_plain_text_are_not_taken_for_one() -> None:
    learned, tokenizer = chat_model()
    torch.manual_seed(0)
    model = GPT.from_config(learned.config)  # type: ignore[arg-type]
    assert not is_chat_tuned(model, tokenizer)
    text = ["A whale is a mammal, and a ship is not. "] * 50
    loader = BatchLoader(IterableDocuments(lambda: text), tokenizer, rows=4, seq_len=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _, batch in zip(range(20), loader, strict=False):
        loss = next_token_loss(model, batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not is_chat_tuned(model, tokenizer)


def test_without_marks_or_room_for_a_greeting_no_model_converses() -> None:
    config = GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=320, max_seq_len=8)
    assert not is_chat_tuned(GPT.from_config(config), ByteTokenizer())
    assert not is_chat_tuned(GPT.from_config(config), chat_model()[1])
