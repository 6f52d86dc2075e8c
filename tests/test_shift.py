"""The perturbation of the released scripts in Rust: tensor by tensor, in memory that stands in for the weights'."""

import math

import pytest
import torch
from test_sam import copies, each_layout, like, places, problem, room, same_bits, tensors

from igm_rs import _igm_rs as rust

F32, F64 = torch.float32, torch.float64
RHO = 0.05


def shifted_by(params, gradients, rhos=RHO, norm=None, measure=True):
    """What the weights are in the body, and what was measured."""
    found = []
    rhos = [rhos] * len(params) if isinstance(rhos, float) else rhos
    memory = [room(p) for p in params]
    told = rust.at_shifted(params, gradients, memory, norm, rhos, lambda _: found.extend(copies(params)), measure)
    assert same_bits(found, memory)
    return found, told


def norm_of(tensor):
    return math.sqrt(math.fsum(x * x for x in tensor.double().flatten().tolist()))


def resolution(tensor):
    """How far a weight of this dtype below 8 can be from what it should be: half a unit in the last place."""
    return 4 * torch.finfo(tensor.dtype).eps


def test_by_hand(device):
    p, q = torch.tensor([1.0, 2.0], device=device), torch.tensor([[5.0]], device=device)
    gradients = [torch.tensor([3.0, 4.0], device=device), torch.tensor([[-2.0]], device=device)]
    (a, b), told = shifted_by([p, q], gradients, [0.5, 0.25])
    assert a.tolist() == pytest.approx([1.3, 2.4], abs=1e-6)  # float32
    assert b.item() == 4.75
    assert told.tolist() == pytest.approx([math.hypot(0.5, 0.25), 3, 3, math.hypot(0.5, 0.25)], rel=1e-6)
    (a, b), _ = shifted_by([p, q], gradients, [0.5, 0.25], torch.tensor(10.0, device=device))
    assert a.tolist() == pytest.approx([1.15, 2.2], abs=1e-6)
    assert b.item() == pytest.approx(4.95, abs=1e-6)


@each_layout
def test_each_tensor_moves_by_rho_along_its_own_gradient(device, layout):
    params, gradients, _ = problem(layout, device)
    rhos = [0.01 * (i + 1) for i in range(len(params))]
    moved, told = shifted_by(params, gradients, rhos)
    for p, g, rho, there in zip(params, gradients, rhos, moved, strict=True):
        norm = norm_of(g.cpu())
        expected = p.double() + (rho / norm if norm else 0.0) * g.double()
        torch.testing.assert_close(there.double(), expected, rtol=0, atol=resolution(p))
    length = math.sqrt(sum(rho**2 for rho, p in zip(rhos, params, strict=True) if p.numel()))
    assert told[3].item() == pytest.approx(length, rel=1e-6)
    realised = [there.double() - p.double() for p, there in zip(params, moved, strict=True)]
    assert told[0].item() == pytest.approx(math.sqrt(sum(norm_of(r.cpu()) ** 2 for r in realised)), rel=1e-5)
    assert told[1].item() == sum(int((r != 0).sum()) for r in realised)
    assert told[2].item() == sum(int((g != 0).sum()) for g in gradients)


@each_layout
def test_by_one_norm_the_weights_are_those_of_perturb(device, layout):
    params, gradients, before = problem(layout, device)
    norm, rhos = rust.gradient_norm(gradients), [RHO, 0.1] * len(params)
    moved, told = shifted_by(params, gradients, rhos[: len(params)], norm)
    expected = rust.perturb_(params, gradients, before, norm, rhos[: len(params)])
    assert same_bits(moved, params)
    torch.testing.assert_close(told[:3], expected, rtol=1e-6, atol=0)


@each_layout
def test_own_memory_and_version_are_untouched(device, layout):
    params, gradients, memory = problem(layout, device)
    params = [torch.nn.Parameter(p) for p in params]
    old, where, versions = copies(params), places(params), [p._version for p in params]
    slopes, views = copies(gradients), [p.detach() for p in params]
    seen = []

    def body(_):
        seen.append([p.data_ptr() for p in params])
        assert [p._version for p in params] == versions
        assert same_bits(views, old), "the old memory holds the old weights"
        assert all(p.is_leaf and p.requires_grad for p in params)

    rust.at_shifted(params, gradients, memory, None, [RHO] * len(params), body)
    assert seen == [[m.data_ptr() for m in memory]]
    assert same_bits(params, old)
    assert same_bits(gradients, slopes)
    assert places(params) == where
    assert [p._version for p in params] == versions


@pytest.mark.parametrize(
    ("layer", "shape", "ratio"),
    [
        (torch.nn.Conv1d(2, 3, 2, bias=False), (4, 2, 5), 1.5),
        (torch.nn.Conv3d(2, 3, 2, bias=False), (4, 2, 3, 3, 3), 1.5),
        (torch.nn.BatchNorm1d(3), (4, 3), 1.5),
        (torch.nn.LayerNorm(3), (4, 3), 1.5),
        (torch.nn.Linear(3, 2, bias=False), (4, 3), 1.0),
        (torch.nn.Linear(3, 2), (4, 3), 1.0),
    ],
    ids=str,
)
def test_what_autograd_has_saved_decides_what_a_backward_pass_sees(layer, shape, ratio):
    """Convolutions and normalisations save the parameter, which is 3 where it was 2; Linear saves a view of the 2."""
    weight = layer.double().weight
    weight.data.fill_(2.0)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    y = layer(x)
    above = torch.randn_like(y)
    (before,) = torch.autograd.grad(y, x, above, retain_graph=True)
    seen = []
    rust.at_shifted(
        [weight],
        [torch.ones_like(weight)],
        [torch.empty_like(weight)],
        None,
        [math.sqrt(weight.numel())],
        lambda _: seen.extend(torch.autograd.grad(y, x, above)),
    )
    torch.testing.assert_close(seen[0], ratio * before, rtol=1e-12, atol=1e-14)  # a sum of a few float64 products


@each_layout
def test_a_tensor_without_gradient_stays_to_the_bit(device, layout):
    params, gradients, _ = problem(layout, device)
    for p, g in zip(params, gradients, strict=True):
        p.flatten()[:1].fill_(-0.0)
        g.zero_()
    for rhos, slopes in ((RHO, gradients), (0.0, like(params))):
        moved, told = shifted_by(params, slopes, rhos)
        assert all(torch.equal(a, b) for a, b in zip(moved, params, strict=True))
        assert told[0] == told[1] == told[3] == 0
    assert told[2] == sum(p.numel() for p in params)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_gradient_too_small_to_be_divided_by_leaves_its_tensor(device, layout):
    """0.05 / 1e-44 is beyond float32; beside it another tensor moves."""
    params = [torch.ones(2, 3, device=device), torch.ones(3, device=device)]
    gradients = [torch.zeros(2, 3, device=device), torch.ones(3, device=device)]
    gradients[0][0, 0] = 1e-44
    if layout == "transposed":
        gradients[0] = gradients[0].T.contiguous().T
    (a, b), _ = shifted_by(params, gradients)
    assert torch.equal(a, params[0])
    torch.testing.assert_close(b, 1 + RHO / math.sqrt(3) * torch.ones_like(b))


def test_below_zero_is_downhill(device):
    p, g = torch.ones(4, dtype=F64, device=device), torch.ones(4, dtype=F64, device=device)
    (there,), _ = shifted_by([p], [g], -RHO)
    torch.testing.assert_close(there, p - RHO / 2)


def test_nothing_and_no_measure(device):
    assert shifted_by([], [])[0] == []
    params, gradients, _ = problem("float32", device)
    moved, told = shifted_by(params, gradients, measure=False)
    assert told is None
    assert same_bits(moved, shifted_by(params, gradients)[0])


def test_two_threads_give_the_same_bits():
    shapes = [(300_001,), (70_000,), (5,)]
    params, gradients = (tensors("float32", torch.device("cpu"), shapes) for _ in range(2))
    one = shifted_by(params, gradients)
    torch.set_num_threads(2)
    two = shifted_by(params, gradients)
    assert same_bits(one[0], two[0])
    assert torch.equal(one[1], two[1])


class InBodyError(Exception):
    """What a body raises."""


@each_layout
@pytest.mark.parametrize("error", [InBodyError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_body_comes_out_unchanged_and_the_weights_are_their_own_again(device, layout, error):
    params, gradients, memory = problem(layout, device)
    old, where, raised = copies(params), places(params), error("in the body")

    def body(_):
        raise raised

    with pytest.raises(error) as caught:
        rust.at_shifted(params, gradients, memory, None, [RHO] * len(params), body)
    assert caught.value is raised
    assert same_bits(params, old)
    assert places(params) == where


@pytest.mark.cuda
def test_nothing_waits_for_a_device():
    params, gradients, memory = problem("everything", torch.device("cuda"))
    rust.at_shifted(params, gradients, memory, None, [RHO] * len(params), lambda _: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rust.at_shifted(params, gradients, memory, None, [RHO] * len(params), lambda _: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


P, G, B = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)
N = torch.tensor(1.0, dtype=F64)


def body(_):
    raise AssertionError("the body must not run")


ERRORS = [
    (lambda: rust.at_shifted([P], [], [B], None, [RHO], body), ValueError, ["gradients", "0", "1"]),
    (lambda: rust.at_shifted([P], [G[:1]], [B], None, [RHO], body), ValueError, ["gradients[0]", "(1, 3)", "(2, 3)"]),
    (lambda: rust.at_shifted([P], [G], [], None, [RHO], body), ValueError, ["shifted", "0", "1"]),
    (lambda: rust.at_shifted([P], [G], [B.T], None, [RHO], body), ValueError, ["shifted[0]", "(3, 2)", "(2, 3)"]),
    (lambda: rust.at_shifted([P], [G], [B.double()], None, [RHO], body), ValueError, ["shifted[0]", "float64"]),
    (
        lambda: rust.at_shifted([P], [G], [B[:1].expand(2, 3)], None, [RHO], body),
        ValueError,
        ["shifted[0]", "expanded"],
    ),
    (lambda: rust.at_shifted([P], [G], [P], None, [RHO], body), ValueError, ["share memory"]),
    (lambda: rust.at_shifted([P], [G], [G], None, [RHO], body), ValueError, ["share memory"]),
    (lambda: rust.at_shifted([P.to_sparse()], [G], [B], None, [RHO], body), ValueError, ["params[0]", "sparse"]),
    (lambda: rust.at_shifted([P], [G], [B], N.reshape(1), [RHO], body), ValueError, ["norm", "(1,)", "0-dim"]),
    (lambda: rust.at_shifted([P], [G], [B], 1.0, [RHO], body), TypeError, ["norm", "float"]),
    (lambda: rust.at_shifted([P], [G], [B], None, [], body), ValueError, ["rhos", "0", "1"]),
    (lambda: rust.at_shifted([P], [G], [B], None, [math.nan], body), ValueError, ["rhos[0]", "NaN", "finite"]),
    (lambda: rust.at_shifted([P], [G], [B], None, [RHO], 3), TypeError, ["body", "int", "callable"]),
]


@pytest.mark.parametrize(("call", "error", "fragments"), ERRORS, ids=[" ".join(row[2]) for row in ERRORS])
def test_errors_name_argument_value_and_what_is_expected_and_change_nothing(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all((tensor == 1).all() for tensor in (P, G, B))


def test_a_body_that_returns_something_is_an_error_and_the_weights_are_their_own_again():
    memory = torch.empty_like(P)
    with pytest.raises(TypeError, match="got int returned by body, expected None"):
        rust.at_shifted([P], [G], [memory], None, [RHO], lambda _: 3)
    assert (P == 1).all()
    assert P.data_ptr() != memory.data_ptr()
