"""Whole runs of IGMOptimizer against the oracle: every option of Algorithm 1, weights compared after every step."""

import pytest
import torch
from models import OwnHeads, Pair, SharedHead, distance

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd+momentum+wd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}
TWO, THREE = ("audio", "video"), ("audio", "video", "text")
# float64: rounding of some hundred operations. float32: one step's rounding is 6e-8 of weights of order one, and the
# two sides round in different orders for a few dozen steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def agree(pair, **run):
    worst = 0.0
    moved = [p.detach().clone() for p in pair.model.parameters()]
    for gap in pair.run(**run):
        worst = max(worst, gap)
    assert worst <= TOLERANCE[pair.dtype], f"weights differ by {worst:.3g}"
    assert all(not torch.equal(p, q) for p, q in zip(pair.model.parameters(), moved, strict=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
@pytest.mark.parametrize("rho", [0.05, 0.0], ids=["sam", "plain"])
def test_run_equals_reference_float64(kind, names, base, rho):
    agree(Pair(kind(names), BASES[base], names, rho=rho, tau=1.5))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
def test_run_equals_reference_float32(kind, names, base):
    pair = Pair(kind(names), BASES[base], names, dtype=torch.float32, tau=1.5)
    if base.startswith("adam"):
        # Adam divides by √v: where a gradient is near 0 it turns rounding of 1e-7 into up to lr of motion; a smaller lr
        # keeps the comparison about the arithmetic.
        for optimizer in (pair.opt, pair.oracle.base):
            optimizer.param_groups[0]["lr"] = 1e-3
    agree(pair)


OPTIONS = [
    {"sources": "others"},
    {"sources": {"audio": None, "video": "audio", "text": ["audio", "video"]}},
    {"features": "samples"},
    {"features": "centred"},
    {"covariance": "kept"},
    {"covariance": 0.5},
    {"covariance": 0.5, "features": "centred"},
    {"covariance": "kept", "features": "samples"},
    {"refresh": 2},
    {"refresh": 3, "covariance": "kept"},
    {"refresh": "manual"},
    {"project": "update"},
    {"project": "update", "rho": 0.0},
    {"route": "svd"},
    {"route": "eigh", "features": "samples"},
    {"rho": {"audio": 0.05, "video": 0.0, "text": 0.02}},
    {"tau": {"audio": 10.0, "video": 0.0, "text": 0.4}},
    {"tau": 0.0},
    {"projector": "orthogonal", "covariance": "kept", "batches": 4},
    {"projector": "orthogonal", "covariance": "kept", "alpha": 0.5, "normalise": True},
    {"projector": "orthogonal", "sources": "others", "covariance": "kept", "refresh": 2},
    {"projector": "orthogonal"},
]


@pytest.mark.parametrize("alternate", [False, True], ids=["turns", "per batch"])
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_reference(options, kind, alternate):
    agree(Pair(kind(THREE), BASES["sgd+momentum+wd"], THREE, **{"tau": 1.5, **options}), alternate=alternate)


@pytest.mark.parametrize("base", ["sgd+momentum+wd", "adam"])
def test_update_projection_differs_from_gradient_projection(base):
    runs = []
    for project in ("gradient", "update"):
        torch.manual_seed(0)
        pair = Pair(OwnHeads(), BASES[base], project=project, tau=10.0)
        agree(pair)
        runs.append(pair.model)
    assert distance(*runs) > 1e-4


def test_manual_refresh_equals_reference():
    pair = Pair(OwnHeads(), BASES["sgd+momentum+wd"], refresh="manual", tau=3.0)
    agree(pair, rounds=1)
    for name in TWO:
        pair.opt.refresh(name)
        pair.oracle.refresh(name)
    assert set(pair.opt.projectors["audio"]) == {"audio.0", "audio.1"}
    agree(pair, rounds=2)


def test_losses_and_projected_norms_are_those_of_the_reference():
    pair = Pair(OwnHeads(), BASES["sgd"], tau=3.0)
    list(pair.run(rounds=2))
    stats = pair.opt.last_stats
    first, second = pair.oracle.losses[-1]
    assert stats["loss"] == pytest.approx(first, abs=1e-12)
    assert stats["loss_perturbed"] == pytest.approx(second, abs=1e-12)
    assert stats["sharpness"] == pytest.approx(second - first, abs=1e-12)


@pytest.mark.cuda
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [OwnHeads, SharedHead])
@pytest.mark.parametrize("rho", [0.05, 0.0], ids=["sam", "plain"])
def test_run_equals_reference_on_cuda(kind, base, rho):
    agree(Pair(kind(TWO), BASES[base], TWO, device="cuda", rho=rho, tau=1.5))


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_reference_on_cuda(options):
    agree(Pair(OwnHeads(THREE), BASES["sgd+momentum+wd"], THREE, device="cuda", **{"tau": 1.5, **options}))


@pytest.mark.cuda
def test_non_finite_features_on_cuda_are_zeros_and_told_at_the_refresh():
    pair = Pair(OwnHeads(), BASES["sgd"], device="cuda", rho=0.0, features="samples")
    layer = pair.model.heads["audio"][0]
    with pytest.warns(RuntimeWarning, match="1 rows of features of 'audio'"), pair.opt.collect("audio"):
        layer(torch.tensor([[1.0] * 8, [float("nan")] * 8], dtype=torch.float64, device="cuda"))
    expected = torch.ones(8, 8, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(pair.opt.covariances["audio"]["audio.0"], expected)
