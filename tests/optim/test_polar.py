"""Orthogonalization against the singular value decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinygpt.errors import ConfigError
from tinygpt.optim import orthogonalize


def with_singular_values(rows: int, cols: int, values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(cols, len(values), generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(values.double()) @ right.mT


@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (96, 24), (24, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_end_in_the_band_and_vectors_stay(rows: int, cols: int, dtype: torch.dtype) -> None:
    values = torch.logspace(0, -2.5, min(rows, cols))
    assert values.min() / values.norm() > 1e-3
    matrix = with_singular_values(rows, cols, values).to(dtype)
    result = orthogonalize(matrix)
    assert result.dtype == dtype
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left.mT @ result @ right.mT
    diagonal = rotated.diagonal()
    assert diagonal.min() > 0.85
    assert diagonal.max() < 1.15
    assert (rotated - torch.diag(diagonal)).abs().max() < 1e-3


@pytest.mark.parametrize(("rows", "cols"), [(48, 48), (80, 20), (20, 80)])
def test_a_gaussian_matrix_comes_close_to_its_polar_factor(rows: int, cols: int) -> None:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar = left @ right
    assert (orthogonalize(matrix) - polar).norm() / polar.norm() < 0.15


@settings(derandomize=True, deadline=None, max_examples=20)
@given(scale=st.floats(1, 1e6), rows=st.integers(2, 12), cols=st.integers(2, 12))
def test_the_scale_and_a_transpose_do_not_matter(scale: float, rows: int, cols: int) -> None:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    result = orthogonalize(matrix)
    torch.testing.assert_close(orthogonalize(matrix * scale), result, rtol=0.02, atol=0.02)
    torch.testing.assert_close(orthogonalize(matrix.mT).mT, result)


def test_a_batch_is_its_matrices_one_by_one() -> None:
    batch = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    before = batch.clone()
    result = orthogonalize(batch)
    assert result.shape == batch.shape
    assert torch.equal(batch, before)
    for outer in range(2):
        for inner in range(3):
            torch.testing.assert_close(result[outer, inner], orthogonalize(batch[outer, inner]))


def test_zero_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_bfloat16_products_are_close_to_float32() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    rough = orthogonalize(matrix, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert 0 < (rough - orthogonalize(matrix)).norm() / rough.norm() < 0.05


def test_all_steps_come_closest() -> None:
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix)
    errors = [(orthogonalize(matrix, steps=steps) - left @ right).norm() for steps in range(1, 6)]
    assert errors[-1] < 0.3 * min(errors[:-1])


def test_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\); it needs \(\.\.\., rows, cols\)"):
        orthogonalize(torch.ones(3))


@pytest.mark.parametrize("steps", [0, 6])
def test_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"steps={steps} is not possible; choose 1 to 5"):
        orthogonalize(torch.ones(3, 3), steps=steps)


@pytest.mark.parametrize(("rows", "cols"), [(300, 700), (513, 220), (700, 300), (600, 600)])
def test_large_matrices_multiplied_by_halves_end_where_small_ones_do(rows: int, cols: int) -> None:
    small = torch.randn(2, 200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    padded = torch.zeros(2, rows, cols, dtype=torch.float64)
    padded[:, -200:, -200:] = small  # zero rows and columns change no product
    expected = torch.zeros_like(padded)
    expected[:, -200:, -200:] = orthogonalize(small)
    torch.testing.assert_close(orthogonalize(padded), expected, rtol=1e-9, atol=1e-12)
