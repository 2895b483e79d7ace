from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinygpt import GPT, GPTConfig
from tinygpt.data import Batch
from tinygpt.errors import ConfigError
from tinygpt.losses import next_token_loss


class Bigram(nn.Module):
    """A model that is not ours: logits by table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(7, 7))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table[token_ids]


def masked_batch() -> Batch:
    ids = torch.randint(7, (3, 9))
    targets = ids[:, 1:].clone()
    targets[0] = -1
    return Batch(ids[:, :-1], targets)


@pytest.mark.parametrize("model", [Bigram(), GPT.from_config(GPTConfig.from_depth(1, vocab_size=7, max_seq_len=8))])
def test_sum_and_count_leave_masked_targets_out(model: nn.Module) -> None:
    batch = masked_batch()
    total, count = next_token_loss(model, batch)
    kept = batch.targets != -1
    reference = F.cross_entropy(model(batch.inputs)[kept], batch.targets[kept], reduction="sum")
    torch.testing.assert_close(total, reference)
    assert int(count) == 16


def test_a_fully_masked_batch_adds_nothing() -> None:
    batch = masked_batch()
    total, count = next_token_loss(Bigram(), batch._replace(targets=torch.full_like(batch.targets, -1)))
    assert (float(total.detach()), int(count)) == (0.0, 0)


def test_what_is_no_logits_is_refused_with_what_it_is() -> None:
    class Other(Bigram):
        def __init__(self, part: str) -> None:
            super().__init__()
            self.part = part

        def forward(self, token_ids: torch.Tensor) -> Any:
            logits = super().forward(token_ids)
            return (logits,) if self.part == "tuple" else logits[:, -1]

    for part, found in (("tuple", "a tuple"), ("last", r"\(3, 7\)")):
        with pytest.raises(
            ConfigError, match=rf"Other returned {found}, not logits .* targets \(3, 8\); give a loss_fn"
        ):
            next_token_loss(Other(part), masked_batch())
