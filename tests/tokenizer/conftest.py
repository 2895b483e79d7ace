import pytest

from tinygpt.tokenizer import BPETokenizer, train_bpe

SENTENCES = [
    "the ship sailed over the sea and the whale swam under the ship",
    "In 1851 there were 722 ships; it's said they'd sail 12345 miles.",
    "Größe, naïve café, Жизнь, 鯨は海にいる, 🐋🐋\r\n\ttabs  and   spaces\n\n\nends ",
]


@pytest.fixture(scope="session")
def bpe() -> BPETokenizer:
    return train_bpe(SENTENCES * 2, vocab_size=320)
