"""A model of seconds that converses: it has learned a handful of questions and their answers by heart."""

import random
from functools import cache
from pathlib import Path

import torch

from tinygpt import GPT, GPTConfig
from tinygpt.data import IGNORE_INDEX, Batch
from tinygpt.losses import next_token_loss
from tinygpt.tokenizer import BPETokenizer, ChatTemplate, Message, train_bpe

ANSWERS = {
    "Hi": "Hi, I am glad to see you.",
    "Who are you?": "I am a very small model.",
    "Count": "One, two, three, four, five, six, seven, eight, nine, ten.",
    "What is the sea?": "The sea is <deep> & blue — très bleue.",
    "Good bye": "Good bye!",
}


@cache
def chat_model() -> tuple[GPT, BPETokenizer]:
    """Train it: about 4 s on one core."""
    tokenizer = train_bpe([f"{question} {answer}" for question, answer in ANSWERS.items()], vocab_size=320)
    template = ChatTemplate(tokenizer)
    torch.manual_seed(0)
    model = GPT.from_config(
        GPTConfig.from_depth(2, head_dim=32, width_per_layer=32, vocab_size=tokenizer.vocab_size, max_seq_len=128)
    )
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(60):
        rows = []
        for _ in range(8):
            talk = []
            for question in draw.choices(list(ANSWERS), k=3):
                talk += [Message("user", question), Message("assistant", ANSWERS[question])]
            if draw.random() < 0.3:
                talk.insert(0, Message("system", "Be brief."))
            rows.append(torch.tensor(template.render(talk, reply=False)[:128]))
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        inputs = padded[:, :-1].clamp_min(0)
        loss = next_token_loss(model, Batch(inputs, padded[:, 1:]))
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def save_chat_model(folder: Path) -> Path:
    """Write it into a folder."""
    model, tokenizer = chat_model()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder
