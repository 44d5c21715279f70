"""The low-rank solver against the exact SVD, on spectra that fall fast, slowly or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from longctx.lora.lowrank import Sketch, decompose
from longctx.lora.rank_choice import fit_size, rank_for_share
from longctx.lora.tensors import squared_norm


class Matrix:
    """A BlockMatrix in memory; whole: whether dense() may be called."""

    def __init__(self, matrix: torch.Tensor, *, whole: bool = True) -> None:
        self.matrix, self.whole = matrix, whole
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.shape[0], 37):
            yield start, self.matrix[start : start + 37]

    def dense(self) -> torch.Tensor | None:
        return self.matrix if self.whole else None


def with_spectrum(values: torch.Tensor, m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(m, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, len(values), generator=generator))[0]
    return (left * values) @ right.T


SPECTRA = {
    "flat": torch.ones(120),
    "slow": torch.arange(1, 121).float() ** -0.5,
    "steep": torch.logspace(0, -4, 120),
    "low rank and noise": torch.cat([torch.linspace(1, 0.3, 8), torch.full((112,), 0.02)]),
    "exactly low": torch.cat([torch.linspace(1, 0.3, 8), torch.zeros(112)]),
}


@pytest.mark.parametrize("shape", [(300, 120), (120, 300)], ids=["tall", "wide"])
@pytest.mark.parametrize("name", SPECTRA)
def test_residual_within_half_a_percent(name: str, shape: tuple[int, int]) -> None:
    values = SPECTRA[name]
    matrix = with_spectrum(values, *shape)
    found = decompose(Matrix(matrix), 16, Sketch())
    best = float(values[16:].norm())
    left_over = float((matrix - (found.left * found.values) @ found.right.T).norm())
    assert left_over <= 1.005 * best + 2e-6 * float(values.norm())
    assert found.converged
    assert found.total == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert (found.left.shape, found.right.shape) == ((shape[0], 16), (shape[1], 16))
    unit = torch.eye(16)
    if name != "exactly low":
        assert torch.allclose(found.left.T @ found.left, unit, atol=1e-4)
        assert torch.allclose(found.right.T @ found.right, unit, atol=1e-4)


def test_what_does_not_fit_and_does_not_converge_says_so() -> None:
    noise = torch.randn(400, 300, generator=torch.Generator().manual_seed(1))
    strict = Sketch(power_max=1, tolerance=1e-9)
    assert decompose(Matrix(noise, whole=False), 4, strict).converged is False
    assert decompose(Matrix(noise), 4, strict).method == "exact"


def test_nearly_full_rank_is_exact_and_zero_is_zero() -> None:
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    assert decompose(Matrix(matrix), 30, Sketch()).method == "exact"
    nothing = decompose(Matrix(torch.zeros(40, 200)), 4, Sketch())
    assert (nothing.total, float(nothing.left.abs().sum())) == (0.0, 0.0)


def test_share_takes_the_fewest_components() -> None:
    values = SPECTRA["slow"]
    matrix = Matrix(with_spectrum(values, 300, 120))
    kept = values.square().cumsum(0) / values.square().sum()
    for share in (0.3, 0.8):
        want = int((kept < share).sum()) + 1
        assert abs(len(rank_for_share(matrix, share, 120, Sketch()).values) - want) <= 1
    assert len(rank_for_share(matrix, 0.9999, 20, Sketch()).values) == 20


def test_sizes_are_spent_where_they_keep_most() -> None:
    spectra = {"strong": torch.tensor([9.0, 8.0, 7.0, 6.0]), "weak": torch.tensor([1.0, 0.9, 0.8, 0.7])}
    cost = {"strong": 400, "weak": 400}
    ranks = fit_size(spectra, cost, 5 * 400 + 2 * 640)
    assert ranks == {"strong": 4, "weak": 1}
    wide = fit_size(spectra, {"strong": 20_200, "weak": 400}, 2 * 640 + 20_200 + 4 * 400)
    assert wide == {"strong": 1, "weak": 4}


def test_the_norm_of_a_large_difference_of_few_values_is_exact():
    """As two steps of training leave in bfloat16; summed up in float32, this norm is 0.8 % off."""
    difference = torch.full((49152, 576), 3e-6)
    difference[::7] = 1e-6
    exact = 576 * (7022 * float(difference[0, 0]) ** 2 + 42130 * float(difference[1, 0]) ** 2)
    assert squared_norm(difference) == pytest.approx(exact, rel=1e-6)
