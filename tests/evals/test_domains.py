import math

import pytest
import torch
from torch import Tensor, nn

from tinygpt import GPT
from tinygpt.data import TextDocuments, ValidationSet
from tinygpt.errors import ConfigError
from tinygpt.evals import evaluate_bpb, evaluate_domains
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, train_bpe

TEXTS = {
    "prose": "the sea was calm and the sea was deep",
    "talk": "hello hello, who is calling me there?",
    "code": "def add(a, b):\n    return a + b  # sum",
    "other": "déjà vu, déjà vu, déjà vu, encore un!!",
}


class OneOf(nn.Module):
    """Knows that a text is one of a list, each as likely: no tokenizer can make it cheaper or dearer."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        super().__init__()
        self.rows = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in texts]
        self.vocab_size = tokenizer.vocab_size
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, token_ids: Tensor) -> Tensor:
        logits = torch.full((*token_ids.shape, self.vocab_size), -30.0)
        for row, tokens in enumerate(token_ids.tolist()):
            for position in range(len(tokens)):
                read = tokens[: position + 1]
                following = [
                    text[position + 1] for text in self.rows if text[: position + 1] == read and text[position + 1 :]
                ]
                for token in set(following):
                    logits[row, position, token] = math.log(following.count(token) / len(following))
        return logits + self.nothing


def sets(tokenizer: Tokenizer) -> dict[str, ValidationSet]:
    return {
        name: ValidationSet.from_source(TextDocuments([text]), tokenizer, rows=1, seq_len=len(tokenizer.encode(text)))
        for name, text in TEXTS.items()
    }


def test_bits_per_byte_agree_across_tokenizers_where_loss_per_token_does_not() -> None:
    tokenizers: list[ByteTokenizer | BPETokenizer] = [ByteTokenizer(), train_bpe(list(TEXTS.values()), vocab_size=300)]
    by_bytes, by_pairs = (evaluate_domains(OneOf(t, list(TEXTS.values())), sets(t), progress=False) for t in tokenizers)
    for name, text in TEXTS.items():
        # One of four texts: two bits, whatever it is cut into.
        expected = 2 / len(text.encode())
        assert by_bytes[name].bpb == pytest.approx(expected, rel=1e-5)
        assert by_pairs[name].bpb == pytest.approx(expected, rel=1e-5)
        assert by_pairs[name].loss > 1.2 * by_bytes[name].loss
    assert by_bytes.bpb == pytest.approx(by_pairs.bpb, rel=1e-5)
    assert by_bytes.bpb == pytest.approx(8 / sum(len(text.encode()) for text in TEXTS.values()), rel=1e-5)


def test_a_domain_is_measured_as_by_itself_and_the_whole_counts_bytes(byte_model: GPT) -> None:
    texts = {"short": ["hello"], "long": ["general text, a little longer"] * 3}
    validation = {
        name: ValidationSet.from_source(TextDocuments(documents), ByteTokenizer(), rows=2, seq_len=32)
        for name, documents in texts.items()
    }
    report = evaluate_domains(byte_model, validation, progress=False)
    assert report.domains == {name: evaluate_bpb(byte_model, one) for name, one in validation.items()}
    together = ValidationSet.from_source(
        TextDocuments([*texts["short"], *texts["long"]]), ByteTokenizer(), rows=1, seq_len=32
    )
    assert sum(one.num_bytes for one in report.domains.values()) == together.num_bytes
    bits = report["short"].bpb * 5 + report["long"].bpb * 87
    assert report.bpb == pytest.approx(bits / 92)
    assert report.mean_bpb == pytest.approx((report["short"].bpb + report["long"].bpb) / 2)


def test_the_table_names_every_domain(byte_model: GPT, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_domains(byte_model, sets(ByteTokenizer()))
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["domain", *TEXTS, "all,", "mean"]
    assert f"{report['code'].bpb:.4f}" in lines[3]
    assert "domains" in capsys.readouterr().err


def test_no_domain_is_refused(byte_model: GPT) -> None:
    with pytest.raises(ConfigError, match="domains is empty"):
        evaluate_domains(byte_model, {})
