"""Every route to T against the oracle's float64 SVD: precision, the bound that is reported, and what may go wrong."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference as paper
import torch
from hypothesis import given
from hypothesis import strategies as st

from igm_rs import _igm_rs as rust

F32, F64 = torch.float32, torch.float64
DATA = Path(__file__).parents[1] / "python" / "igm_rs" / "experiments" / "archives"
TAUS = [1e-3, 0.4, 1.0, 10.0, 100.0]
DENSE = ["svd", "eigh", "polynomial", "auto"]
FROM_ROWS = ["eigh", "polynomial", "auto"]
STRENGTHS = {"flat": TAUS, "ridge": [0.1, 30.0, 1e4], "null_space": [1.0, 9.5]}
NAMES = {F32: "float32", F64: "float64"}


def make(covariance, kind="flat", strength=0.4, **options):
    """Return T in full, λ and the report, of a covariance."""
    factor, lambdas, report = rust.make_projector(covariance, kind, strength, **options)
    return rust.dense_projector(factor).cpu(), lambdas, report


def make_from_rows(rows, kind="flat", strength=0.4, **options):
    """Return T in full, λ and the report, of the rows of a covariance."""
    factor, lambdas, report = rust.make_projector_from_rows(rows, kind, strength, **options)
    assert len(factor) == 3
    return rust.dense_projector(factor).cpu(), lambdas, report


def orthogonal(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator))[0]


def with_spectrum(lambdas, seed=0):
    """Return a covariance with this spectrum in a random basis, symmetric to the bit."""
    lambdas = torch.as_tensor(lambdas, dtype=F64)
    q = orthogonal(len(lambdas), seed)
    covariance = (q * lambdas) @ q.T
    return (covariance + covariance.T) / 2


def standardised(features):
    """Return rows of mean 0 and deviation 1, as the demonstration trains with, plus a constant that stands out."""
    features = torch.as_tensor(np.asarray(features, dtype=np.float64))
    return (features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-12) + 0.5


def mfeat(name, count):
    with np.load(DATA / "mfeat.npz") as archive:
        return standardised(archive[name][:: len(archive[name]) // count][:count])


def watch(window, count):
    """Return windows of the acceleration, (count, 3 · window): neighbours in time are alike, so λ falls steeply."""
    with np.load(DATA / "watch.npz") as archive:
        readings = archive["X"][: window * count, :3].astype(np.float64)
    return standardised(readings.reshape(count, -1))


def spectra(d=24):
    """Return spectra of every shape that has made trouble, or might: the dimension is small, so that all routes run."""
    steps = torch.arange(d, dtype=F64)
    flat = torch.ones(d, dtype=F64)
    top, bottom = flat.clone(), flat.clone()
    top[0], bottom[-1] = 2.0, 0.5
    near_top = torch.cat([1 - 1e-10 * steps[: d // 2], 0.1 * flat[d // 2 :]])
    near_bottom = torch.cat([flat[: d // 2] + steps.flip(0)[: d // 2], 1e-6 + 1e-12 * steps[d // 2 :]])
    return {
        "harmonic": 1 / (1 + steps),
        "geometric": 10.0 ** (-steps),
        "even": 1 - steps / d,
        "one stands out": top,
        "one lags": bottom,
        "one direction": torch.eye(d, dtype=F64)[0],
        "half is zero": torch.cat([1 + steps[: d // 2], torch.zeros(d - d // 2, dtype=F64)]),
        "cluster at the top": near_top,
        "cluster at the bottom": near_bottom,
        "two clusters": torch.cat([3 - 1e-9 * steps[: d // 2], 1 + 1e-9 * steps[d // 2 :]]),
        "two equal at the top": torch.cat([matrix(5, 5), 1 / (1 + steps[2:])]),
        "nearly two equal at the top": torch.cat([matrix(5, 5 - 1e-13), 1 / (1 + steps[2:])]),
        "narrow": 1 + 1e-3 * steps / d,
        "clustered everywhere": 1 + 1e-6 * steps / d,
        "wide": 10.0 ** (12 - 24 * steps / d),
    }


def matrix(*rows, dtype=F64):
    return torch.tensor(rows, dtype=dtype)


def conditioning(lambdas):
    """Return λ_max/(λ_max − λ_min): rounding of Ȳ grows by this in Eq. (4)."""
    return (lambdas.max() / (lambdas.max() - lambdas.min())).item()


def allowed(dtype, tau, lambdas, source=F64):
    """Return how far T may be from the reference.

    1e-12 in float64 and 1e-6 in float32. Eq. (4) has slope τ/(λ_max − λ_min) in λ, so that a rounding of the entries of
    Ȳ, d ulp of λ_max, moves T by τ · conditioning · d · ε whatever the algorithm: more is asked of nobody.
    """
    d, eps = len(lambdas), torch.finfo(source).eps
    return max({F64: 1e-12, F32: 1e-6}[dtype], 4 * d * eps * tau * conditioning(lambdas))


def check(projector, expected, tolerance, report, lambdas=None, tau=0.0):
    """Compare T with the reference; the bound told holds, but for the reference's own rounding, and says something."""
    error = (projector.double() - expected).abs().max().item()
    assert error <= tolerance, f"{report['route']}: {error:.2g} > {tolerance:.2g}"
    assert torch.equal(projector, projector.mT)
    bound = report["error_bound"]
    reference = 0.0 if lambdas is None else tau * conditioning(lambdas)
    slack = torch.finfo(F64).eps * (4 + 2 * len(expected) ** 0.5 * reference)
    assert error <= bound + slack, f"{report['route']}: off by {error:.2g}, but the bound is {bound:.2g}"
    assert bound <= max(1e3 * tolerance, 1e-4), f"{report['route']}: the bound {bound:.2g} says nothing"


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", spectra())
def test_dense_routes_agree_with_the_reference_on_every_shape_of_spectrum(device, name, tau, route, dtype):
    lambdas = spectra()[name]
    covariance = with_spectrum(lambdas)
    projector, found, report = make(covariance.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
    assert projector.dtype == dtype
    check(projector, paper.flat_projector(covariance, tau), allowed(dtype, tau, lambdas), report, lambdas, tau)
    assert (found.dtype, found.device.type) == (F64, "cpu")
    assert (found.diff() <= 0).all()
    assert (found >= 0).all()


@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", spectra())
def test_dense_routes_of_a_float32_covariance(device, name, tau, route):
    # What CUDA works with. Eq. (4) of what float32 has kept of Ȳ is well defined; more cannot be asked.
    covariance = with_spectrum(spectra()[name]).float()
    exact = paper.spectrum(covariance)
    if conditioning(exact) > 1e3:
        return  # float32 cannot tell such a spectrum from a flat one
    projector, _, report = make(covariance.to(device), "flat", tau, route=route)
    assert projector.dtype == F32
    check(projector, paper.flat_projector(covariance, tau), allowed(F32, tau, exact, F32), report, exact, tau)


@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@given(
    d=st.integers(1, 40),
    rank=st.integers(0, 60),
    tau=st.sampled_from(TAUS),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    decay=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_dense_routes_agree_with_the_reference_on_any_features(device, route, dtype, d, rank, tau, mean, decay, seed):
    torch.manual_seed(seed)
    rows = (torch.randn(rank, d, dtype=F64) + mean) * decay ** torch.arange(d, dtype=F64)
    covariance = rows.T @ rows
    exact = paper.spectrum(covariance)
    if exact.max() == 0 or d == 1:
        expected, tolerance = torch.eye(d, dtype=F64), 0.0
    else:
        expected, tolerance = paper.flat_projector(covariance, tau), allowed(dtype, tau, exact)
    projector, _, report = make(covariance.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
    check(projector, expected, tolerance, report, exact if tolerance else None, tau)


@pytest.mark.parametrize("route", FROM_ROWS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("source", [F32, F64], ids=str)
@given(
    d=st.integers(2, 48),
    share=st.floats(0, 1),
    tau=st.sampled_from(TAUS),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_gram_routes_agree_with_the_reference(device, route, dtype, source, d, share, tau, mean, seed):
    torch.manual_seed(seed)
    rows = (torch.randn(int(share * (d - 1)), d, dtype=F64) + mean).to(source)
    exact = rows.double().T @ rows.double()
    projector, lambdas, report = make_from_rows(rows.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
    assert projector.dtype == dtype
    # Computed in the rows' dtype; the Gram matrix rounds as Ȳ does, λ_min = 0 is exact, and so conditioning is 1.
    tolerance = max(1e-12 if dtype == source == F64 else 2e-6, 4 * d * torch.finfo(source).eps * tau)
    check(projector, paper.flat_projector(exact, tau), tolerance, report, matrix(1.0, 0.0), tau)
    assert (lambdas.diff() <= 0).all()
    assert (lambdas >= 0).all()


@pytest.mark.parametrize("route", FROM_ROWS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("tau", [*TAUS, 3.0, 15.0, 40.0])
@pytest.mark.parametrize(("rank", "r"), [(1, 7), (1, 200), (3, 40), (3, 250)])
def test_gram_routes_of_rows_that_depend_on_each_other(device, rank, r, tau, dtype, route):
    torch.manual_seed(rank)
    rows = torch.randn(rank, 300, dtype=F64).repeat(r // rank, 1)
    projector, _, report = make_from_rows(rows.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
    # in float64 the n rows, and in float32 two roundings of each factor, are added up
    tolerance = {F64: 1e-12, F32: 2e-6}[dtype] * max(1.0, tau / 10)
    check(projector, paper.flat_projector(rows.T @ rows, tau), tolerance, report, matrix(1.0, 0.0), tau)


REAL = {
    "mfeat fou": lambda: mfeat("fou", 2000),
    "mfeat mor": lambda: mfeat("mor", 2000),
    "mfeat zer": lambda: mfeat("zer", 1000),
    "mfeat pix": lambda: mfeat("pix", 2000),
    "mfeat fac, few": lambda: mfeat("fac", 100),
    "watch": lambda: watch(20, 900),
    "watch, few": lambda: watch(80, 150),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", REAL)
def test_routes_agree_with_the_reference_on_real_features(device, name, tau, dtype):
    rows = REAL[name]()
    covariance = rows.T @ rows
    lambdas = paper.spectrum(covariance)
    expected, tolerance = paper.flat_projector(covariance, tau), allowed(dtype, tau, lambdas)
    for route in DENSE:
        projector, _, report = make(covariance.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
        check(projector, expected, tolerance, report, lambdas, tau)
    if rows.shape[0] < rows.shape[1]:
        for route in FROM_ROWS:
            projector, _, report = make_from_rows(rows.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
            check(projector, expected, tolerance, report, lambdas, tau)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", ["harmonic", "even", "one stands out", "one lags", "cluster at the top",
                                  "nearly two equal at the top", "half is zero", "narrow"])  # fmt: skip
def test_large_matrices_by_whatever_rule(device, name, tau, dtype):
    # Beyond some hundred dimensions the rule takes other routes, and products are computed in bands.
    lambdas = spectra(300)[name]
    covariance = with_spectrum(lambdas)
    expected, tolerance = paper.flat_projector(covariance, tau), allowed(dtype, tau, lambdas)
    for route in ("auto", "polynomial"):
        projector, _, report = make(covariance.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
        check(projector, expected, tolerance, report, lambdas, tau)


@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["no top", "a top"])
@pytest.mark.parametrize("r", [40, 257, 299])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_large_gram_matrices(device, dtype, tau, r, mean):
    torch.manual_seed(r)
    rows = torch.randn(r, 300, dtype=F64) + mean
    expected = paper.flat_projector(rows.T @ rows, tau)
    for route in FROM_ROWS:
        projector, _, report = make_from_rows(rows.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
        check(projector, expected, allowed(dtype, tau, matrix(1.0, 0.0)) + 1e-15 * tau * 300, report)


# -- what is reported -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["svd", "eigh", "polynomial"])
def test_forced_route_is_taken_and_told(device, route):
    covariance = with_spectrum(spectra()["harmonic"]).to(device)
    for dtype in ("float32", "float64"):
        report = make(covariance, "flat", 0.4, route=route, dtype=dtype)[2]
        assert report["route"].split(",")[0] == route
        assert report["flops"] >= 24**3 / 4
        assert report["trace"] == pytest.approx(spectra()["harmonic"].sum().item(), rel=1e-6)
        assert 0 < report["error_bound"] < 1e-4


@pytest.mark.parametrize("route", ["eigh", "polynomial"])
def test_forced_gram_route_is_taken_and_told(device, route):
    rows = torch.randn(9, 24, dtype=F64)
    report = make_from_rows(rows.to(device), "flat", 0.4, route=route)[2]
    assert route in report["route"]
    assert "gram" in report["route"]
    assert report["trace"] == pytest.approx(rows.square().sum().item(), rel=1e-6)


def test_polynomial_route_knows_the_ends_of_the_spectrum_only(device):
    covariance = with_spectrum(spectra(300)["harmonic"]).to(device)
    factor, lambdas, _ = rust.make_projector(covariance, "flat", 0.4, route="polynomial", dtype="float32")
    assert (len(factor), lambdas.shape) == (1, (2,))
    torch.testing.assert_close(lambdas, matrix(1.0, 1 / 300), rtol=1e-4, atol=1e-6)


def test_rule_takes_the_polynomial_for_large_float32_matrices(device):
    covariance = with_spectrum(spectra(300)["one stands out"]).to(device)
    assert make(covariance, "flat", 0.4, dtype="float32")[2]["route"].startswith("polynomial")
    assert make(covariance[:20, :20].contiguous(), "flat", 0.4)[2]["route"] == "eigh"


# -- spectra without a direction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("d", [1, 2, 30, 200])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.7, 1e-300, 1e300])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_flat_spectrum_gives_the_identity(device, route, d, scale, dtype):
    covariance = scale * torch.eye(d, dtype=F64, device=device)
    for tau in TAUS:
        projector, lambdas, report = make(covariance, "flat", tau, route=route, dtype=NAMES[dtype])
        assert torch.equal(projector, torch.eye(d, dtype=dtype))
        torch.testing.assert_close(lambdas, torch.full_like(lambdas, scale), rtol=1e-12, atol=0)
        assert report["error_bound"] <= 1e-6


@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("d", [6, 200])
def test_flat_spectrum_in_a_random_basis_gives_the_identity(device, route, d):
    q = orthogonal(d)
    covariance = 3 * q @ q.T
    projector, _, _ = make(((covariance + covariance.T) / 2).to(device), "flat", 0.4, route=route)
    assert torch.equal(projector, torch.eye(d, dtype=F64))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "lambdas",
    [
        [1.0, 1.0, 0.75],
        [1.0, 1.0, 0.5],
        [1.0, 1.0, 1.0, 0.5],
        [3.0, 3.0, 1.0, 1.0],
        [1.0, 1.0, 0.0],
        [2.0, 2.0, 2.0, 1.0, 0.5],
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [0, 170])
def test_a_greatest_eigenvalue_that_is_there_twice(device, lambdas, d, dtype):
    # Taken out along one direction it is still there along another, which a search from the same start would not see.
    for seed in range(10):
        spectrum = torch.tensor([*lambdas, *[lambdas[-1]] * max(0, d - len(lambdas))], dtype=F64)
        covariance = with_spectrum(spectrum, seed)
        for tau in (0.4, 1.0, 10.0):
            expected, tolerance = paper.flat_projector(covariance, tau), allowed(dtype, tau, spectrum)
            for route in ("polynomial", "auto"):
                projector, _, report = make(covariance.to(device), "flat", tau, route=route, dtype=NAMES[dtype])
                check(projector, expected, tolerance, report, spectrum, tau)


@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("width", [3e-16, 1e-15, 1e-12, 1e-9, 1e-6, 1e-4, 1e-3, 9e-3, 0.02])
@pytest.mark.parametrize("d", [2, 6, 12])
def test_rounding_of_a_narrow_spectrum_does_not_carry_t_out_of_its_bounds(device, route, width, d):
    # τ/(λ_max − λ_min) times a rounding of λ is no small number here: what a polynomial would make of it is no T.
    for seed in range(8):
        lambdas = 1 - width * torch.rand(d, dtype=F64, generator=torch.Generator().manual_seed(seed))
        for tau in (0.625, 10.0):
            projector, _, report = make(with_spectrum(lambdas, seed).to(device), "flat", tau, route=route)
            eigenvalues = torch.linalg.eigvalsh(projector)
            assert eigenvalues.min() >= math.exp(-tau) - 1e-12
            assert eigenvalues.max() <= 1 + 1e-12
            if width < 1e-2 and route == "polynomial":
                assert report["route"] == "eigh"  # told as it is


# -- what must not matter, and what must be told ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("d", [3, 200])
@pytest.mark.parametrize("route", DENSE)
def test_what_is_not_finite_is_an_arithmetic_error_in_either_triangle(device, dtype, bad, d, route):
    for place in ((0, 2), (2, 0), (1, 1), (d - 1, 0), (0, d - 1)):
        covariance = torch.eye(d, dtype=dtype)
        covariance[place] = bad
        for shaped in (covariance, torch.stack([torch.eye(d, dtype=dtype), covariance])):
            with pytest.raises(ArithmeticError, match="covariance"):
                rust.make_projector(shaped.to(device), "flat", 0.4, route=route)
    rows = torch.ones(2, d, dtype=dtype)
    rows[1, 2] = bad
    with pytest.raises(ArithmeticError, match="rows"):
        rust.make_projector_from_rows(rows.to(device), "flat", 0.4)


@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("d", [4, 200])
def test_asymmetric_matrix_is_refused(device, route, d):
    covariance = with_spectrum(spectra(d)["harmonic"])
    covariance[1, 0] += 1e-3
    for shaped in (covariance, torch.stack([torch.eye(d, dtype=F64), covariance])):
        with pytest.raises(ValueError, match=r"covariance.*transpose.*symmetric"):
            rust.make_projector(shaped.to(device), "flat", 0.4, route=route)
    covariance[1, 0] -= 1e-3 - 1e-12  # what sums in another order leave
    make(covariance.to(device), "flat", 0.4, route=route)


@pytest.mark.parametrize("kind", STRENGTHS)
@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("scale", [1e300, 1e-300])
@pytest.mark.parametrize("d", [12, 200])
def test_any_magnitude_gives_the_same_projector(device, kind, route, scale, d):
    if kind != "flat" and route == "polynomial":
        return  # refused, see below
    covariance = with_spectrum(spectra(d)["harmonic"])
    strength = 2.3  # of harmonic λ none is 2.3 times as large as the least
    expected, _, _ = make(covariance.to(device), kind, strength, route=route)
    projector, lambdas, _ = make((scale * covariance).to(device), kind, strength, route=route)
    torch.testing.assert_close(projector, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lambdas[0] / scale, torch.tensor(1.0, dtype=F64), rtol=1e-9, atol=0)
    single = (1e38 / covariance.abs().max() * covariance).float()
    projector, _, _ = make(single.to(device), kind, strength, route=route)
    torch.testing.assert_close(projector.double(), expected, rtol=0, atol=1e-4 if kind == "null_space" else 2e-5)


@pytest.mark.parametrize("kind", STRENGTHS)
@pytest.mark.parametrize("scale", [1e150, 1e-150, 1e160, 1e-170])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_any_magnitude_of_rows_gives_the_same_projector(device, kind, scale, dtype):
    rows = torch.randn(5, 12, dtype=F64)
    expected, _, _ = make_from_rows(rows.to(device), kind, 2.0, dtype=NAMES[dtype])
    projector, _, report = make_from_rows((scale * rows).to(device), kind, 2.0, dtype=NAMES[dtype])
    torch.testing.assert_close(projector, expected, rtol=0, atol={F64: 1e-12, F32: 1e-6}[dtype])
    assert not math.isnan(report["trace"])
    single = (3e38 / rows.abs().max() * rows).float()
    projector, _, _ = make_from_rows(single.to(device), kind, 2.0)
    torch.testing.assert_close(projector.double(), expected.double(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("route", DENSE)
@pytest.mark.parametrize("kind", STRENGTHS)
def test_negative_round_off_counts_as_zero(device, route, kind):
    if kind != "flat" and route == "polynomial":
        return  # refused, see below
    rows = torch.randn(2, 40, dtype=F64)
    covariance = rows.T @ rows
    assert torch.linalg.eigvalsh(covariance)[0] < 0  # the case is met
    projector, lambdas, _ = make(covariance.to(device), kind, 2.0, route=route)
    assert (lambdas >= 0).all()
    eigenvalues = torch.linalg.eigvalsh(projector)
    assert eigenvalues.max() <= 1 + 1e-12
    torch.testing.assert_close(projector, paper.projector_of(covariance, kind, 2.0), rtol=0, atol=1e-12)


# -- the other kinds, groups, controls --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "strength"), [(k, s) for k, values in STRENGTHS.items() for s in values])
@pytest.mark.parametrize("control", [None, "scalar", "random"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("d", [9, 170])
def test_every_kind_and_control_agrees_with_the_reference(device, kind, strength, control, dtype, d):
    lambdas = 1 / (1 + torch.arange(d, dtype=F64))  # well apart, so that an order of λ is an order of directions
    covariance = with_spectrum(lambdas)
    noise = torch.randn(d, d, dtype=F64)
    options = {"scalar": control == "scalar", "noise": noise.to(device) if control == "random" else None}
    expected = paper.projector_of(covariance, kind, strength, control, noise)
    projector, _, report = make(covariance.to(device), kind, strength, dtype=NAMES[dtype], **options)
    check(
        projector, expected, {F64: 1e-11, F32: 1e-6}[dtype] * max(1.0, strength / 100 if kind == "ridge" else 1), report
    )
    rows = torch.linalg.qr(torch.randn(d, d, dtype=F64))[0][: d // 2] * lambdas[: d // 2, None]
    expected = paper.projector_of(rows.T @ rows, kind, strength, control, noise)
    projector, _, report = make_from_rows(rows.to(device), kind, strength, dtype=NAMES[dtype], **options)
    check(
        projector, expected, {F64: 1e-11, F32: 2e-6}[dtype] * max(1.0, strength / 100 if kind == "ridge" else 1), report
    )


@pytest.mark.parametrize("kind", STRENGTHS)
@pytest.mark.parametrize("control", [None, "scalar", "random"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@given(groups=st.integers(1, 5), d=st.integers(1, 12), rank=st.integers(0, 15), seed=st.integers(0, 100))
def test_groups_are_each_as_if_alone(device, kind, control, dtype, groups, d, rank, seed):
    torch.manual_seed(seed)
    rows = torch.randn(groups, rank, d, dtype=F64) * torch.logspace(0, 6, groups, dtype=F64)[:, None, None]
    covariance = (rows.mT @ rows).to(device)
    covariance = (covariance + covariance.mT) / 2
    noise = torch.randn(d, d, dtype=F64, device=device)
    options = {
        "scalar": control == "scalar", "noise": noise if control == "random" else None, "dtype": NAMES[dtype]
    }  # fmt: skip
    kept = covariance.clone()
    projector, lambdas, report = make(covariance, kind, 2.0, **options)
    assert torch.equal(covariance, kept)
    assert projector.shape == (groups, d, d)
    assert lambdas.shape == (groups, d)
    for one, values, alone in zip(projector, lambdas, covariance, strict=True):
        expected, found, _ = make(alone, kind, 2.0, **options)
        torch.testing.assert_close(one, expected, rtol=0, atol={F64: 1e-12, F32: 1e-6}[dtype])
        size = max(1.0, found[0].item())
        torch.testing.assert_close(values / size, found / size, rtol=0, atol=1e-6 if dtype == F32 else 1e-12)
    assert report["trace"] == pytest.approx(torch.einsum("gii->", covariance).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"kind": "ridge"}, "projector"), ({"scalar": True}, "control"), ({"noise": torch.eye(3, dtype=F64)}, "control")],
    ids=str,
)
def test_polynomial_is_refused_where_eigenvalues_are_needed(device, options, what):
    options = {"kind": "flat", **options, "route": "polynomial"}
    if "noise" in options:
        options["noise"] = options["noise"].to(device)
    with pytest.raises(ValueError, match=f"route.*polynomial.*{what}.*eigh"):
        rust.make_projector(torch.eye(3, dtype=F64, device=device), strength=2.0, **options)
    with pytest.raises(ValueError, match=f"route.*polynomial.*{what}.*eigh"):
        rust.make_projector_from_rows(torch.ones(2, 3, dtype=F64, device=device), strength=2.0, **options)


def test_polynomial_of_groups_is_refused(device):
    with pytest.raises(ValueError, match=r"route.*polynomial.*groups.*eigh"):
        rust.make_projector(torch.eye(3, dtype=F64, device=device).expand(2, 3, 3), "flat", 0.4, route="polynomial")


@pytest.mark.parametrize("kind", STRENGTHS)
def test_groups_of_any_magnitude_are_each_as_if_alone(device, kind):
    one = with_spectrum(spectra(6)["harmonic"])
    expected = paper.projector_of(one, kind, 2.3)
    factors = torch.tensor([1e100, 1.0, 1e-100], dtype=F64)[:, None, None]
    projector, lambdas, _ = make((factors * one).to(device), kind, 2.3)
    torch.testing.assert_close(projector, expected.expand(3, 6, 6), rtol=0, atol=1e-12)
    torch.testing.assert_close(lambdas / factors[:, 0], paper.spectrum(one).expand(3, 6), rtol=0, atol=1e-12)


def test_groups_of_which_some_are_flat_or_empty(device):
    covariance = torch.stack([torch.zeros(3, 3), 7 * torch.eye(3), torch.diag(torch.tensor([4.0, 2.0, 0.0]))]).double()
    projector, lambdas, _ = make(covariance.to(device), "flat", math.log(2))
    assert torch.equal(projector[:2], torch.eye(3, dtype=F64).expand(2, 3, 3))
    torch.testing.assert_close(projector[2], torch.diag(matrix(0.5, 0.5**0.5, 1)), rtol=0, atol=1e-14)
    torch.testing.assert_close(lambdas, matrix([0, 0, 0], [7, 7, 7], [4, 2, 0]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", STRENGTHS)
@given(r=st.integers(0, 20), extra=st.integers(1, 40), out=st.integers(1, 9), seed=st.integers(0, 100))
def test_factored_application_equals_the_dense_one(device, dtype, kind, r, extra, out, seed):
    torch.manual_seed(seed)
    rows, gradient = torch.randn(r, r + extra, dtype=F64), torch.randn(out, r + extra, dtype=dtype, device=device)
    factor, _, _ = rust.make_projector_from_rows(rows.to(device), kind, 2.0, dtype=NAMES[dtype])
    full, twin = rust.dense_projector(factor), gradient.clone()
    stats = rust.project_([gradient], [None], [[factor]])
    others = rust.project_([twin], [None], [[(full,)]])
    tolerance = {F64: 1e-12, F32: 4e-6}[dtype]
    torch.testing.assert_close(gradient, twin, rtol=0, atol=tolerance * max(1.0, twin.norm().item()))
    torch.testing.assert_close(
        stats, others, rtol=1e-5 if dtype == F32 else 1e-10, atol=1e-5 if dtype == F32 else 1e-10
    )


# -- decompositions that fail -----------------------------------------------------------------------------------------

ONCE = """
import sys, warnings, torch
from igm_rs import _igm_rs as rust

warnings.simplefilter("ignore")
covariance = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
rows = torch.tensor([[1.0, 0, 2], [0, 1, 0]])
calls = {
    "eigh": lambda: rust.make_projector(covariance, "flat", 3.0, route="eigh"),
    "svd": lambda: rust.make_projector(covariance, "flat", 3.0, route="svd"),
    "groups": lambda: rust.make_projector(torch.stack([covariance, 2 * covariance]), "flat", 3.0),
    "gram": lambda: rust.make_projector_from_rows(rows, "flat", 3.0, route="eigh"),
}
good = {name: call() for name, call in calls.items()}
exact = {"_linalg_eigh": torch.linalg.eigh, "_linalg_svd": torch.linalg.svd}
seen = []

def eigh(a, uplo="L", compute_v=True):
    seen.append(a.dtype)
    if a.dtype == torch.float32:
        raise RuntimeError("linalg.eigh: The algorithm failed to converge (error code: 2)")
    values, vectors = numpy.linalg.eigh(a.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)

def svd(a, full_matrices=False, compute_uv=True, driver=None):
    seen.append(a.dtype)
    if a.dtype == torch.float32:
        raise RuntimeError("linalg.svd: The algorithm failed to converge (error code: 2)")
    return tuple(map(torch.from_numpy, numpy.linalg.svd(a.numpy(), full_matrices)))

import numpy
library = torch.library.Library("aten", "IMPL")
library.impl("_linalg_eigh", eigh, "CPU")
library.impl("_linalg_svd", svd, "CPU")
for name, call in calls.items():
    seen.clear()
    factor, lambdas, report = call()
    full, expected = (rust.dense_projector(f) for f in (factor, good[name][0]))
    near = torch.allclose(full, expected, rtol=0, atol=1e-6) and torch.allclose(lambdas, good[name][1], atol=1e-5)
    print(name, full.dtype, near, *seen)
"""


def test_decomposition_that_fails_in_float32_is_done_in_float64():
    done = subprocess.run([sys.executable, "-c", ONCE], capture_output=True, text=True, check=False)
    tail = "torch.float32 True torch.float32 torch.float64"
    assert done.stdout.splitlines() == [f"{name} {tail}" for name in ("eigh", "svd", "groups", "gram")], done.stderr
