"""Rows of T, Eqs. (3)-(4): each way igm_rs makes it, against a full SVD as the released scripts take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from igm_rs import _igm_rs

from .peers import released_projector
from .rows import Case, Comparison, Kept, Ratio
from .setting import TAU, Setting
from .shapes import widths

PEER = "torch.svd(some=False) + products"
DENSE = "T as a matrix"
FACTORED = "T in factors"

_FEW = {512: (4.0, None), 1024: (6.0, 9.0), 2304: (28.0, 60.0), 4608: (85.0, 250.0)}
"""For each d the times asked for with 558 rows: T as a matrix, T in factors."""

_FULL = {2304: 6.0, 4608: 7.0}
"""For each d the times asked for at full rank."""

_BLOCKS = {512: 15, 1024: 10, 2304: 6, 4608: 3}
"""The fewest blocks of each side; an SVD of d = 4608 takes a quarter of a minute."""


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the rows of T: by width, at full rank, and for all layers of real networks."""
    for d, (dense, factored) in _FEW.items():
        yield Case(f"T.{d}", "T", partial(_few, d, dense, factored, setting))
    for d, limit in _FULL.items():
        yield Case(f"T.{d}.full", "T", partial(_full, d, limit, setting))
    for number, (name, layers) in enumerate(widths(setting)):
        yield Case(f"T.network.{number}", "T", partial(_network, name, layers, setting))


def features(d: int, rows: int, setting: Setting, seed: int = 0) -> torch.Tensor:
    """Rows as a ReLU layer gives them, (rows, d): positive, of unlike scales, with one dominant direction."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.05, 2, d, dtype=torch.float64)
    seen = torch.randn(rows, d, generator=generator, dtype=torch.float64).mul_(scale).add_(0.5).relu_()
    return seen.to(setting.device, setting.kept)


def ours(seen: torch.Tensor, exact: torch.Tensor | None = None) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """T as igm_rs makes it by rule, as a matrix and as it is kept: from the rows while there are fewer than d."""
    if seen.shape[0] < seen.shape[1]:

        def factored() -> Any:
            return _igm_rs.make_projector_from_rows(seen, "flat", TAU, dtype="float32")
    else:
        covariance = seen.T @ seen if exact is None else exact

        def factored() -> Any:
            return _igm_rs.make_projector(covariance, "flat", TAU, dtype="float32")

    def dense() -> Any:
        factor, lambdas, report = factored()
        return (_igm_rs.dense_projector(factor),), lambdas, report

    return dense, factored


def _few(d: int, dense_limit: float, factored_limit: float | None, setting: Setting) -> Comparison:
    """558 rows, one of each batch of a turn."""
    d, rows = setting.width(d), setting.batches
    seen = features(d, rows, setting)
    exact = seen.T @ seen
    single = exact.float()
    dense, factored = map(Kept, ours(seen, exact))
    peer = Kept(lambda: released_projector(single, TAU))
    sides: dict[str, Callable[[], Any]] = {DENSE: dense}
    ratios = [Ratio(DENSE, PEER, "≥", dense_limit)]
    if factored_limit is not None:
        sides[FACTORED] = factored
        ratios.append(Ratio(FACTORED, PEER, "≥", factored_limit))
    return Comparison(
        f"T, d = {d}, {rows} rows",
        sides | {PEER: peer},
        ratios,
        lambda: _told(dense.result[2], f"{rows} rows of float64, one of each batch; their Ȳ is ready for the peer"),
        blocks=_blocks(d),
        warm=d < 4000,
        errors=lambda: _errors(_exact_from_rows(seen), {DENSE: dense.result[0][0], PEER: peer.result}),
        needs=lambda: {"flops": dense.result[2]["flops"]},
    )


def _full(d: int, limit: float, setting: Setting) -> Comparison:
    """More rows than columns: no direction is unseen."""
    d = setting.width(d)
    rows = d + d // 4
    seen = features(d, rows, setting)
    exact = seen.T @ seen
    single = exact.float()
    dense = Kept(ours(seen, exact)[0])
    peer = Kept(lambda: released_projector(single, TAU))
    return Comparison(
        f"T, d = {d}, full rank",
        {DENSE: dense, PEER: peer},
        [Ratio(DENSE, PEER, "≥", limit)],
        lambda: _told(dense.result[2], f"Ȳ of {rows} rows"),
        blocks=_blocks(d),
        warm=d < 4000,
        errors=lambda: _errors(_exact(exact), {DENSE: dense.result[0][0], PEER: peer.result}),
        needs=lambda: {"flops": dense.result[2]["flops"]},
    )


def _network(name: str, layers: list[int], setting: Setting) -> Comparison:
    """T of all layers of a network at the end of a turn; convolutions see a row at each position, so full rank."""
    convolutions = len(layers) > 6
    makers, covariances = [], []
    for number, d in enumerate(layers):
        rows = d + d // 4 if convolutions else setting.batches
        seen = features(d, rows, setting, number)
        covariance = seen.T @ seen
        makers.append(ours(seen, covariance)[1])
        covariances.append(covariance.float())
    few = f"{setting.batches} rows each, one of each batch"
    rows_told = "at full rank, as each position of a picture brings a row" if convolutions else few
    kept = "T's as they are kept"
    return Comparison(
        f"T's of {name}",
        {
            kept: lambda: [make() for make in makers],
            PEER: lambda: [released_projector(covariance, TAU) for covariance in covariances],
        },
        [Ratio(kept, PEER, "≥")],
        lambda: f"{len(layers)} layers, d = {', '.join(map(str, sorted(set(layers))))}, {rows_told}",
        blocks=1 if convolutions else 4,
        warm=not convolutions,
    )


def _blocks(d: int) -> int:
    return next((blocks for width, blocks in _BLOCKS.items() if d <= width), 1)


def _told(report: dict[str, Any], rows: str) -> str:
    return f"{rows}; τ = {TAU}. Route of ours: {report['route']}, error bound {report['error_bound']:.1e}"


def _errors(reference: torch.Tensor, made: dict[str, torch.Tensor]) -> dict[str, float]:
    """The greatest difference of each T from the reference."""
    return {label: (T.double() - reference).abs().max().item() for label, T in made.items()}


def _exact(covariance: torch.Tensor) -> torch.Tensor:
    """T of a float64 eigendecomposition."""
    lambdas, v = torch.linalg.eigh(covariance.double())
    T: torch.Tensor = (v * torch.exp(-TAU * (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0]))) @ v.T
    return T


def _exact_from_rows(seen: torch.Tensor) -> torch.Tensor:
    """T of a float64 SVD of the rows: λ = σ², and 0 in the directions that no row has; T = I + V (Σ − I) Vᵀ."""
    if seen.shape[0] >= seen.shape[1]:
        return _exact(seen.double().T @ seen.double())
    _, sigma, vh = torch.linalg.svd(seen.double(), full_matrices=False)
    kept = torch.expm1(-TAU * sigma.square() / sigma[0].square())
    T: torch.Tensor = torch.eye(seen.shape[1], dtype=torch.float64, device=seen.device) + (vh.T * kept) @ vh
    return T
