"""The fused step of Adam and AdamW in Rust against torch.optim, bit for bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igm_rs import _igm_rs as rust
from igm_rs._fused import FusedAdam, FusedSGD, fused_for

F32, F64 = torch.float32, torch.float64
SHAPES = [(3,), (1,), (), (7, 5), (8, 8), (0,), (33,), (4, 3, 5), (8191,), (8193,)]
SETTINGS = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "decoupled": False,
}


def span(stop, **settings):
    """Return one span of hyper-parameters as the Rust function takes it."""
    return (stop, *{**SETTINGS, **settings}.values())


def tensors(shapes, dtype):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def as_torch(settings):
    """Return the same settings by the names that torch gives them."""
    settings = {**SETTINGS, **settings}
    betas = settings.pop("beta1"), settings.pop("beta2")
    return {**settings, "betas": betas, "decoupled_weight_decay": settings.pop("decoupled")}


class Mine:
    """The state of Adam, and its step in Rust."""

    def __init__(self, params):
        self.params = [p.clone() for p in params]
        self.average, self.square, self.largest = ([torch.zeros_like(p) for p in params] for _ in range(3))
        self.steps = [torch.zeros(()) for _ in params]

    def step(self, gradients, spans, before=()):
        each = [s for before, s in zip([0, *(s[0] for s in spans)], spans, strict=False) for _ in range(s[0] - before)]
        largest = [most if s[6] else None for most, s in zip(self.largest, each, strict=True)]
        arguments = [self.average, self.square, largest if any(s[6] for s in each) else [], self.steps, spans]
        assert rust.adam_step_(self.params, list(before), gradients, *arguments) is None


def torch_adam(params, groups):
    """Return parameters and torch's own optimizer of them; ``groups`` lists (number of tensors, settings)."""
    params, begin, param_groups = [p.clone().requires_grad_() for p in params], 0, []
    for count, settings in groups:
        param_groups.append({"params": params[begin : begin + count], **as_torch(settings)})
        begin += count
    return params, torch.optim.Adam(param_groups, foreach=False, fused=False)


def torch_step(params, optimizer, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()


def assert_same(mine, params, optimizer):
    """Weights and all state agree to the bit."""
    for i, p in enumerate(params):
        state = optimizer.state[p]
        assert torch.equal(mine.params[i], p.detach())
        assert torch.equal(mine.average[i], state["exp_avg"])
        assert torch.equal(mine.square[i], state["exp_avg_sq"])
        assert torch.equal(mine.steps[i], state["step"])
        if "max_exp_avg_sq" in state:
            assert torch.equal(mine.largest[i], state["max_exp_avg_sq"])


COMBINATIONS = [
    {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay, "decoupled": decoupled}
    for amsgrad, maximize, (decay, decoupled) in itertools.product(
        (False, True), (False, True), ((0.0, False), (1e-2, False), (1e-2, True))
    )
]


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.3, 0.4), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: " ".join(k for k, v in s.items() if v) or "plain")
def test_four_steps_are_those_of_torch_to_the_bit(dtype, betas, settings):
    settings = {**settings, "beta1": betas[0], "beta2": betas[1]}
    start = tensors(SHAPES, dtype)
    params, optimizer = torch_adam(start, [(len(SHAPES), settings)])
    mine = Mine(start)
    places = [p.data_ptr() for p in mine.params + mine.average + mine.square]
    for _ in range(4):
        gradients = tensors(SHAPES, dtype)
        torch_step(params, optimizer, gradients)
        mine.step(gradients, [span(len(SHAPES), **settings)])
        assert_same(mine, params, optimizer)
    assert places == [p.data_ptr() for p in mine.params + mine.average + mine.square]


@given(
    dtype=st.sampled_from([F32, F64]),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    lr=st.floats(0, 10),
    betas=st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
    eps=st.floats(1e-12, 1),
    weight_decay=st.floats(0, 0.1),
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_numbers_give_torchs_bits(dtype, sizes, lr, betas, eps, weight_decay, decoupled, amsgrad, seed):
    torch.manual_seed(seed)
    settings = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    settings |= {"decoupled": decoupled, "amsgrad": amsgrad}
    start = tensors([(n,) for n in sizes], dtype)
    params, optimizer = torch_adam(start, [(len(sizes), settings)])
    mine = Mine(start)
    for exponent in (0, -8, 4):
        gradients = [10.0**exponent * g for g in tensors([(n,) for n in sizes], dtype)]
        torch_step(params, optimizer, gradients)
        mine.step(gradients, [span(len(sizes), **settings)])
    assert_same(mine, params, optimizer)


LAYOUTS = {
    "transposed": lambda dtype: torch.randn(37, 19, dtype=dtype).T,
    "channels last": lambda dtype: torch.randn(5, 6, 7, 3, dtype=dtype).permute(0, 3, 1, 2),
    "large": lambda dtype: torch.randn(70_001, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layouts_on_two_threads(layout, dtype):
    torch.set_num_threads(2)
    start = [LAYOUTS[layout](dtype)]
    params, optimizer = torch_adam(start, [(1, {"weight_decay": 0.01, "decoupled": True})])
    mine = Mine(start)
    assert mine.params[0].stride() == start[0].stride()
    for _ in range(3):
        gradients = [torch.empty_like(start[0]).normal_()]
        torch_step(params, optimizer, gradients)
        mine.step(gradients, [span(1, weight_decay=0.01, decoupled=True)])
    assert_same(mine, params, optimizer)


def test_step_starts_from_the_weights_before_the_perturbation():
    settings = {"weight_decay": 0.01, "decoupled": True, "amsgrad": True}
    start = tensors(SHAPES, F32)
    params, optimizer = torch_adam(start, [(len(SHAPES), settings)])
    mine, kept = Mine(start), [p.clone() for p in start]
    torch._foreach_add_(mine.params, 0.05)
    gradients = tensors(SHAPES, F32)
    torch_step(params, optimizer, gradients)
    mine.step(gradients, [span(len(SHAPES), **settings)], before=start)
    assert_same(mine, params, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))


def test_every_span_has_its_own_numbers():
    groups = [
        (2, {"lr": 0.1, "beta1": 0.5}),
        (0, {"lr": 9.0}),
        (3, {"weight_decay": 0.01, "amsgrad": True}),
        (5, {"weight_decay": 0.1, "decoupled": True, "maximize": True, "eps": 1e-3}),
    ]
    start = tensors(SHAPES, F64)
    params, optimizer = torch_adam(start, groups)
    mine = Mine(start)
    stops = itertools.accumulate(count for count, _ in groups)
    spans = [span(stop, **settings) for stop, (_, settings) in zip(stops, groups, strict=True)]
    for _ in range(3):
        gradients = tensors(SHAPES, F64)
        torch_step(params, optimizer, gradients)
        mine.step(gradients, spans)
    assert_same(mine, params, optimizer)


def test_first_step_by_hand():
    # From nothing: m = 0.5 g, v = 0.75 g², both corrected to g and g²: θ − η g/(|g| + ε), ε = 1, g = (1, −3), η = 0.5.
    mine = Mine([torch.tensor([1.0, 2.0], dtype=F64)])
    mine.step([torch.tensor([1.0, -3.0], dtype=F64)], [span(1, lr=0.5, beta1=0.5, beta2=0.25, eps=1.0)])
    assert mine.params[0].tolist() == pytest.approx([1 - 0.5 / 2, 2 + 0.5 * 3 / 4], rel=1e-15)
    assert mine.steps[0].item() == 1


def test_numbers_of_steps_of_either_dtype():
    start = tensors([(3,), (3,)], F32)
    params, optimizer = torch_adam(start, [(2, {})])
    mine = Mine(start)
    mine.steps[1] = mine.steps[1].double()
    for _ in range(3):
        gradients = tensors([(3,), (3,)], F32)
        torch_step(params, optimizer, gradients)
        mine.step(gradients, [span(2)])
    assert all(torch.equal(a, b.detach()) for a, b in zip(mine.params, params, strict=True))
    assert [step.item() for step in mine.steps] == [3, 3]


# -- which base steps are taken in Rust -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (torch.optim.SGD, FusedSGD),
        (torch.optim.Adam, FusedAdam),
        (torch.optim.AdamW, FusedAdam),
        (torch.optim.NAdam, type(None)),
        (type("Own", (torch.optim.Adam,), {}), type(None)),
    ],
)
def test_what_is_fused(base, kind):
    assert type(fused_for(base([torch.ones(2, requires_grad=True)], lr=0.1))) is kind


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_prepared_steps_are_those_of_the_base(kind):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    base, other = (kind([{"params": [a]}, {"params": [b], "lr": 0.3}], lr=0.1) for a, b in (params, twins))
    fused = fused_for(base)
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in params]
        for p, twin, g in zip(params, twins, gradients, strict=True):
            p.grad, twin.grad = g, g.clone()
        assert fused.possible(params, gradients)
        groups = [(group, group["params"]) for group in base.param_groups]
        done = []
        fused.step_(params, [], fused.prepare(groups, gradients), done)
        other.step()
        assert done == [True]
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)
        assert base.state[p].keys() == other.state[twin].keys()
        for key, value in base.state[p].items():
            theirs = other.state[twin][key]
            assert value is None or (torch.equal(value, theirs) and value.dtype == theirs.dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"foreach": True},
        {"fused": True},
        {"capturable": True},
        {"differentiable": True},
        {"lr": torch.tensor(0.1)},
        {"betas": (torch.tensor(0.9), 0.999)},
        {"amsgrad": True},
    ],
    ids=str,
)
def test_options_that_only_torch_can_step(change):
    p = torch.nn.Parameter(torch.ones(3))
    base = torch.optim.Adam([p], lr=0.1)
    p.grad = torch.ones(3)
    base.step()
    assert fused_for(base).possible([p], [p.grad])
    base.param_groups[0].update(change)  # amsgrad: the state lacks what it needs, and torch says so
    assert not fused_for(base).possible([p], [p.grad])


DENSE, COUNT = torch.ones(2, 2), torch.zeros(())
NEW = [None]
POSSIBLE = [
    ([], [], [], [], [], [], True),
    ([DENSE], [DENSE], NEW, NEW, NEW, NEW, True),
    ([DENSE], [DENSE], [DENSE], [DENSE], [], [COUNT], True),
    ([DENSE.T], [DENSE.T], [DENSE.T], [DENSE.T], [DENSE.T], [COUNT.double()], True),
    ([DENSE], [DENSE], [DENSE.double()], [DENSE], NEW, [COUNT], False),
    ([torch.ones(2, 3)], [torch.ones(3, 2).T], NEW, NEW, NEW, NEW, False),
    ([DENSE.half()], [DENSE.half()], NEW, NEW, NEW, NEW, False),
    ([DENSE.bfloat16()], [DENSE.bfloat16()], NEW, NEW, NEW, NEW, False),
    ([DENSE], [], NEW, NEW, NEW, NEW, False),
    ([DENSE], [DENSE], [DENSE, DENSE], NEW, NEW, NEW, False),
    ([DENSE], [DENSE], [DENSE], [DENSE], NEW, [COUNT.long()], False),
    ([DENSE], [DENSE], [DENSE], [DENSE], NEW, [torch.zeros(1)], False),
]


@pytest.mark.parametrize("row", POSSIBLE, ids=str)
def test_step_possible(row):
    *arguments, possible = row
    assert rust.adam_step_possible(*arguments) is possible


# -- errors -----------------------------------------------------------------------------------------------------------

P, G, M, V, B = (torch.ones(2, 3) for _ in range(5))
T = torch.ones(())


def step(params=(P,), before=(), gradients=(G,), averages=(M,), squares=(V,), largest=(), steps=(T,), spans=None):
    lists = [list(each) for each in (params, before, gradients, averages, squares, largest, steps)]
    rust.adam_step_(*lists, [span(len(params))] if spans is None else spans)


ERRORS = [
    (lambda: step(gradients=()), ValueError, ["gradients", "0", "1"]),
    (lambda: step(gradients=(G[:1],)), ValueError, ["gradients[0]", "(1, 3)", "(2, 3)"]),
    (lambda: step(gradients=(G.double(),)), ValueError, ["gradients[0]", "float64", "float32"]),
    (lambda: step(averages=(M, M)), ValueError, ["exp_avgs", "2", "1"]),
    (lambda: step(squares=(V.double(),)), ValueError, ["exp_avg_sqs[0]", "float64", "float32"]),
    (lambda: step(before=(B[:1],)), ValueError, ["before[0]", "(1, 3)"]),
    (lambda: step(largest=(V, V)), ValueError, ["max_exp_avg_sqs", "2", "1"]),
    (lambda: step(spans=[span(1, amsgrad=True)]), ValueError, ["max_exp_avg_sqs[0]", "none", "amsgrad"]),
    (
        lambda: step(largest=(B.double(),), spans=[span(1, amsgrad=True)]),
        ValueError,
        ["max_exp_avg_sqs[0]", "float64", "float32"],
    ),
    (lambda: step(steps=()), ValueError, ["steps", "0", "1"]),
    (lambda: step(steps=(T.long(),)), ValueError, ["steps[0]", "0-dim"]),
    (lambda: step(steps=(-T,)), ValueError, ["steps[0]", "-1", "≥ 0"]),
    (lambda: step(steps=(math.nan * T,)), ValueError, ["steps[0]", "NaN"]),
    (
        lambda: step((P, B), (), (G, G), (M, M.clone()), (V, V.clone()), (), (T, T)),
        ValueError,
        ["steps", "share memory"],
    ),
    (lambda: step(spans=[]), ValueError, ["spans", "0", "1"]),
    (lambda: step(spans=[span(2)]), ValueError, ["spans[0].stop", "2"]),
    (lambda: step(spans=[span(1, lr=math.nan)]), ValueError, ["spans[0].lr", "NaN"]),
    (lambda: step(spans=[span(1, eps=math.inf)]), ValueError, ["spans[0].eps", "inf"]),
    (lambda: step(spans=[span(1, weight_decay=math.inf)]), ValueError, ["spans[0].weight_decay", "inf"]),
    (lambda: step(spans=[span(1, beta1=1.0)]), ValueError, ["spans[0].beta1", "1", "below 1"]),
    (lambda: step(spans=[span(1, beta2=-0.1)]), ValueError, ["spans[0].beta2", "-0.1"]),
    (lambda: step(params=(P.half(),), gradients=(G.half(),), averages=(M.half(),), squares=(V.half(),)),
     ValueError, ["params[0]", "float32"]),
    (lambda: step(averages=(P,)), ValueError, ["params", "share memory"]),
    (lambda: step(averages=(None,)), TypeError, ["exp_avgs", "None"]),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "fragments"), ERRORS, ids=[" ".join(row[2]) for row in ERRORS])
def test_errors_name_argument_value_and_what_is_expected_and_change_nothing(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all((tensor == 1).all() for tensor in (P, G, M, V, B, T))
