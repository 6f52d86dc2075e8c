"""Eqs. (3)–(5) and (9) in Rust: projectors worked by hand, and what they do to gradients; precision: test_routes.py."""

import math
import subprocess
import sys

import numpy as np
import pytest
import reference as paper
import torch
from hypothesis import given
from hypothesis import strategies as st

from igm_rs import _igm_rs as rust

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf
LN2 = math.log(2)
ROUTES = ["eigh", "svd", "polynomial"]


def flat(covariance, tau, route="auto", dtype=None):
    """Return T of Eq. (4), in full, and λ."""
    factor, lambdas, _ = rust.make_projector(covariance, "flat", tau, route=route, dtype=dtype)
    return rust.dense_projector(factor), lambdas


def flat_from_rows(rows, tau, dtype=None, route="auto"):
    """Return T of Eq. (4), in full, and λ, from the rows of Ȳ."""
    factor, lambdas, _ = rust.make_projector_from_rows(rows, "flat", tau, route=route, dtype=dtype)
    return rust.dense_projector(factor), lambdas


def project(gradients, projectors):
    """Project each gradient by one full T."""
    return rust.project_(gradients, [None] * len(gradients), [[(t,)] for t in projectors])


def project_update(weights, before, projectors):
    """Project each weight's change by one full T."""
    nothing = [None] * len(weights)
    return rust.project_update_(weights, before, nothing, nothing, [[(t,)] for t in projectors])


def like(lambdas, expected):
    """Return what is to be expected of λ: all of them, or λ_max and λ_min where the route knows no more."""
    return expected if len(lambdas) == len(expected) else expected[[0, -1]]


def near(actual, expected, factor=1.0):
    """Compare to 1e-12 in float64 and 1e-6 in float32, times a factor whose reason stands where it is given."""
    tolerance = factor * {F64: 1e-12, F32: 1e-6}[actual.dtype]
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=0, atol=tolerance)


def matrix(*rows, dtype=F64, device="cpu"):
    return torch.tensor(rows, dtype=dtype, device=device)


def orthogonal(d, generator=None):
    """Return a random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator))[0]


def with_spectrum(lambdas):
    """Return a covariance with this spectrum in a random basis, symmetric to the bit."""
    q = orthogonal(len(lambdas))
    covariance = q @ torch.diag(torch.as_tensor(lambdas, dtype=F64)) @ q.T
    return (covariance + covariance.T) / 2


def conditioning(covariance):
    """Return λ_max/(λ_max − λ_min): Eq. (4) divides by the spread, so round-off of Ȳ grows by this in T."""
    lambdas = paper.spectrum(covariance)
    return (lambdas[0] / (lambdas[0] - lambdas[-1])).item()


SPECTRA = {
    "generic": [5.0, 3.0, 2.5, 1.0, 0.3, 0.1],
    "one direction": [1.0, 0, 0, 0, 0, 0],
    "rank deficient": [4.0, 2.0, 1.0, 0, 0, 0],
    "ties": [3.0, 3.0, 3.0, 1.0, 1.0, 1.0],
    "clusters": [3.0, 3.0 - 1e-9, 3.0 - 2e-9, 1.0 + 1e-9, 1.0, 1.0],
    "one apart": [2.0, 2.0, 2.0, 2.0, 2.0, 1.0],
    "wide": [1e12, 1e6, 1.0, 1e-6, 1e-12, 0],
    "narrow": [1.001, 1.0008, 1.0006, 1.0004, 1.0002, 1.0],
}


# -- make_projector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_flat_projector_by_hand(device, route):
    # λ = 3 along (1, 1)/√2, λ = 1 along (1, −1)/√2; τ = ln 2 gives Σ = diag(1/2, 1).
    projector, lambdas = flat(matrix([2, 1], [1, 2], device=device), LN2, route=route)
    near(projector, matrix([0.75, -0.25], [-0.25, 0.75]))
    near(lambdas, torch.tensor([3.0, 1.0], dtype=F64))
    assert lambdas.dtype == F64
    diagonal = torch.diag(torch.tensor([2.0, 0.0, 4.0], dtype=F64, device=device))
    factor, lambdas, report = rust.make_projector(covariance=diagonal, kind="flat", strength=LN2, route=route)
    near(rust.dense_projector(factor=factor), torch.diag(torch.tensor([0.5**0.5, 1.0, 0.5], dtype=F64)))
    near(lambdas, like(lambdas, torch.tensor([4.0, 2.0, 0.0], dtype=F64)))
    assert set(report) == {"route", "flops", "error_bound", "trace"}
    assert report["trace"] == pytest.approx(6.0)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("tau", [0.4, 10.0, 1000.0])
@pytest.mark.parametrize("route", ROUTES)
def test_flat_projector_agrees_with_the_reference(device, route, tau, spectrum):
    covariance = with_spectrum(spectrum)
    projector, lambdas = flat(covariance.to(device), tau, route)
    # Σ has slope τ/spread, so an error of Ȳ of one unit in its last place is an error of T of τ · conditioning units.
    near(projector, paper.flat_projector(covariance, tau), max(1.0, 2e-3 * tau * conditioning(covariance)))
    near(lambdas / spectrum[0], like(lambdas, paper.spectrum(covariance)) / spectrum[0])
    assert projector.device.type == device.type


@pytest.mark.parametrize("route", ROUTES)
@given(
    lambdas=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    tau=st.floats(0, 10),
    exponent=st.integers(-140, 140),
)
def test_flat_projector_of_any_spectrum(route, lambdas, tau, exponent):
    lambdas = [value if value > 1e-9 else 0.0 for value in lambdas]
    torch.manual_seed(len(lambdas))
    covariance = with_spectrum(lambdas) * 10.0**exponent
    kept = covariance.clone()
    projector, singular_values = flat(covariance, tau, route)
    assert torch.equal(covariance, kept)
    # the invariants: symmetric to the bit, eigenvalues in [e^−τ, 1]
    assert torch.equal(projector, projector.T)
    eigenvalues = torch.linalg.eigvalsh(projector)
    assert eigenvalues.min() >= math.exp(-tau) - 1e-12
    assert eigenvalues.max() <= 1 + 1e-12
    assert (singular_values.diff() <= 0).all()
    assert (singular_values >= 0).all()
    expected = like(singular_values, torch.tensor(sorted(lambdas, reverse=True), dtype=F64))
    near(singular_values / 10.0**exponent, expected)
    # the reference, where Eq. (4) is well conditioned
    if max(lambdas) > 0 and max(lambdas) - min(lambdas) > 1e-2 * max(lambdas):
        near(projector, paper.flat_projector(covariance, tau), max(1.0, 2e-3 * tau * conditioning(covariance)))


@given(lambdas=st.lists(st.floats(0.1, 1), min_size=2, max_size=10), tau=st.floats(0.01, 10))
def test_routes_agree_in_float32(device, lambdas, tau):
    # A covariance in float32 is what CUDA works with; its T is as good as float32 allows.
    covariance = with_spectrum(sorted([0.0, *lambdas, 2.0])).float()
    expected = paper.flat_projector(covariance, tau)
    for route in ROUTES:
        projector, lambdas_ = flat(covariance.to(device), tau, route)
        assert (projector.dtype, lambdas_.dtype) == (F32, F32)
        assert torch.equal(projector, projector.T)
        # method.md §5: ≤ 2e-6 for τ ≤ 10; a float32 eigendecomposition is off by a few ulp of λ_max, times slope τ.
        near(projector, expected, max(2.0, tau))


@pytest.mark.parametrize(("source", "target"), [(F64, F32), (F64, F64), (F32, F64), (F32, F32)])
def test_dtype_of_the_projector(device, source, target):
    covariance = with_spectrum(SPECTRA["generic"]).to(device, source)
    name = str(target).removeprefix("torch.")
    projector, lambdas = flat(covariance, 0.4, dtype=name)
    assert (projector.dtype, lambdas.dtype) == (target, source)
    assert torch.equal(projector, projector.T)
    expected = paper.flat_projector(covariance.cpu(), 0.4)
    near(projector.to(F32), expected)
    assert flat(covariance, 0.4)[0].dtype == source
    if source == target == F64:
        near(projector, expected)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("tau", [1e-3, 0.4, 0.75, 0.76, 10.0])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150])
def test_float32_projector_of_a_float64_covariance(device, route, tau, spectrum, scale):
    # What float32 weights are projected with: the covariance is kept in float64, T alone is rounded.
    covariance = with_spectrum(spectrum)
    projector, lambdas = flat((scale * covariance).to(device), tau, route, dtype="float32")
    assert projector.dtype == F32
    assert lambdas.dtype == F64
    assert torch.equal(projector, projector.T)
    near(projector, paper.flat_projector(covariance, tau))
    eigenvalues = torch.linalg.eigvalsh(projector.double())
    assert eigenvalues.min() >= math.exp(-tau) - 1e-6
    assert eigenvalues.max() <= 1 + 1e-6
    # A float32 T needs the spectrum no better than float32 has it.
    near((lambdas / scale / spectrum[0]).to(F32), like(lambdas, paper.spectrum(covariance)) / spectrum[0])


@given(d=st.integers(1, 40), rank=st.integers(0, 40), tau=st.floats(0, 1.5), seed=st.integers(0, 99))
def test_float32_projector_of_any_features(device, d, rank, tau, seed):
    torch.manual_seed(seed)
    rows = torch.randn(rank, d, dtype=F64) + 1  # a mean, which makes one direction stand out
    covariance = rows.T @ rows
    expected = paper.flat_projector(covariance, tau)
    found = [flat(covariance.to(device), tau, dtype="float32")[0]]
    if rank < d:
        found.append(flat_from_rows(rows.to(device), tau, dtype="float32")[0])
    for projector in found:
        assert torch.equal(projector, projector.T)
        near(projector, expected)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("tau", [0.4, 3.0])
@pytest.mark.parametrize(("d", "r"), [(255, 300), (256, 300), (257, 260), (301, 40), (301, 257), (301, 300)])
def test_projectors_of_hundreds_of_dimensions(device, d, r, tau, dtype):
    # Products of this size are computed in bands of which the lower half is mirrored.
    rows = torch.randn(r, d, dtype=F64) + 0.5
    covariance = rows.T @ rows
    expected = paper.flat_projector(covariance, tau)
    found = [flat(covariance.to(device), tau, dtype=dtype)[0]]
    if r < d:
        found.append(flat_from_rows(rows.to(device), tau, dtype=dtype)[0])
    for projector in found:
        assert torch.equal(projector, projector.T)
        assert projector.is_contiguous()
        near(projector, expected)


DEGENERATE = {
    "zero": torch.zeros(4, 4, dtype=F64),
    "multiple of I": 7 * torch.eye(4, dtype=F64),
    "one dimension": torch.full((1, 1), 3.0, dtype=F64),
    "one dimension, zero": torch.zeros(1, 1, dtype=F64),
    "within round-off": torch.diag(torch.tensor([1.0, 1 + 2e-16, 1 + 4e-16, 1], dtype=F64)),
    "tiny multiple of I": 1e-300 * torch.eye(4, dtype=F64),
    "huge multiple of I": 1e300 * torch.eye(4, dtype=F64),
}


@pytest.mark.parametrize("covariance", DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("tau", [0.4, 10.0])
def test_flat_spectrum_gives_the_identity_to_the_bit(device, route, covariance, dtype, tau):
    projector, lambdas = flat(covariance.to(device), tau, route, dtype)
    assert torch.equal(projector.cpu(), torch.eye(len(covariance), dtype=getattr(torch, dtype)))
    largest = covariance.abs().max()
    torch.testing.assert_close(lambdas, largest.expand(len(lambdas)), rtol=1e-14, atol=0)


def test_multiple_of_identity_in_a_random_basis_is_still_degenerate(device):
    q = orthogonal(6)
    covariance = 3 * q @ q.T  # I up to round-off
    projector, _ = flat(((covariance + covariance.T) / 2).to(device), 0.4)
    assert torch.equal(projector.cpu(), torch.eye(6, dtype=F64))


@pytest.mark.parametrize("route", ROUTES)
def test_nearly_flat_spectrum_is_not_degenerate(device, route):
    # A spread of 1e-9 is far above d · eps: the top direction is still cut to e^−τ.
    covariance = torch.diag(torch.tensor([1 + 1e-9, 1.0], dtype=F64, device=device))
    projector, _ = flat(covariance, LN2, route)
    torch.testing.assert_close(projector.cpu(), torch.diag(torch.tensor([0.5, 1.0], dtype=F64)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_tau_zero_gives_the_identity_to_the_bit(device, route):
    covariance = with_spectrum(SPECTRA["generic"]).to(device)
    projector, lambdas = flat(covariance, 0.0, route)
    assert torch.equal(projector.cpu(), torch.eye(6, dtype=F64))
    near(lambdas, like(lambdas, torch.tensor(SPECTRA["generic"], dtype=F64)))


@pytest.mark.parametrize("scale", [2.0**-7, 3.0, 1e150, 1e-150, 1e300, 1e-300])
@pytest.mark.parametrize("route", ROUTES)
def test_projector_does_not_depend_on_the_scale(device, route, scale):
    covariance = with_spectrum(SPECTRA["generic"]).to(device)
    projector, _ = flat(covariance, 0.4, route)
    scaled, lambdas = flat(scale * covariance, 0.4, route)
    near(scaled, projector)
    near(lambdas / scale, like(lambdas, torch.tensor(SPECTRA["generic"], dtype=F64)))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["generic", "rank deficient", "ties", "clusters"])
def test_projector_turns_with_the_basis(device, route, name):
    covariance, q = with_spectrum(SPECTRA[name]), orthogonal(6)
    turned = q @ covariance @ q.T
    projector, _ = flat(covariance.to(device), 2.0, route)
    other, _ = flat(((turned + turned.T) / 2).to(device), 2.0, route)
    near(other, q @ projector.cpu() @ q.T)


def test_negative_round_off_counts_as_zero(device):
    rows = torch.randn(2, 40, dtype=F64)
    covariance = rows.T @ rows
    assert torch.linalg.eigvalsh(covariance)[0] < 0  # the case is met
    projector, lambdas = flat(covariance.to(device), 0.4)
    assert lambdas.min() >= 0
    assert torch.linalg.eigvalsh(projector).max() <= 1 + 1e-12
    near(projector, paper.flat_projector(covariance, 0.4))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [(0, 2), (2, 0), (1, 1)], ids=["upper", "lower", "diagonal"])
def test_non_finite_covariance_is_an_arithmetic_error(device, route, dtype, bad, place):
    covariance = torch.eye(3, dtype=dtype, device=device)
    covariance[place] = bad
    with pytest.raises(ArithmeticError, match="covariance"):
        flat(covariance, 0.4, route)


@pytest.mark.parametrize("route", ROUTES)
def test_any_memory_layout_and_no_autograd(device, route):
    covariance = with_spectrum(SPECTRA["generic"]).to(device)
    expected = paper.flat_projector(covariance.cpu(), 0.4)
    whole = covariance.new_zeros(12, 12)
    whole[::2, ::2] = covariance
    for view in (covariance.T, whole[::2, ::2], covariance.clone().requires_grad_()):
        projector, lambdas = flat(view, 0.4, route)
        near(projector, expected)
        assert not projector.requires_grad
        assert not lambdas.requires_grad
    ones = torch.ones(1, 1, dtype=F64, device=device).expand(5, 5)
    near(flat(ones, 0.4, route)[0], paper.flat_projector(ones.cpu(), 0.4))


# -- make_projector_from_rows -----------------------------------------------------------------------------------------


def test_projector_from_rows_by_hand(device):
    projector, lambdas = flat_from_rows(matrix([2, 0], device=device), LN2)
    near(projector, matrix([0.5, 0], [0, 1]))
    near(lambdas, torch.tensor([4.0, 0.0], dtype=F64))
    # Rows (1, 1, 0) and (1, −1, 0) · √2: λ = 4 along (1, −1)/√2, 2 along (1, 1)/√2, 0.
    rows = matrix([1, 1, 0], [2**0.5, -(2**0.5), 0], device=device)
    factor, lambdas, report = rust.make_projector_from_rows(rows=rows, kind="flat", strength=LN2)
    assert set(report) == {"route", "flops", "error_bound", "trace"}
    assert report["trace"] == pytest.approx(6.0)
    projector = rust.dense_projector(factor)
    a, b = (0.5 + 0.5**0.5) / 2, (0.5**0.5 - 0.5) / 2
    near(projector, matrix([a, b, 0], [b, a, 0], [0, 0, 1]))
    near(lambdas, torch.tensor([4.0, 2.0, 0.0], dtype=F64))


@given(d=st.integers(2, 24), share=st.floats(0, 1), tau=st.floats(0, 10), exponent=st.integers(-70, 70))
def test_gram_route_agrees_with_eigh_and_the_reference(device, d, share, tau, exponent):
    r = int(share * (d - 1))
    torch.manual_seed(100 * d + r)
    unit = torch.randn(r, d, dtype=F64)
    rows = unit * 10.0**exponent
    kept = rows.clone()
    projector, lambdas = flat_from_rows(rows.to(device), tau)
    assert torch.equal(rows, kept)
    assert torch.equal(projector, projector.T)
    near(projector, paper.flat_projector(unit.T @ unit, tau), max(1.0, tau))
    near(projector, flat((rows.T @ rows).to(device), tau)[0], max(1.0, tau))
    assert lambdas.shape == (d,)
    assert (lambdas.diff() <= 0).all()
    assert (lambdas[r:] == 0).all()
    near(lambdas.cpu() / 10.0 ** (2 * exponent) / d, paper.spectrum(unit.T @ unit) / d, 4.0)


def test_gram_route_in_float32(device):
    rows = torch.randn(9, 30)
    projector, lambdas = flat_from_rows(rows.to(device), 0.4)
    assert (projector.dtype, lambdas.dtype) == (F32, F32)
    expected = paper.flat_projector(rows.double().T @ rows.double(), 0.4)
    near(projector, expected)
    assert flat_from_rows(rows.to(device), 0.4, dtype="float64")[0].dtype == F64
    single, lambdas = flat_from_rows(rows.double().to(device), 0.4, dtype="float32")
    assert single.dtype == F32
    assert lambdas.dtype == F64
    near(single, expected)


def test_gram_route_without_rows_and_with_empty_ones(device):
    eye = torch.eye(3, dtype=F64)
    for rows in (torch.zeros(0, 3, dtype=F64), torch.zeros(1, 3, dtype=F64), torch.zeros(2, 3, dtype=F64)):
        projector, lambdas = flat_from_rows(rows.to(device), 0.4)
        assert torch.equal(projector.cpu(), eye)
        assert torch.equal(lambdas.cpu(), torch.zeros(3, dtype=F64))
    projector, lambdas = flat_from_rows(matrix([1, 2, 3], device=device), 0.0)
    assert torch.equal(projector.cpu(), eye)
    near(lambdas, torch.tensor([14.0, 0, 0], dtype=F64), 14.0)


DEPENDENT = {
    "same row twice": [[1.0, 2, 3, 4], [1, 2, 3, 4]],
    "multiples and zero": [[1.0, 2, 3, 4], [0, 0, 0, 0], [-2, -4, -6, -8]],
    "nearly the same": [[1.0, 2, 3, 4], [1, 2, 3, 4 + 1e-9]],
    "very small beside large": [[1e8, 0, 0, 1e8], [1e-8, 1e-8, 0, 0]],
    "equal lengths at right angles": [[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, -1]],
}


@pytest.mark.parametrize("rows", DEPENDENT.values(), ids=DEPENDENT.keys())
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("tau", [0.4, 2.0])
def test_gram_route_with_dependent_rows(device, rows, dtype, tau):
    rows = matrix(*rows)
    projector, _ = flat_from_rows(rows.to(device), tau, dtype)
    near(projector, paper.flat_projector(rows.T @ rows, tau))
    assert torch.equal(projector, projector.T)


def test_gram_route_of_any_memory_layout(device):
    rows = torch.randn(3, 8, dtype=F64, device=device)
    whole = rows.new_zeros(6, 16)
    whole[::2, ::2] = rows
    for view in (rows.T.contiguous().T, whole[::2, ::2], rows[:1].expand(3, -1), rows.clone().requires_grad_()):
        projector, _ = flat_from_rows(view, 0.4)
        near(projector, paper.flat_projector((view.T @ view).detach().cpu(), 0.4))
        assert not projector.requires_grad


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gram_route_of_non_finite_rows_is_an_arithmetic_error(device, bad):
    with pytest.raises(ArithmeticError, match="rows"):
        flat_from_rows(matrix([1, bad, 3], device=device), 0.4)


# -- orthogonal_projector_ --------------------------------------------------------------------------------------------


def test_orthogonal_projector_by_hand(device):
    # r = (1, 0), α = 1: k = r, P = I − k kᵀ/2. Then r = (2, 2), α = 1/2: k = (1, 2), rᵀk = 6.
    projector = torch.eye(2, dtype=F64, device=device)
    place = projector.data_ptr()
    assert rust.orthogonal_projector_(projector, matrix([1, 0], device=device), [1.0]) is None
    near(projector, matrix([0.5, 0], [0, 1]))
    rust.orthogonal_projector_(projector=projector, rows=matrix([2, 2], device=device), alphas=[0.5])
    near(projector, matrix([0.5 - 1 / 6.5, -2 / 6.5], [-2 / 6.5, 1 - 4 / 6.5]))
    assert projector.data_ptr() == place
    projector = torch.eye(2, dtype=F64, device=device)
    rust.orthogonal_projector_(projector, matrix([1, 0], device=device), [1.0], normalise=True)
    near(projector, matrix([0.5, 0], [0, 1]) / math.sqrt(1.25))


@pytest.mark.parametrize("normalise", [False, True])
@given(d=st.integers(1, 12), n=st.integers(0, 8), alpha=st.floats(0.01, 1))
def test_orthogonal_projector_agrees_with_the_reference(device, normalise, d, n, alpha):
    torch.manual_seed(20 * d + n)
    rows = torch.randn(n, d, dtype=F64)
    alphas = [alpha ** (1 + t / max(n, 1)) for t in range(n)]
    projector = torch.eye(d, dtype=F64, device=device)
    rust.orthogonal_projector_(projector, rows.to(device), alphas, normalise)
    near(projector, paper.orthogonal_projector(torch.eye(d), rows, alphas, normalise), 10.0)  # n rounds of round-off
    if not normalise:  # what the recursion is: the inverse of I + Σ r rᵀ/α
        inverse = torch.eye(d, dtype=F64) + sum(torch.outer(r, r) / a for r, a in zip(rows, alphas, strict=True))
        near(projector, torch.linalg.inv(inverse), 10.0)


def test_orthogonal_projector_of_any_memory_layout_and_nothing(device):
    rows = torch.randn(4, 3, dtype=F64, device=device)
    expected = paper.orthogonal_projector(torch.eye(3), rows.cpu(), [0.1] * 4)
    whole = rows.new_zeros(6, 6)
    for projector in (torch.eye(3, dtype=F64, device=device).T, whole[::2, ::2]):
        projector.copy_(torch.eye(3))
        rust.orthogonal_projector_(projector, rows.T.contiguous().T, [0.1] * 4)
        near(projector, expected)
        rust.orthogonal_projector_(projector, rows[:0], [])
        near(projector, expected)
    single = torch.eye(3, device=device)
    rust.orthogonal_projector_(single, rows, [0.1] * 4)
    assert single.dtype == F32
    near(single, expected, 4.0)  # four updates, each rounded


# -- project_ and project_update_ -------------------------------------------------------------------------------------


def statistics(before, after):
    """Return ‖G‖, ‖G T‖ and their cosine, 1 where there is nothing to compare."""
    before, after = before.double().cpu(), after.double().cpu()
    norms = before.norm().item(), after.norm().item()
    return [*norms, (before * after).sum().item() / (norms[0] * norms[1]) if all(norms) else 1.0]


def test_project_by_hand(device):
    gradient = matrix([1, 2], [0, 3], device=device)
    place = gradient.data_ptr()
    stats = project([gradient], [matrix([1, 10], [100, 1000], device=device)])
    assert gradient.tolist() == [[201, 2010], [300, 3000]]
    assert gradient.data_ptr() == place
    assert stats.shape == (1, 3)
    gradient = matrix([3, 4], device=device)
    stats = rust.project_(gradients=[gradient], biases=[None], factors=[[(matrix([1, 0], [0, 0], device=device),)]])
    near(stats, matrix([5, 3, 0.6]))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@given(shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4))
def test_project_agrees_with_the_reference(device, dtype, shapes):
    gradients = [torch.randn(shape).to(device, dtype) for shape in shapes]
    half = dtype in (F16, BF16)
    projectors = [with_spectrum(torch.rand(d).double() + 0.1).to(device, F32 if half else dtype) for _, d in shapes]
    kept = [[t.clone() for t in tensors] for tensors in (gradients, projectors)]
    places = [g.data_ptr() for g in gradients]
    stats = project(gradients, projectors)
    assert stats.dtype == (F64 if device.type == "cpu" else F32)
    assert stats.device.type == device.type
    assert [g.data_ptr() for g in gradients] == places
    for gradient, projector, before, untouched, row in zip(gradients, projectors, *kept, stats, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(projector, untouched)
        exact = before.double() @ projector.double()
        if half:  # computed in float32 and rounded once
            torch.testing.assert_close(gradient, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            torch.testing.assert_close(row.double().cpu(), torch.tensor(statistics(before, exact), dtype=F64),
                                       rtol=2 * torch.finfo(dtype).eps, atol=1e-6)  # fmt: skip
        else:
            near(gradient, exact, max(1.0, exact.abs().max().item()))
            near(row.to(dtype), torch.tensor(statistics(before, exact), dtype=F64), max(1.0, before.norm().item()))


def test_identity_changes_nothing_to_the_bit(device):
    gradients = [torch.randn(4, 6, device=device), torch.randn(2, 3, device=device)]
    kept = [g.clone() for g in gradients]
    stats = project(gradients, [torch.eye(6, device=device), torch.eye(3, device=device)])
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
    near(stats[:, 0].cpu(), stats[:, 1].cpu())
    torch.testing.assert_close(stats[:, 2].double().cpu(), torch.ones(2, dtype=F64), rtol=0, atol=1e-6)


def test_projection_shrinks_and_keeps_the_acute_angle(device):
    gradient = torch.randn(8, 6, dtype=F64, device=device)
    projector, _ = flat(with_spectrum(SPECTRA["generic"]).to(device), 3.0)
    (norm_before, norm_after, cosine) = project([gradient], [projector])[0].tolist()
    assert math.exp(-3.0) * norm_before <= norm_after <= norm_before
    assert 0 < cosine <= 1


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_cosine_of_nothing_is_one(device, fill):
    gradient = torch.full((2, 3), fill, dtype=F64, device=device)
    stats = project([gradient], [torch.zeros(3, 3, dtype=F64, device=device)])
    near(stats, matrix([fill * 6**0.5, 0, 1]))


def test_project_of_any_memory_layout(device):
    projector = torch.randn(3, 3, dtype=F64, device=device)
    values = torch.randn(4, 3, dtype=F64, device=device)
    whole = values.new_zeros(8, 6)
    for gradient in (values.T.contiguous().T, whole[::2, ::2]):
        gradient.copy_(values)
        strides, place = gradient.stride(), gradient.data_ptr()
        project([gradient], [projector.T])
        near(gradient, values @ projector.T, 10.0)
        assert (gradient.stride(), gradient.data_ptr()) == (strides, place)
    assert whole[1::2].count_nonzero() == 0


@pytest.mark.parametrize(("gradient", "projector"), [(F32, F64), (F64, F32)])
def test_gradient_and_projector_of_two_dtypes_meet_in_the_wider(device, gradient, projector):
    values, t = torch.randn(3, 4, device=device).to(gradient), torch.randn(4, 4, device=device).to(projector)
    exact = values.double() @ t.double()
    project([values], [t])
    assert values.dtype == gradient
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=4 * torch.finfo(gradient).eps * exact.abs().max())


def test_nothing_to_project(device):
    assert rust.project_([], [], []).shape == (0, 3)
    assert rust.project_update_([], [], [], [], []).shape == (0, 3)


def test_project_update_by_hand(device):
    weight, before = matrix([2, 5], device=device), matrix([1, 3], device=device)
    place = weight.data_ptr()
    stats = project_update([weight], [before], [matrix([1, 0], [0, 0.5], device=device)])
    assert weight.tolist() == [[2, 4]]
    assert before.tolist() == [[1, 3]]
    assert weight.data_ptr() == place
    near(stats, matrix([5**0.5, 2**0.5, 3 / 10**0.5]))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@given(shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3))
def test_project_update_agrees_with_the_reference(device, dtype, shapes):
    befores = [torch.randn(shape).to(device, dtype) for shape in shapes]
    weights = [(b + 0.1 * torch.randn(b.shape, device=device)).to(dtype) for b in befores]
    half = dtype in (F16, BF16)
    projectors = [with_spectrum(torch.rand(d).double() + 0.1).to(device, F32 if half else dtype) for _, d in shapes]
    moved, kept = [w.clone() for w in weights], [b.clone() for b in befores]
    stats = project_update(weights, befores, projectors)
    assert stats.dtype == (F64 if device.type == "cpu" else F32)
    for weight, before, after, projector, same, row in zip(
        weights, befores, moved, projectors, kept, stats, strict=True
    ):
        assert torch.equal(before, same)
        update = after.double() - before.double()
        exact = before.double() + update @ projector.double()
        if half:
            torch.testing.assert_close(weight, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        else:
            near(weight, exact, max(1.0, exact.abs().max().item()))
            torch.testing.assert_close(
                row.double().cpu(), torch.tensor(statistics(update, exact - before.double()), dtype=F64),
                rtol=0, atol=1e-5 if dtype == F32 else 1e-10,
            )  # fmt: skip


# -- factors, biases, groups ------------------------------------------------------------------------------------------


def test_factored_projector_by_hand(device):
    # T = 2 (I − Rᵀ M R) with R = (1, 0, 1), M = 1/4; and with M = I, R = (0, 1, 0).
    one = torch.ones(1, 1, dtype=F64, device=device)
    factor = (matrix([1, 0, 1], device=device), one / 4, 2.0)
    near(rust.dense_projector(factor), matrix([1.5, 0, -0.5], [0, 2, 0], [-0.5, 0, 1.5]))
    gradient = matrix([1, 2, 3], device=device)
    stats = rust.project_([gradient], [None], [[factor]])
    near(gradient, matrix([0, 4, 4]))
    near(stats, matrix(statistics(matrix([1, 2, 3]), matrix([0, 4, 4]))))
    near(rust.dense_projector((matrix([0, 1, 0], device=device), one, 1.0)), torch.diag(matrix(1, 0, 1)))
    weight, before = matrix([1, 2, 3], device=device), matrix([0, 0, 0], device=device)
    rust.project_update_([weight], [before], [None], [None], [[factor]])
    near(weight, matrix([0, 4, 4]))


def test_factor_without_rows_is_a_multiple_of_the_identity(device):
    factor = (torch.zeros(0, 3, dtype=F64, device=device), torch.zeros(0, 0, dtype=F64, device=device), 0.5)
    near(rust.dense_projector(factor), 0.5 * torch.eye(3, dtype=F64))
    gradient = matrix([1, 2, 3], device=device)
    rust.project_([gradient], [None], [[factor]])
    near(gradient, matrix([0.5, 1, 1.5]))


def test_factors_of_a_layer_act_one_after_the_other(device):
    gradient, first, second = matrix([1, 1], device=device), matrix([1, 2], [0, 1]), matrix([1, 0], [3, 1])
    stats = rust.project_([gradient], [None], [[(first.to(device),), (second.to(device),)]])
    near(gradient, matrix([10, 3]))  # (1, 1) → (1, 3) → (10, 3)
    near(stats, matrix(statistics(matrix([1, 1]), matrix([10, 3]))), 10.0)


def test_bias_is_a_further_column(device):
    swap = matrix([0, 0, 1], [0, 1, 0], [1, 0, 0], device=device)
    gradient, bias = matrix([1, 2], [4, 5], device=device), matrix(3, 6, device=device)
    stats = rust.project_([gradient], [bias], [[(swap,)]])
    assert gradient.tolist() == [[3, 2], [6, 5]]
    assert bias.tolist() == [1, 4]
    near(stats, matrix(statistics(matrix([1, 2, 3], [4, 5, 6]), matrix([3, 2, 1], [6, 5, 4]))))
    weight, before = matrix([1, 2], device=device), matrix([1, 1], device=device)
    bias, bias_before = matrix(7, device=device), matrix(4, device=device)
    stats = rust.project_update_(
        weights=[weight], before=[before], biases=[bias], biases_before=[bias_before], factors=[[(swap,)]]
    )
    assert (weight.tolist(), bias.tolist()) == ([[4, 2]], [4])  # (0, 1 | 3) → (3, 1 | 0)
    assert (before.tolist(), bias_before.tolist()) == ([[1, 1]], [4])


def test_each_group_has_its_own_projector(device):
    gradient, bias = matrix([[1, 2]], [[3, 4]], device=device), matrix([5], [6], device=device)
    both = torch.stack([matrix([0, 1], [1, 0]), matrix([2, 0], [0, 3])]).to(device)
    stats = rust.project_([gradient], [None], [[(both,)]])
    assert gradient.tolist() == [[[2, 1]], [[6, 12]]]
    near(stats, matrix(statistics(matrix(1, 2, 3, 4), matrix(2, 1, 6, 12))))
    wide = torch.stack([torch.eye(3), 2 * torch.eye(3)]).to(device, F64)
    rust.project_([gradient], [bias], [[(wide,)]])
    assert gradient.tolist() == [[[2, 1]], [[12, 24]]]
    assert bias.tolist() == [[5], [12]]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@given(
    layers=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9), st.booleans(), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    )
)
def test_any_mix_of_layers_agrees_with_their_full_projectors(device, dtype, layers):
    # (groups, out, d, bias?, factors): gradients, updates and statistics against float64 products.
    half = dtype in (F16, BF16)
    working = F32 if half else dtype
    gradients, biases, factors, full = [], [], [], []
    for groups, out, d, with_bias, count in layers:
        shape, width = ((out,) if groups == 1 else (groups, out)), d + with_bias
        gradients.append(torch.randn(*shape, d, device=device).to(dtype))
        biases.append(torch.randn(shape, device=device).to(dtype) if with_bias else None)
        mine, product = [], torch.eye(width, dtype=F64)
        for i in range(count):
            if groups == 1 and i % 2 == 0:
                rows, core = torch.randn(width // 2, width), torch.randn(width // 2, width // 2)
                rows, core = (rows / width).to(device, working), (core + core.T).to(device, working)
                mine.append((rows, core, 0.75))
            else:
                mine.append((torch.randn(*[groups] * (groups > 1), width, width).to(device, working) / width,))
            product = product @ rust.dense_projector(mine[-1]).double().cpu()
        factors.append(mine)
        full.append(product)
    before = [g.clone() for g in gradients], [None if b is None else b.clone() for b in biases]
    stats = rust.project_(gradients, biases, factors)
    assert stats.shape == (len(layers), 3)
    moved = [torch.zeros_like(g) for g in before[0]]
    start = [None if b is None else torch.zeros_like(b) for b in before[1]]
    weights = [g.clone() for g in before[0]]
    updated = [None if b is None else b.clone() for b in before[1]]
    rust.project_update_(weights, moved, updated, start, factors)
    tolerance = {F64: 1e-12, F32: 2e-6, F16: 2e-3, BF16: 2e-2}[dtype]
    for i, product in enumerate(full):
        whole = before[0][i].double().cpu()
        new = gradients[i].double().cpu()
        after = weights[i].double().cpu()
        if biases[i] is not None:
            whole = torch.cat([whole, before[1][i].double().cpu()[..., None]], dim=-1)
            new = torch.cat([new, biases[i].double().cpu()[..., None]], dim=-1)
            after = torch.cat([after, updated[i].double().cpu()[..., None]], dim=-1)
        exact = whole @ product
        size = max(1.0, whole.norm().item() * torch.linalg.matrix_norm(product).max().item())
        torch.testing.assert_close(new, exact, rtol=0, atol=tolerance * size)
        torch.testing.assert_close(after, exact, rtol=0, atol=tolerance * size)
        expected = torch.tensor(statistics(whole, exact), dtype=F64)
        scale = torch.tensor([size, size, 1.0 if expected[1] > 1e-3 else 1e3])
        assert ((stats[i].double().cpu() - expected).abs() <= 4 * tolerance * scale).all()
        assert gradients[i].dtype == dtype


def test_projected_views_leave_the_rest_of_their_tensor_alone(device):
    # q and v of a packed in_proj_weight, and a bias's middle third.
    packed = torch.randn(6, 2, dtype=F64, device=device)
    bias = torch.randn(6, dtype=F64, device=device)
    kept, kept_bias = packed.clone(), bias.clone()
    twice, thrice = (n * torch.eye(2, dtype=F64, device=device) for n in (2, 3))
    rust.project_([packed[:2], packed[4:]], [None, None], [[(twice,)], [(thrice,)]])
    assert torch.equal(packed, torch.cat([2 * kept[:2], kept[2:4], 3 * kept[4:]]))
    rust.project_([packed[2:4]], [bias[2:4]], [[(4 * torch.eye(3, dtype=F64, device=device),)]])
    assert torch.equal(bias, torch.cat([kept_bias[:2], 4 * kept_bias[2:4], kept_bias[4:]]))
    transposed = torch.randn(2, 5, dtype=F64, device=device)  # transformers' Conv1D
    kept = transposed.clone()
    swap = matrix([0, 1], [1, 0], device=device)
    rust.project_([transposed.T], [None], [[(swap,)]])
    assert torch.equal(transposed, kept.flip(0))
    rust.project_update_([transposed.T], [torch.zeros_like(transposed).T], [None], [None], [[(swap,)]])
    assert torch.equal(transposed, kept)


def test_dense_projector_of_groups(device):
    both = torch.randn(2, 3, 3, dtype=F64, device=device)
    assert torch.equal(rust.dense_projector((both,)), both)


# -- the other kinds --------------------------------------------------------------------------------------------------


def made(covariance, kind, strength, **options):
    """Return T in full and λ."""
    factor, lambdas, _ = rust.make_projector(covariance, kind, strength, **options)
    return rust.dense_projector(factor), lambdas


def made_from_rows(rows, kind, strength, **options):
    """Return T in full and λ."""
    factor, lambdas, _ = rust.make_projector_from_rows(rows, kind, strength, **options)
    return rust.dense_projector(factor), lambdas


def test_ridge_by_hand(device):
    # mean λ = 2 and α = 2: 1/(1 + 3), 1/(1 + 1); from a row, λ = 3, 0, 0 with mean 1.
    near(made(matrix([3, 0], [0, 1], device=device), "ridge", 2.0)[0], matrix([0.25, 0], [0, 0.5]))
    row = matrix([0, 3**0.5, 0], device=device)
    near(made_from_rows(row, "ridge", 2.0)[0], torch.diag(matrix(1, 1 / 7, 1)))


@pytest.mark.parametrize("route", ["svd", "eigh"])
@pytest.mark.parametrize("a", [1.0, 2.0])
def test_null_space_does_not_part_equal_eigenvalues(device, route, a):
    # I + 1 1ᵀ has λ = 7, 1, …, 1: rounding must not say which of the equal ones are of the null space.
    covariance = torch.eye(6, dtype=F64, device=device) + torch.ones(6, 6, dtype=F64, device=device)
    top = torch.ones(6, 6, dtype=F64) / 6
    expected = (torch.eye(6, dtype=F64) - top) / 5**0.5
    near(made(covariance, "null_space", a, route=route)[0], expected)
    doubled = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=F64, device=device))
    kept = [0.0, 0.0, 1.0] if a == 1 else [3**-0.5] * 3
    near(made(doubled, "null_space", a, route=route)[0], torch.diag(torch.tensor(kept, dtype=F64)))


def test_null_space_by_hand(device):
    diagonal = torch.diag(matrix(4, 1, 2)).to(device)
    near(made(diagonal, "null_space", 2.0)[0], torch.diag(matrix(0, 1, 1)) / 2**0.5)
    near(made(diagonal, "null_space", 1.0)[0], torch.diag(matrix(0, 1, 0)))
    rounding = torch.diag(matrix(4, 1e-17, 1e-3, 0)).to(device)
    near(made(rounding, "null_space", 10.0)[0], torch.diag(matrix(0, 1, 0, 1)) / 2**0.5)
    rows = matrix([0, 2, 0], [0, 0, 1e-3], device=device)
    near(made_from_rows(rows, "null_space", 10.0)[0], torch.diag(matrix(1, 0, 0)))


def test_controls_by_hand(device):
    covariance, swapped = matrix([2, 0], [0, 1], device=device), matrix([0, 3], [5, 0], device=device)
    near(made(covariance, "flat", LN2, noise=swapped)[0], matrix([1, 0], [0, 0.5]))
    near(made(covariance, "flat", LN2, scalar=True)[0], 0.75 * torch.eye(2, dtype=F64))
    near(made(covariance, "ridge", 1.5, noise=swapped)[0], matrix([0.5, 0], [0, 1 / 3]))
    row = matrix([2, 0], device=device)
    near(made_from_rows(row, "flat", LN2, noise=swapped)[0], matrix([1, 0], [0, 0.5]))
    near(made_from_rows(row, "flat", LN2, scalar=True)[0], 0.75 * torch.eye(2, dtype=F64))


# -- singular_values --------------------------------------------------------------------------------------------------


def test_singular_values_by_hand(device):
    values = rust.singular_values(matrix([2, 1], [1, 2], device=device))
    assert isinstance(values, np.ndarray)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, [3, 1], rtol=0, atol=1e-14)
    np.testing.assert_allclose(rust.singular_values(matrix=matrix([3, 4, 0], device=device), rows=True), [25, 0, 0])


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@given(n=st.integers(0, 9), d=st.integers(1, 9))
def test_singular_values_agree_with_the_reference(device, dtype, n, d):
    torch.manual_seed(10 * n + d)
    rows = torch.randn(n, d, dtype=F64).to(dtype)
    covariance = rows.double().T @ rows.double()
    expected = paper.spectrum(covariance).numpy()
    size = max(1.0, expected[0])
    for matrix_, by_rows in ((rows, True), (covariance.to(dtype), False)):
        values = rust.singular_values(matrix_.to(device), rows=by_rows)
        assert values.shape == (d,)
        assert (np.diff(values) <= 0).all()
        assert (values >= 0).all()
        np.testing.assert_allclose(values, expected, rtol=0, atol=size * (1e-12 if dtype == F64 else 1e-6))


def test_singular_values_of_any_memory_layout(device):
    covariance = with_spectrum(SPECTRA["generic"]).to(device)
    whole = covariance.new_zeros(12, 12)
    whole[::2, ::2] = covariance
    for view in (covariance.T, whole[::2, ::2], covariance.clone().requires_grad_()):
        np.testing.assert_allclose(rust.singular_values(view), SPECTRA["generic"], rtol=0, atol=1e-12)


# -- errors -----------------------------------------------------------------------------------------------------------

C = torch.eye(2, dtype=F64)
R = torch.ones(1, 2, dtype=F64)
G, H = torch.ones(3, 2, dtype=F64), torch.ones(3, 2, dtype=F64)
WIDE, UNEVEN = torch.eye(5, dtype=F64), matrix([2, 0], [0, 1])

ERRORS = [
    (lambda: flat(G, 0.4), ValueError, ["covariance", "(3, 2)"]),
    (lambda: rust.make_projector(torch.ones(4, dtype=F64), "flat", 0.4), ValueError, ["covariance", "(4,)"]),
    (lambda: rust.make_projector(torch.ones(2, 3, 4, dtype=F64), "flat", 0.4), ValueError, ["covariance", "(2, 3, 4)"]),
    (
        lambda: rust.make_projector(torch.ones(1, 1, 4, 4, dtype=F64), "flat", 0.4),
        ValueError,
        ["covariance", "(1, 1, 4, 4)"],
    ),
    (lambda: flat(C.long(), 0.4), ValueError, ["covariance", "int64"]),
    (lambda: flat(C.half(), 0.4), ValueError, ["covariance", "float16"]),
    (lambda: flat(C.to(torch.complex128), 0.4), ValueError, ["covariance", "complex"]),
    (lambda: flat(C, -0.5), ValueError, ["strength", "-0.5"]),
    (lambda: flat(C, NAN), ValueError, ["strength", "NaN"]),
    (lambda: flat(C, INF), ValueError, ["strength", "inf"]),
    (lambda: rust.make_projector(C, "ridge", 0.0), ValueError, ["strength", "0"]),
    (lambda: rust.make_projector(C, "null_space", 0.5), ValueError, ["strength", "0.5"]),
    (lambda: rust.make_projector(C, "steep", 0.5), ValueError, ["kind", "steep", "flat", "ridge", "null_space"]),
    (lambda: flat(C, 0.4, "lanczos"), ValueError, ["route", "lanczos", "eigh", "svd", "polynomial"]),
    (lambda: flat(C, 0.4, dtype="float8"), ValueError, ["dtype", "float8", "float32", "float64"]),
    (lambda: flat(C.numpy(), 0.4), TypeError, ["covariance", "ndarray"]),
    (lambda: rust.make_projector(UNEVEN, "flat", 0.4, noise=WIDE), ValueError, ["noise", "(5, 5)", "(2, 2)"]),
    (lambda: rust.make_projector(C, "flat", 0.4, noise=C, scalar=True), ValueError, ["noise", "scalar"]),
    (lambda: rust.make_projector(matrix([1, 2], [0, 1]), "flat", 0.4), ValueError, ["covariance", "transpose"]),
    (lambda: flat_from_rows(G, 0.4), ValueError, ["rows", "3", "make_projector"]),
    (lambda: flat_from_rows(C, 0.4), ValueError, ["rows", "2", "make_projector"]),
    (lambda: rust.make_projector_from_rows(R[0], "flat", 0.4), ValueError, ["rows", "(2,)"]),
    (lambda: flat_from_rows(R.int(), 0.4), ValueError, ["rows", "int32"]),
    (lambda: flat_from_rows(R, -1.0), ValueError, ["strength", "-1"]),
    (lambda: flat_from_rows(R, 0.4, dtype="int8"), ValueError, ["dtype", "int8"]),
    (lambda: flat_from_rows(R, 0.4, route="svd"), ValueError, ["route", "svd", "eigh", "polynomial"]),
    (lambda: rust.make_projector_from_rows(R, "flat", 0.4, noise=WIDE), ValueError, ["noise", "(5, 5)", "(2, 2)"]),
    (lambda: rust.make_projector_from_rows(None, "flat", 0.4), TypeError, ["rows", "None"]),
    (lambda: rust.dense_projector(()), TypeError, ["factor"]),
    (lambda: rust.dense_projector((R, C, 1.0)), ValueError, ["factor", "(2, 2)"]),
    (lambda: rust.dense_projector(C), TypeError, ["factor"]),
    (lambda: rust.orthogonal_projector_(C, R, []), ValueError, ["alphas", "0", "1"]),
    (lambda: rust.orthogonal_projector_(C, R, [0.0]), ValueError, ["alphas", "0"]),
    (lambda: rust.orthogonal_projector_(C, R, [-0.1]), ValueError, ["alphas", "-0.1"]),
    (lambda: rust.orthogonal_projector_(C, R, [NAN]), ValueError, ["alphas", "NaN"]),
    (lambda: rust.orthogonal_projector_(G, R, [0.1]), ValueError, ["projector", "(3, 2)"]),
    (lambda: rust.orthogonal_projector_(WIDE, R, [0.1]), ValueError, ["rows", "2", "5"]),
    (lambda: rust.orthogonal_projector_(C, NAN * R, [0.1]), ArithmeticError, ["rows"]),
    (lambda: rust.orthogonal_projector_(3, R, [0.1]), TypeError, ["projector", "int"]),
    (lambda: rust.project_([G], [None], []), ValueError, ["factors", "0", "1"]),
    (lambda: rust.project_([G], [], [[(C,)]]), ValueError, ["biases", "0", "1"]),
    (lambda: project([G, H], [C, WIDE]), ValueError, ["[1]", "2", "5"]),
    (lambda: project([G, G.reshape(1, 1, 3, 2)], [C, C]), ValueError, ["gradients[1]", "(1, 1, 3, 2)"]),
    (lambda: project([G, H], [C, G]), ValueError, ["factors[1]", "(3, 2)"]),
    (lambda: project([G, G.long()], [C, C]), ValueError, ["gradients[1]", "int64"]),
    (lambda: project([G, None], [C, C]), TypeError, ["gradients", "None"]),
    (lambda: project(G, [C] * 3), TypeError, ["gradients"]),
    (lambda: rust.project_([G], [None], [(C,)]), TypeError, ["factors"]),
    (lambda: rust.project_([G], [R[0]], [[(torch.eye(3, dtype=F64),)]]), ValueError, ["biases[0]", "(2,)", "(3, 2)"]),
    (
        lambda: rust.project_([G], [G[:, 0].float()], [[(torch.eye(3, dtype=F64),)]]),
        ValueError,
        ["biases[0]", "float32"],
    ),
    (lambda: rust.project_([G], [H[:, 0]], [[(C,)]]), ValueError, ["factors[0]", "2", "3"]),
    (lambda: rust.project_([G], [None], [[(C,), (WIDE,)]]), ValueError, ["factors[0]", "2", "5"]),
    (lambda: rust.project_update_([G], [], [None], [None], [[(C,)]]), ValueError, ["before", "0", "1"]),
    (lambda: project_update([G], [R], [C]), ValueError, ["before[0]", "(1, 2)", "(3, 2)"]),
    (lambda: project_update([G], [G.float()], [C]), ValueError, ["before[0]", "float32"]),
    (lambda: project_update([G, H], [G, H], [C, WIDE]), ValueError, ["[1]", "2", "5"]),
    (lambda: rust.singular_values(G), ValueError, ["matrix", "(3, 2)"]),
    (lambda: rust.singular_values(R[0], rows=True), ValueError, ["matrix", "(2,)"]),
    (lambda: rust.singular_values(C.long()), ValueError, ["matrix", "int64"]),
    (lambda: rust.singular_values(NAN * C), ArithmeticError, ["matrix"]),
    (lambda: rust.singular_values([1.0]), TypeError, ["matrix", "list"]),
]


@pytest.mark.parametrize(("call", "error", "fragments"), ERRORS, ids=[" ".join(row[2]) for row in ERRORS])
def test_errors_name_argument_value_and_what_is_expected_and_change_nothing(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(C, torch.eye(2, dtype=F64))
    assert torch.equal(WIDE, torch.eye(5, dtype=F64))
    assert (G == 1).all()
    assert (R == 1).all()


def test_overlapping_gradients_are_refused_before_anything_changes():
    fine, overlapping, twice = torch.ones(3, 2), torch.ones(1, 2).expand(3, 2), 2 * torch.eye(2)
    with pytest.raises(ValueError, match=r"gradients\[1\]"):
        project([fine, overlapping], [twice, twice])
    with pytest.raises(ValueError, match=r"weights\[1\]"):
        project_update([fine, overlapping], [torch.zeros(3, 2)] * 2, [twice, twice])
    assert (fine == 1).all()
    assert (overlapping == 1).all()


@pytest.mark.cuda
def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="cpu"):
        project([G.cuda()], [C])
    with pytest.raises(ValueError, match="cpu"):
        rust.orthogonal_projector_(C.cuda(), R, [0.1])


# -- autocast, decompositions that fail, rounding among the singular values --------------------------------------------


def products(dtype):
    """Return the result of every function that multiplies matrices, by name."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=generator)

    features, rows = normal(20, 3, 12).to(dtype), normal(20, 12)
    covariance, total = torch.zeros(12, 12, dtype=F64), rows.sum(0)
    found = {reduce: rust.batch_rows(features, reduce) for reduce in ("mean", "samples")}
    rust.accumulate_(covariance, rows)
    found["accumulate_"] = covariance.clone()
    centred = covariance.clone()
    rust.centre_(centred, total, 20)
    found["centre_"] = centred
    for tau in (0.4, 3.0):
        for route in ROUTES:
            found[f"flat_projector {route} {tau}"], found[f"lambdas {route} {tau}"] = flat(
                covariance.to(dtype), tau, route
            )
        found[f"from_rows {tau}"], found[f"lambdas of rows {tau}"] = flat_from_rows(rows[:5].to(dtype), tau)
    projector = found["flat_projector eigh 0.4"]
    found["orthogonal_projector_"] = torch.eye(12, dtype=dtype)
    rust.orthogonal_projector_(found["orthogonal_projector_"], rows.to(dtype), [0.1] * 20)
    found["project_"] = normal(7, 12).to(dtype)
    found["stats"] = project([found["project_"]], [projector])
    before, found["project_update_"] = normal(7, 12).to(dtype), normal(7, 12).to(dtype)
    found["stats of update"] = project_update([found["project_update_"]], [before], [projector])
    factor = rust.make_projector_from_rows(rows[:5].to(dtype), "ridge", 3.0)[0]
    found["factored"] = normal(7, 12).to(dtype)
    found["stats of factored"] = rust.project_([found["factored"]], [None], [[factor, (projector,)]])
    for of_rows, values in ((False, covariance), (True, rows[:5]), (True, rows)):
        found[f"singular_values {len(values)} {of_rows}"] = torch.from_numpy(
            rust.singular_values(values.to(dtype), rows=of_rows)
        )
    return found


@pytest.mark.parametrize("dtype", [F32, F64])
def test_autocast_changes_no_bit_and_stays_on(dtype):
    outside = products(dtype)
    with torch.autocast("cpu", BF16):
        inside = products(dtype)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16
        with pytest.raises(ValueError, match="rows"):
            flat_from_rows(torch.eye(2), 0.4)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == F32
    flat(torch.eye(2), 0.4)
    with torch.autocast("cpu", BF16), torch.autocast("cpu", enabled=False):
        flat(torch.eye(2), 0.4)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == F32
    for name, expected in outside.items():
        assert inside[name].dtype == expected.dtype, name
        assert torch.equal(inside[name], expected), name


def test_the_body_at_the_perturbed_weights_keeps_its_autocast():
    weight, gradient, before = torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2, 2)
    seen = []

    def body(_):
        seen.append(((weight @ weight).dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    with torch.autocast("cpu", BF16):
        rust.at_perturbed([weight], [gradient], [before], rust.gradient_norm([gradient]), [0.1], body)
        assert (weight @ weight).dtype == BF16
    assert seen == [(BF16, True, True)]
    assert torch.equal(weight, torch.ones(2, 2))


FAILING = """
import sys, warnings, torch
from igm_rs import _igm_rs as rust

def fails(*arguments, **options):
    global calls
    calls += 1
    raise RuntimeError(text)

warnings.simplefilter("ignore")
library = torch.library.Library("aten", "IMPL")
for operator in ("_linalg_eigh", "_linalg_svd"):
    library.impl(operator, fails, "CPU")
covariance, rows = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(2, 3)
for text in ("linalg: The algorithm failed to converge (error code: 2)", "out of memory"):
    for name, call in (
        ("covariance", lambda: rust.make_projector(covariance, "flat", 3.0, route="eigh")),
        ("covariance", lambda: rust.make_projector(covariance, "flat", 3.0, route="svd")),
        ("covariance", lambda: rust.make_projector(covariance.double(), "flat", 3.0, route="eigh")),
        ("covariance", lambda: rust.make_projector(torch.stack([covariance] * 2), "ridge", 3.0)),
        ("rows", lambda: rust.make_projector_from_rows(rows, "flat", 0.4, route="eigh")),
        ("matrix", lambda: rust.singular_values(covariance)),
    ):
        calls = 0
        try:
            call()
        except Exception as error:
            print(type(error).__name__, name in str(error), "converge" in str(error), calls)
"""


def test_a_decomposition_that_does_not_converge_is_an_arithmetic_error_and_any_other_failure_is_not():
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    tries = [2, 2, 1, 2, 2, 1]  # float32 is tried again in float64
    expected = [f"ArithmeticError True True {n}" for n in tries] + [f"RuntimeError False False {n}" for n in tries]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize("source", [F32, F64])
def test_rows_of_rank_five_have_five_positive_singular_values(device, source):
    rows = torch.randn(20, 5, dtype=F64) @ torch.randn(5, 64, dtype=F64)
    _, lambdas = flat_from_rows(rows.to(source).to(device), 0.4, dtype="float32")
    assert lambdas.dtype == source
    assert (lambdas[:5] > 0).all()
    assert (lambdas[5:] == 0).all()
    expected = torch.linalg.eigvalsh(rows @ rows.T).flip(0)[:5]
    torch.testing.assert_close(lambdas[:5].double().cpu(), expected, rtol=1e-4, atol=0)
