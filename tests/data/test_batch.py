import torch

from tinygpt.data import IGNORE_INDEX, Batch


def test_targets_are_the_next_tokens_and_padding_is_not_trained_on() -> None:
    rows = torch.tensor([[9, 1, 2, 3], [9, 4, IGNORE_INDEX, IGNORE_INDEX]], dtype=torch.int32)
    batch = Batch.from_rows(rows, bos_token_id=9)
    assert batch.inputs.tolist() == [[9, 1, 2], [9, 4, 9]]
    assert batch.targets.tolist() == [[1, 2, 3], [4, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous()
    assert batch.targets.is_contiguous()


def test_to_moves_both_tensors() -> None:
    batch = Batch.from_rows(torch.zeros(2, 3, dtype=torch.int32), bos_token_id=0).to("meta", non_blocking=True)
    assert isinstance(batch, Batch)
    assert batch.inputs.device.type == batch.targets.device.type == "meta"
