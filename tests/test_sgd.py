"""The fused step of SGD in Rust against torch.optim.SGD, bit for bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igm_rs import _igm_rs as rust

F32, F64 = torch.float32, torch.float64
SHAPES = [(3,), (1,), (), (7, 5), (8, 8), (0,), (33,), (4, 3, 5), (1000,)]
SETTINGS = {
    "lr": 0.1,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
}


def span(stop, **settings):
    """Return one span of hyper-parameters as the Rust function takes it."""
    return (stop, *{**SETTINGS, **settings}.values())


def tensors(shapes, dtype):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def torch_steps(params, gradients, groups):
    """Return the weights and momentum buffers of torch's own SGD after one step for each list of gradients.

    ``groups`` lists (number of tensors, settings).
    """
    params, begin, param_groups = [p.clone().requires_grad_() for p in params], 0, []
    for count, settings in groups:
        param_groups.append({"params": params[begin : begin + count], **settings})
        begin += count
    optimizer = torch.optim.SGD(param_groups, lr=0.1, foreach=False, fused=False)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p].get("momentum_buffer") for p in params]


def bits(tensor):
    """Return the bits as integers, so that −0 differs from 0 and NaN equals itself."""
    return tensor.contiguous().view({4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(actual, expected):
    return all(
        a is b or (a.dtype == b.dtype and torch.equal(bits(a), bits(b))) for a, b in zip(actual, expected, strict=True)
    )


COMBINATIONS = [
    {"momentum": m, "weight_decay": decay, "dampening": damp, "nesterov": nesterov, "maximize": maximize}
    for m, decay, damp, nesterov, maximize in itertools.product(
        (0.0, 0.9), (0.0, 1e-4), (0.0, 0.3), (False, True), (False, True)
    )
    if not (nesterov and (damp or not m))
]


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: " ".join(k for k, v in s.items() if v) or "plain")
def test_three_steps_are_those_of_torch_to_the_bit(dtype, settings):
    params, steps = tensors(SHAPES, dtype), [tensors(SHAPES, dtype) for _ in range(3)]
    expected, buffers = torch_steps(params, steps, [(len(SHAPES), settings)])
    momentum_buffers = [torch.full_like(p, math.nan) for p in params] if settings["momentum"] else []
    places = [p.data_ptr() for p in params + momentum_buffers]
    for number, gradients in enumerate(steps):
        kept = [g.clone() for g in gradients]
        first = [number == 0] * len(params) if momentum_buffers else []
        assert rust.sgd_step_(params, [], gradients, momentum_buffers, first, [span(len(params), **settings)]) is None
        assert same_bits(gradients, kept)
    assert same_bits(params, expected)
    if momentum_buffers:
        assert same_bits(momentum_buffers, buffers)
    assert [p.data_ptr() for p in params + momentum_buffers] == places


@given(
    dtype=st.sampled_from([F32, F64]),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    lr=st.floats(0, 10),
    momentum=st.floats(0.01, 0.99),
    weight_decay=st.floats(0, 0.1),
    dampening=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_any_numbers_give_torchs_bits(dtype, sizes, lr, momentum, weight_decay, dampening, seed):
    torch.manual_seed(seed)
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": dampening}
    params, steps = tensors([(n,) for n in sizes], dtype), [tensors([(n,) for n in sizes], dtype) for _ in range(2)]
    expected, buffers = torch_steps(params, steps, [(len(sizes), settings)])
    mine = [torch.empty_like(p) for p in params]
    for number, gradients in enumerate(steps):
        rust.sgd_step_(params, [], gradients, mine, [number == 0] * len(params), [span(len(params), **settings)])
    assert same_bits(params, expected)
    assert same_bits(mine, buffers)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_extreme_numbers_give_torchs_bits(momentum):
    numbers = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, -3e38, math.inf, -math.inf, 1.0, 1 / 3]
    pairs = torch.tensor(list(itertools.product(numbers, numbers)))
    params, gradients = [pairs[:, 0].clone()], [pairs[:, 1].clone()]
    settings = {"momentum": momentum, "weight_decay": 0.1}
    expected, _ = torch_steps(params, [gradients], [(1, settings)])
    rust.sgd_step_(params, [], gradients, [torch.empty_like(params[0])], [True], [span(1, **settings)])
    undefined = expected[0].isnan()  # ∞ − ∞; the bits of a NaN are nobody's promise
    assert torch.equal(params[0].isnan(), undefined)
    assert same_bits([params[0][~undefined]], [expected[0][~undefined]])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_step_starts_from_the_weights_before_the_perturbation(momentum):
    before, gradients = tensors(SHAPES, F32), tensors(SHAPES, F32)
    params = [b + 0.05 for b in before]
    kept = [b.clone() for b in before]
    buffers = [torch.empty_like(p) for p in params] if momentum else []
    expected, expected_buffers = torch_steps(before, [gradients], [(len(before), {"momentum": momentum})])
    rust.sgd_step_(
        params=params,
        before=before,
        gradients=gradients,
        momentum_buffers=buffers,
        first=[True] * len(buffers),
        spans=[span(len(params), momentum=momentum)],
    )
    assert same_bits(params, expected)
    assert same_bits(before, kept)
    if momentum:
        assert same_bits(buffers, expected_buffers)


def test_every_span_has_its_own_numbers():
    groups = [
        (2, {"lr": 0.1, "momentum": 0.9}),
        (0, {"lr": 9.0}),
        (3, {"lr": 0.5, "weight_decay": 0.01}),
        (len(SHAPES) - 5, {"lr": 0.2, "momentum": 0.5, "nesterov": True, "maximize": True}),
    ]
    params, steps = tensors(SHAPES, F64), [tensors(SHAPES, F64) for _ in range(2)]
    expected, buffers = torch_steps(params, steps, groups)
    stops = itertools.accumulate(count for count, _ in groups)
    spans = [span(stop, **settings) for stop, (_, settings) in zip(stops, groups, strict=True)]
    mine = [None if 2 <= i < 5 else torch.empty_like(p) for i, p in enumerate(params)]
    for number, gradients in enumerate(steps):
        rust.sgd_step_(params, [], gradients, mine, [number == 0] * len(params), spans)
    assert same_bits(params, expected)
    assert same_bits(mine, buffers)


def test_one_buffer_may_be_fresh_and_another_not():
    # θ = 1, g = 1, η = 0.5, μ = 0.5: a fresh buffer becomes 1; an old one of 2 becomes 0.5 · 2 + 1 = 2.
    params = [torch.ones(1), torch.ones(1)]
    buffers = [torch.full((1,), math.nan), torch.full((1,), 2.0)]
    gradients = [torch.ones(1), torch.ones(1)]
    rust.sgd_step_(params, [], gradients, buffers, [True, False], [span(2, lr=0.5, momentum=0.5)])
    assert [b.item() for b in buffers] == [1.0, 2.0]
    assert [p.item() for p in params] == [0.5, 0.0]


def test_plain_step_by_hand():
    # θ = (1, 2), g = (1, −1), λ = 0.5, η = 0.5: θ − η(g + λθ) = (1 − 0.75, 2 − 0).
    params = [torch.tensor([1.0, 2.0], dtype=F64)]
    rust.sgd_step_(params, [], [torch.tensor([1.0, -1.0], dtype=F64)], [], [], [span(1, lr=0.5, weight_decay=0.5)])
    assert params[0].tolist() == [0.25, 2.0]


def test_large_tensors_and_two_threads_give_the_same_bits():
    shapes = [(300_001,), (70_000,), (5,)]
    params, gradients = tensors(shapes, F32), tensors(shapes, F32)
    expected, _ = torch_steps(params, [gradients], [(3, {"momentum": 0.9, "weight_decay": 1e-4})])
    torch.set_num_threads(2)
    rust.sgd_step_(
        params, [], gradients, [torch.empty_like(p) for p in params], [True] * 3,
        [span(3, momentum=0.9, weight_decay=1e-4)],
    )  # fmt: skip
    assert same_bits(params, expected)


def test_transposed_weights_are_dense_and_taken():
    params, gradients = [torch.randn(5, 7).T], [torch.randn(5, 7).T]
    expected, _ = torch_steps(params, [gradients], [(1, {})])
    strides = params[0].stride()
    assert rust.sgd_step_possible(params, gradients, [])
    rust.sgd_step_(params, [], gradients, [], [], [span(1)])
    assert same_bits(params, expected)
    assert params[0].stride() == strides


def test_parameters_of_autograd_are_updated_in_place():
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        rust.sgd_step_([parameter], [], [torch.ones(3)], [], [], [span(1)])
    assert parameter.requires_grad
    assert parameter.is_leaf
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))


DENSE = torch.ones(2, 2)
POSSIBLE = [
    ([], [], [], True),
    ([DENSE], [DENSE], [], True),
    ([DENSE], [DENSE], [DENSE], True),
    ([DENSE], [DENSE], [None], True),
    ([DENSE.double()], [DENSE.double()], [DENSE.double()], True),
    ([DENSE], [DENSE.double()], [], False),
    ([DENSE.bfloat16()], [DENSE.bfloat16()], [], False),
    ([torch.ones(4, 4)[::2, ::2]], [DENSE], [], False),
    ([DENSE], [torch.ones(4, 4)[::2, ::2]], [], False),
    ([DENSE], [torch.ones(1, 1).expand(2, 2)], [], False),
    ([DENSE], [torch.arange(4.0).reshape(2, 2).T], [], False),
    ([DENSE, DENSE], [DENSE, DENSE.half()], [], False),
    ([DENSE], [DENSE], [DENSE.T], False),
    ([DENSE], [DENSE.to_sparse()], [], False),
]


@pytest.mark.parametrize(("params", "gradients", "buffers", "possible"), POSSIBLE)
def test_step_possible(params, gradients, buffers, possible):
    assert rust.sgd_step_possible(params, gradients, buffers) is possible


@pytest.mark.cuda
def test_step_is_not_possible_on_a_device():
    assert rust.sgd_step_possible([DENSE.cuda()], [DENSE.cuda()], []) is False
    with pytest.raises(ValueError, match=r"params\[0\]"):
        rust.sgd_step_([DENSE.cuda()], [], [DENSE.cuda()], [], [], [span(1)])


P, G, B = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)
PLAIN = [span(1)]

ERRORS = [
    (lambda: rust.sgd_step_([P], [], [], [], [], PLAIN), ValueError, ["gradients", "0", "1"]),
    (lambda: rust.sgd_step_([P], [], [G[:1]], [], [], PLAIN), ValueError, ["gradients[0]", "(1, 3)", "(2, 3)"]),
    (lambda: rust.sgd_step_([P], [], [G.double()], [], [], PLAIN), ValueError, ["gradients[0]", "float64", "float32"]),
    (lambda: rust.sgd_step_([P], [B, B], [G], [], [], PLAIN), ValueError, ["before", "2", "1"]),
    (lambda: rust.sgd_step_([P], [B.double()], [G], [], [], PLAIN), ValueError, ["before[0]", "float64"]),
    (lambda: rust.sgd_step_([P], [], [G], [], [], []), ValueError, ["spans", "0", "1"]),
    (lambda: rust.sgd_step_([P], [], [G], [], [], [span(2)]), ValueError, ["spans[0].stop", "2"]),
    (lambda: rust.sgd_step_([P], [], [G], [], [], [span(1), span(0)]), ValueError, ["spans[1].stop", "0"]),
    (lambda: rust.sgd_step_([P], [], [G], [], [], [span(1, lr=math.nan)]), ValueError, ["spans[0].lr", "NaN"]),
    (lambda: rust.sgd_step_([P], [], [G], [], [], [span(1, momentum=math.inf)]), ValueError, ["momentum", "inf"]),
    (lambda: rust.sgd_step_([P], [], [G], [], [], [span(1, momentum=0.9)]), ValueError, ["momentum_buffers[0]", "0.9"]),
    (
        lambda: rust.sgd_step_([P], [], [G], [None], [True], [span(1, momentum=0.9)]),
        ValueError,
        ["momentum_buffers[0]", "none", "0.9"],
    ),
    (
        lambda: rust.sgd_step_([P], [], [G], [B, B], [True], [span(1, momentum=0.9)]),
        ValueError,
        ["momentum_buffers", "2", "1"],
    ),
    (lambda: rust.sgd_step_([P], [], [G], [B], [], [span(1, momentum=0.9)]), ValueError, ["first", "0", "1"]),
    (
        lambda: rust.sgd_step_(
            [P, P.clone()], [], [G, G], [None, B[:1]], [True, True], [span(1), span(2, momentum=0.9)]
        ),
        ValueError,
        ["momentum_buffers[1]", "(1, 3)", "(2, 3)"],
    ),
    (lambda: rust.sgd_step_([P.T], [], [G.T.contiguous()], [], [], PLAIN), ValueError, ["params[0]", "dense"]),
    (lambda: rust.sgd_step_([P.half()], [], [G.half()], [], [], PLAIN), ValueError, ["params[0]", "float32"]),
    (lambda: rust.sgd_step_([P, P], [], [G, G], [], [], [span(2)]), ValueError, ["params", "share memory"]),
    (lambda: rust.sgd_step_([P], [], [P], [], [], PLAIN), ValueError, ["params", "share memory"]),
    (lambda: rust.sgd_step_([P, 1], [], [G, G], [], [], [span(2)]), TypeError, ["params", "int"]),
    (lambda: rust.sgd_step_([P], [], [None], [], [], PLAIN), TypeError, ["gradients", "None"]),
    (lambda: rust.sgd_step_(P, [], [G], [], [], PLAIN), TypeError, ["params"]),
]


@pytest.mark.parametrize(("call", "error", "fragments"), ERRORS, ids=[" ".join(row[2]) for row in ERRORS])
def test_errors_name_argument_value_and_what_is_expected_and_change_nothing(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all((tensor == 1).all() for tensor in (P, G, B))
