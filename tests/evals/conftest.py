"""A bundle of a few questions, and a model that learned the answers of some of them."""

from pathlib import Path

import pytest
import torch

from tinygpt import GPT, GPTConfig
from tinygpt.evals import EvalBundle
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, train_bpe

BUNDLE = Path(__file__).parent.parent / "data_files" / "eval_bundle"


@pytest.fixture(scope="session")
def bundle() -> EvalBundle:
    return EvalBundle.open(BUNDLE)


@pytest.fixture(scope="session")
def learned_texts(bundle: EvalBundle) -> list[str]:
    """The first five items of each task with their answers, the wrong one in each third."""
    texts = []
    for task in bundle.tasks:
        for number, (item, _) in enumerate(bundle.items(task)[:5]):
            if task.kind == "multiple_choice":
                wrong = number % 3 == 2
                choice = item["choices"][item["gold"] - wrong]
                texts.append(f"{item['query']}{task.delimiter}{choice}")
            else:
                context = item["context_options"][item["gold"]] if task.kind == "schema" else item["context"].strip()
                texts.append(f"{context}{task.delimiter}{item['continuation']}")
    return texts


@pytest.fixture(scope="session")
def byte_model(learned_texts: list[str]) -> GPT:
    return _train(ByteTokenizer(), learned_texts)


@pytest.fixture(scope="session")
def bpe(learned_texts: list[str]) -> BPETokenizer:
    return train_bpe(learned_texts, vocab_size=330)


@pytest.fixture(scope="session")
def bpe_model(bpe: BPETokenizer, learned_texts: list[str]) -> GPT:
    return _train(bpe, learned_texts)


def _train(tokenizer: ByteTokenizer | BPETokenizer, texts: list[str]) -> GPT:
    torch.manual_seed(0)
    # Every block that can make shared prefixes go wrong: windows, smear, value embeddings, grouped heads.
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        max_seq_len=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        dim=64,
        window_pattern="SL",
        short_window_tokens=24,
        vocab_multiple=1,
    )
    model = GPT.from_config(config)
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in texts]
    tokens = torch.full((len(rows), max(map(len, rows))), -1)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        total, count = model.loss(tokens[:, :-1].clamp_min(0), tokens[:, 1:])
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model
