"""Eqs. (6)–(8) in Rust: the norm, the perturbation, the way back, and a body that runs in between."""

import math
import random

import pytest
import reference as paper
import torch
from hypothesis import given
from hypothesis import strategies as st

from igm_rs import _igm_rs as rust

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf
RHO = 0.05


def transposed(shape, dtype):
    return torch.randn(shape[::-1], dtype=F64).to(dtype).permute(tuple(range(len(shape)))[::-1])


def with_gaps(shape, dtype):
    return torch.randn([2 * n for n in shape], dtype=F64).to(dtype)[tuple(slice(None, None, 2) for _ in shape)]


def contiguous(shape, dtype):
    return torch.randn(shape, dtype=F64).to(dtype)


SHAPES = [(3, 4), (5,), (), (1,), (0,), (17, 9), (2, 3, 4, 5)]

LAYOUTS = {
    "float32": [(contiguous, F32)],
    "float64": [(contiguous, F64)],
    "transposed": [(transposed, F32)],
    "with gaps": [(with_gaps, F64)],
    "float32 beside float64": [(contiguous, F32), (contiguous, F64)],
    "everything": [(contiguous, F32), (with_gaps, F32), (transposed, F64), (contiguous, BF16), (contiguous, F16)],
    "bfloat16": [(contiguous, BF16)],
    "float16": [(with_gaps, F16)],
}


def room(tensor, device=None):
    """Return uninitialised memory of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


def tensors(layout, device, shapes=SHAPES):
    """Return a list of tensors with the given layouts in turn, each with its own memory on the device."""
    kinds = LAYOUTS[layout]
    made = [kinds[i % len(kinds)][0](shape, kinds[i % len(kinds)][1]) for i, shape in enumerate(shapes)]
    if device.type == "cpu":
        return made
    return [room(t, device).copy_(t) for t in made]


def like(params):
    """Return tensors of the same layout."""
    return [room(p).copy_(torch.randn(p.shape)) for p in params]


def problem(layout, device):
    """Return params, gradients and room for the copy."""
    params = tensors(layout, device)
    return params, like(params), like(params)


def exact_norm(gradients):
    """Return the norm from an exactly rounded sum of squares."""
    return math.sqrt(math.fsum(x * x for g in gradients for x in g.double().cpu().flatten().tolist()))


def copies(params):
    return [p.detach().clone() for p in params]


def bits(tensor):
    """Return the bits as integers, so that −0 differs from 0 and NaN equals itself."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(kind)


def same_bits(actual, expected):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(actual, expected, strict=True))


def places(params):
    return [(p.data_ptr(), p.stride(), p.dtype, p.shape) for p in params]


def realised(params, before):
    return [p.detach().double() - b.double() for p, b in zip(params, before, strict=True)]


each_layout = pytest.mark.parametrize("layout", LAYOUTS)


# -- gradient_norm ----------------------------------------------------------------------------------------------------


def test_norm_by_hand(device):
    gradients = [torch.tensor([3.0, 0], device=device), torch.tensor([[4.0]], device=device)]
    norm = rust.gradient_norm(gradients)
    assert norm.item() == 5
    assert norm.shape == ()
    assert norm.device.type == device.type
    norm = rust.gradient_norm(gradients=[])
    assert (norm.item(), norm.dtype, norm.device.type) == (0.0, F64, "cpu")


@each_layout
def test_norm_agrees_with_the_reference(device, layout):
    gradients = tensors(layout, device)
    kept = copies(gradients)
    norm = rust.gradient_norm(gradients)
    tolerance = 1e-12 if norm.dtype == F64 else 1e-6
    assert norm.item() == pytest.approx(exact_norm(gradients), rel=tolerance)
    assert norm.item() == pytest.approx(paper.global_norm(gradients), rel=tolerance)
    assert same_bits(gradients, kept)
    if device.type == "cpu":
        assert norm.dtype == F64


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    dtype=st.sampled_from([F32, F64]),
    exponent=st.integers(-18, 18),
)
def test_norm_of_any_sizes(device, sizes, dtype, exponent):
    torch.manual_seed(len(sizes))
    exponent = exponent if device.type == "cpu" else exponent // 3  # there squares may be taken in float32
    gradients = [(10.0**exponent * torch.randn(n)).to(device, dtype) for n in sizes]
    norm = rust.gradient_norm(gradients)
    assert norm.item() == pytest.approx(exact_norm(gradients), rel=1e-12 if norm.dtype == F64 else 1e-6)


def test_norm_of_large_and_small_float32_numbers_neither_overflows_nor_vanishes():
    for scale in (1e-30, 1e30):
        assert rust.gradient_norm([torch.full((4,), scale)]).item() == pytest.approx(2 * scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_norm_is_the_same_to_the_bit_on_any_number_of_threads(dtype):
    gradients = [torch.randn(n, dtype=dtype) for n in (250_001, 3, 65_536, 65_537, 10_000)]
    norms = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms.update(rust.gradient_norm(gradients).item() for _ in range(3))
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(torch.cat(gradients).double().norm().item(), rel=1e-12)


def test_norm_does_not_depend_on_the_order_or_on_how_the_tensors_are_cut(device):
    whole = torch.randn(10_000, dtype=F64, device=device)
    norm = rust.gradient_norm([whole]).item()
    shuffler = random.Random(0)
    for size in (1, 7, 1024, 9_999):
        pieces = list(whole.split(max(size, 10)))
        assert rust.gradient_norm(pieces).item() == pytest.approx(norm, rel=1e-13)
        shuffler.shuffle(pieces)
        assert rust.gradient_norm(pieces).item() == pytest.approx(norm, rel=1e-13)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@each_layout
def test_norm_of_non_finite_gradients_is_not_finite(device, layout, bad):
    gradients = tensors(layout, device)
    gradients[5][3, 2] = bad
    assert not math.isfinite(rust.gradient_norm(gradients).item())


# -- perturb_ ---------------------------------------------------------------------------------------------------------


def test_perturb_by_hand(device):
    # g = (3, 0, 4), ‖g‖ = 5, ρ = 0.5 and 5: ε* = (0.3, 0) and (4).
    params = [torch.tensor([1.0, 2.0], dtype=F64, device=device), torch.tensor([10.0], dtype=F64, device=device)]
    gradients = [torch.tensor([3.0, 0.0], dtype=F64, device=device), torch.tensor([4.0], dtype=F64, device=device)]
    before = [torch.empty_like(p) for p in params]
    norm = torch.tensor(5.0, dtype=F64, device=device)
    stats = rust.perturb_(params=params, gradients=gradients, before=before, norm=norm, rhos=[0.5, 5.0], measure=True)
    assert [b.tolist() for b in before] == [[1, 2], [10]]
    assert params[0].tolist() == pytest.approx([1.3, 2.0], rel=1e-15)
    assert params[1].tolist() == [14.0]
    assert stats.shape == (3,)
    assert stats.dtype == (F64 if device.type == "cpu" else F32)
    assert stats.tolist() == pytest.approx([math.hypot(0.3, 4.0), 2, 2], rel=1e-6)


@each_layout
def test_perturbation_is_that_of_the_reference(device, layout):
    params, gradients, before = problem(layout, device)
    old, where = copies(params), places(params)
    norm = rust.gradient_norm(gradients)
    stats = rust.perturb_(params, gradients, before, norm, [RHO] * len(params))
    assert same_bits(before, old)
    assert places(params) == where
    cpu = [g.cpu() for g in gradients]
    for p, b, epsilon in zip(params, old, paper.perturbation([g.double() for g in cpu], RHO), strict=True):
        expected = b.double().cpu() + epsilon
        # float32: the sum is rounded once; half floats: once more, to theirs.
        rounding = {F64: 1e-15, F32: 1.2e-7, F16: 2e-3, BF16: 1.6e-2}[p.dtype]
        torch.testing.assert_close(p.double().cpu(), expected, rtol=rounding, atol=1e-7 if p.dtype != F64 else 1e-15)
    moves = realised(params, old)
    length, moved, nonzero = stats.tolist()
    exact = device.type == "cpu" and layout == "float64"
    assert length == pytest.approx(exact_norm(moves), rel=1e-12 if exact else 1e-6)
    assert moved == sum(m.count_nonzero().item() for m in moves)
    assert nonzero == sum(g.count_nonzero().item() for g in gradients)


@pytest.mark.parametrize("layout", ["float64", "float32", "transposed", "with gaps", "float32 beside float64"])
@pytest.mark.parametrize("rho", [0.01, 0.05, 0.5])
def test_realised_perturbation_has_length_rho(device, layout, rho):
    params, gradients, before = problem(layout, device)
    stats = rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), [rho] * len(params))
    # float64 weights take ε* to 1e-12; float32 weights of size 1 round a ρ of 0.01 by about 1e-5 of itself.
    exact = device.type == "cpu" and all(p.dtype == F64 for p in params)
    assert stats[0].item() == pytest.approx(rho, rel=1e-12 if exact else 1e-5)
    moves, cpu = realised(params, before), [g.double() for g in gradients]
    inner = sum((m * g).sum().item() for m, g in zip(moves, cpu, strict=True))
    assert inner == pytest.approx(rho * exact_norm(gradients), rel=1e-12 if exact else 1e-5)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    dtype=st.sampled_from([F32, F64]),
    rho=st.floats(0.02, 0.1),
)
def test_perturbation_of_any_sizes(device, sizes, dtype, rho):
    torch.manual_seed(sum(sizes))
    params = [torch.zeros(n, dtype=dtype, device=device) for n in sizes]  # at zero ε* is stored as it is
    gradients, before = like(params), like(params)
    norm = rust.gradient_norm(gradients)
    if norm.item() == 0:
        return
    stats = rust.perturb_(params, gradients, before, norm, [rho] * len(params))
    tolerance = 1e-12 if dtype == F64 and device.type == "cpu" else 1e-6
    for p, epsilon in zip(params, paper.perturbation([g.double() for g in gradients], rho), strict=True):
        torch.testing.assert_close(p.double(), epsilon, rtol=tolerance, atol=0)
    assert stats.tolist() == pytest.approx([rho, sum(sizes), sum(sizes)], rel=tolerance)


@each_layout
def test_tensors_without_gradient_do_not_move(device, layout):
    params, gradients, before = problem(layout, device)
    gradients[0].zero_()
    old = copies(params)
    stats = rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params))
    assert same_bits(params[:1], old[:1])
    assert stats[2].item() == sum(g.count_nonzero().item() for g in gradients)


@each_layout
def test_rho_zero_does_not_move_its_tensor(device, layout):
    params, gradients, before = problem(layout, device)
    old = copies(params)
    rhos = [0.0 if i % 2 else RHO for i in range(len(params))]
    rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), rhos)
    assert all(torch.equal(p, o) for p, o in zip(params[1::2], old[1::2], strict=True))
    assert not torch.equal(params[0], old[0])


def test_effective_perturbation_of_a_rho_below_the_resolution(device):
    # 10 weights of 1 in float32, each to move by 1e-9: none does, and the measurement says so.
    params, gradients = [torch.ones(10, device=device)], [torch.ones(10, device=device)]
    before = [torch.empty(10, device=device)]
    stats = rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), [1e-9 * 10**0.5])
    assert stats.tolist() == [0, 0, 10]
    # The same weights at 0 take it.
    params[0].zero_()
    stats = rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), [1e-9 * 10**0.5])
    assert stats.tolist() == pytest.approx([1e-9 * 10**0.5, 10, 10], rel=1e-6)


def test_measure_false_returns_nothing_and_moves_the_same(device):
    params, gradients, before = problem("everything", device)
    twins = [t.clone() for t in params]
    norm = rust.gradient_norm(gradients)
    rust.perturb_(params, gradients, before, norm, [RHO] * len(params), measure=True)
    assert rust.perturb_(twins, gradients, before, norm, [RHO] * len(params), measure=False) is None
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


def test_overlapping_parameters_are_refused_and_nothing_moves(device):
    params = [torch.ones(4, device=device)[::2], torch.ones(1, device=device).expand(3), torch.ones(2, device=device)]
    gradients = [torch.ones(p.shape, device=device) for p in params]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        rust.perturb_(params, gradients, copies(params), rust.gradient_norm(gradients), [RHO] * 3)
    assert "\n" not in str(caught.value)
    assert all((p == 1).all() for p in params)


def test_perturb_nothing():
    stats = rust.perturb_([], [], [], torch.tensor(1.0, dtype=F64), [])
    assert stats.tolist() == [0, 0, 0]


@each_layout
@pytest.mark.parametrize("norm", [0.0, NAN, INF])
def test_unusable_norm_moves_nothing(device, layout, norm):
    params, gradients, before = problem(layout, device)
    old, room = copies(params), copies(before)
    bad = torch.tensor(norm, dtype=F64, device=device)
    if device.type == "cpu":
        with pytest.raises(ArithmeticError, match="norm"):
            rust.perturb_(params, gradients, before, bad, [RHO] * len(params))
        assert same_bits(before, room)
    else:  # nothing waits for the device to say so
        rust.perturb_(params, gradients, before, bad, [RHO] * len(params))
        assert same_bits(before, old)
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))


@pytest.mark.cuda
def test_unusable_gradients_move_nothing_on_a_device():
    params, gradients, before = problem("float32", torch.device("cuda"))
    old = copies(params)
    gradients[0].fill_(INF)
    rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params))
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))


def test_gradients_of_another_dtype_are_taken(device):
    # Mixed precision: float32 weights with a bfloat16 gradient.
    params, before = [torch.zeros(2, device=device)], [torch.ones(2, device=device)]
    gradients = [torch.tensor([3.0, 4.0], dtype=BF16, device=device)]
    rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), [5.0])
    torch.testing.assert_close(params[0].cpu(), torch.tensor([3.0, 4.0]))
    assert before[0].tolist() == [0, 0]


def test_parameters_of_autograd_can_be_perturbed(device):
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    before, gradient = [torch.empty(3, device=device)], [torch.ones(3, device=device)]
    rust.perturb_([parameter], gradient, before, rust.gradient_norm(gradient), [RHO])
    assert parameter.requires_grad
    assert parameter.is_leaf
    rust.restore_([parameter], before)
    assert parameter.tolist() == [1, 1, 1]


def test_two_threads_give_the_same_bits():
    shapes = [(300_001,), (70_000,), (5,)]
    params, gradients = tensors("float32", torch.device("cpu"), shapes), tensors("float32", torch.device("cpu"), shapes)
    twins, before = copies(params), like(params)
    norm = rust.gradient_norm(gradients)
    one = rust.perturb_(params, gradients, before, norm, [RHO] * 3)
    torch.set_num_threads(2)
    two = rust.perturb_(twins, gradients, before, norm, [RHO] * 3)
    assert same_bits(params, twins)
    assert torch.equal(one, two)


# -- p = ∞, adaptive, half precision -----------------------------------------------------------------------------------

RULES = {
    "p=2": {},
    "adaptive": {"adaptive": True},
    "p=inf": {"p": INF},
    "p=inf adaptive": {"p": INF, "adaptive": True},
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


def the_norm(gradients, params, rule):
    return rust.gradient_norm(gradients, params if rule.get("adaptive") else None)


def epsilon_of(rule, rho, norm, theta, g):
    """Return ε* as the papers define it, in float64."""
    t = theta.abs() + 0.01 if rule.get("adaptive") else torch.ones_like(theta)
    return rho * t * g.sign() if "p" in rule else rho * t**2 * g / norm


def test_rules_by_hand(device):
    # θ = (1, −2), g = (3, −4), T = (1.01, 2.01), ‖T g‖ = √(3.03² + 8.04²), ρ = 0.5.
    def moved(**rule):
        params = [torch.tensor([1.0, -2.0], dtype=F64, device=device)]
        gradients = [torch.tensor([3.0, -4.0], dtype=F64, device=device)]
        norm = the_norm(gradients, params, rule)
        stats = rust.perturb_(params, gradients, [torch.empty_like(params[0])], norm, [0.5], **rule)
        return stats.tolist(), (params[0].cpu() - torch.tensor([1.0, -2.0], dtype=F64)).tolist(), norm.item()

    length = math.hypot(3.03, 8.04)
    assert moved(p=2)[1] == pytest.approx([0.3, -0.4])
    assert moved(adaptive=True)[2] == pytest.approx(length)
    expected = [0.5 * 1.01**2 * 3 / length, -0.5 * 2.01**2 * 4 / length]
    assert moved(adaptive=True)[1] == pytest.approx(expected)
    assert moved(p=INF)[1] == pytest.approx([0.5, -0.5])
    assert moved(p=INF, adaptive=True)[1] == pytest.approx([0.505, -1.005])
    assert moved(p=INF)[0] == pytest.approx([0.5**0.5, 2, 2])


@each_layout
@each_rule
def test_every_rule_is_that_of_its_paper(device, layout, rule):
    params, gradients, before = problem(layout, device)
    gradients[0][0, :2] = 0
    old = copies(params)
    norm = the_norm(gradients, params, rule)
    if rule.get("adaptive"):
        scaled = [(p.double().abs() + 0.01) * g.double() for p, g in zip(params, gradients, strict=True)]
        assert norm.item() == pytest.approx(exact_norm(scaled), rel=1e-12 if norm.dtype == F64 else 1e-6)
    rust.perturb_(params, gradients, before, norm, [RHO] * len(params), **rule)
    assert same_bits(before, old)
    for p, theta, g in zip(params, old, gradients, strict=True):
        expected = theta.double() + epsilon_of(rule, RHO, norm.double(), theta.double(), g.double())
        rounding = {F64: 1e-15, F32: 1.2e-7, F16: 2e-3, BF16: 1.6e-2}[p.dtype]
        torch.testing.assert_close(p.double(), expected, rtol=rounding, atol=1e-6 if p.dtype != F64 else 1e-15)
    rust.restore_(params, before)
    assert same_bits(params, old)


def apart(tensor):
    """Return the same numbers with gaps between them, out of the fused loops' reach."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@each_rule
def test_fused_loops_and_multi_tensor_operations_give_the_same_bits(rule, dtype):
    shapes = [(1000,), (7, 5), (), (0,), (33,), (1,), (8, 16)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    gradients = [(10 ** torch.randn(shape) * torch.randn(shape)).to(dtype) for shape in shapes]
    numbers = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 6e-8, 6e4, -6e4, 6.1e-5, -3e-5, 1.0, 0.3]).to(dtype)
    params[0][:11], gradients[0][:121] = numbers, numbers.repeat(11)
    params[0][:121] = numbers.repeat_interleave(11)
    twins, slopes = [apart(p) for p in params], [apart(g) for g in gradients]
    assert not twins[0].is_contiguous()
    norm = the_norm(gradients, params, rule)
    assert the_norm(slopes, twins, rule).item() == pytest.approx(norm.item(), rel=1e-12)
    rooms = [copies(params), [apart(p) for p in params]]
    rhos = [RHO if i % 2 else 0.3 for i in range(len(params))]
    one = rust.perturb_(params, gradients, rooms[0], norm, rhos, **rule)
    two = rust.perturb_(twins, slopes, rooms[1], norm, rhos, **rule)
    assert same_bits(params, twins)
    assert same_bits(*rooms)
    assert one.tolist() == pytest.approx(two.tolist(), rel=1e-6)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    gradients = [every.flip(0).clone()]
    params, before = [every.clone()], [torch.empty_like(every)]
    rust.perturb_(params, gradients, before, torch.tensor(1.0, dtype=F64), [0.37])
    expected = (every.float() + gradients[0].float() * 0.37).to(dtype)
    assert same_bits(params, [expected])
    assert same_bits(before, [every])


def test_half_precision_perturbation_does_not_depend_on_the_threads():
    params, gradients = [torch.randn(200_003).bfloat16()], [torch.randn(200_003).bfloat16()]
    twins, before = copies(params), copies(params)
    norm = rust.gradient_norm(gradients)
    one = rust.perturb_(params, gradients, before, norm, [3.0])
    torch.set_num_threads(2)
    assert rust.gradient_norm(gradients).item() == norm.item()
    assert torch.equal(rust.perturb_(twins, gradients, before, norm, [3.0]), one)
    assert same_bits(params, twins)


@each_rule
@pytest.mark.parametrize("bad", [0.0, NAN, INF])
def test_no_rule_moves_anything_with_an_unusable_norm(device, rule, bad):
    params, gradients, before = problem("float32", device)
    old = copies(params)
    norm = torch.tensor(bad, dtype=F64, device=device)
    if device.type == "cpu":
        with pytest.raises(ArithmeticError, match="norm"):
            rust.perturb_(params, gradients, before, norm, [RHO] * len(params), **rule)
    else:
        rust.perturb_(params, gradients, before, norm, [RHO] * len(params), **rule)
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))


@each_rule
def test_at_perturbed_takes_the_same_rules(device, rule):
    params, gradients, before = problem("everything", device)
    old, twins = copies(params), [room(p).copy_(p) for p in params]
    norm = the_norm(gradients, params, rule)
    expected = rust.perturb_(twins, gradients, like(params), norm, [RHO] * len(params), **rule)
    seen = []
    stats = rust.at_perturbed(
        params, gradients, before, norm, [RHO] * len(params), lambda told: seen.append((told, copies(params))), **rule
    )
    ((told, there),) = seen
    assert told is stats
    assert same_bits(there, twins)
    torch.testing.assert_close(stats, expected)
    assert same_bits(params, old)


def test_the_body_is_told_none_where_nothing_is_measured(device):
    params, gradients, before = problem("float32", device)
    seen, norm = [], rust.gradient_norm(gradients)
    assert rust.at_perturbed(params, gradients, before, norm, [RHO] * len(params), seen.append, False) is None
    assert seen == [None]


@pytest.mark.cuda
@each_rule
def test_nothing_waits_for_a_device(rule):
    params, gradients, before = problem("everything", torch.device("cuda"))
    usable = torch.tensor(True, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = the_norm(gradients, params, rule)
        rust.at_perturbed(params, gradients, before, norm, [RHO] * len(params), lambda _: None, **rule)
        rust.select_(params, before, usable)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- select_ ----------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("usable", [True, False])
def test_select_takes_back_what_is_not_usable(device, layout, usable):
    now, kept, _ = problem(layout, device)
    now += [torch.tensor(3, device=device), torch.tensor([True, False], device=device)]
    kept += [torch.tensor(2, device=device), torch.tensor([False, False], device=device)]
    now[5][0, 0] = NAN
    expected, where, of_kept = copies(now if usable else kept), places(now), copies(kept)
    for there in {device, torch.device("cpu")}:
        assert rust.select_(tensors=now, kept=kept, usable=torch.tensor(usable, device=there)) is None
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(now, expected, strict=True))
    assert places(now) == where
    assert all(torch.equal(a, b) for a, b in zip(kept, of_kept, strict=True))
    rust.select_([], [], torch.tensor(usable))


# -- restore_ ---------------------------------------------------------------------------------------------------------


@each_layout
def test_restore_is_exact_to_the_bit_and_in_place(device, layout):
    params, gradients, before = problem(layout, device)
    for special, number in enumerate((-0.0, NAN, INF, 5e-324)):
        params[5][special, 0] = number
    old, where = copies(params), places(params)
    rust.perturb_(params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params), measure=False)
    assert not same_bits(params, old)
    assert rust.restore_(params=params, before=before) is None
    assert same_bits(params, old)
    assert same_bits(before, old)
    assert places(params) == where
    rust.restore_([], [])


# -- at_perturbed -----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """An exception that ``except Exception`` does not see."""


@each_layout
def test_body_runs_once_at_the_perturbed_weights(device, layout):
    params, gradients, before = problem(layout, device)
    old, where, seen = copies(params), places(params), []
    norm = rust.gradient_norm(gradients)
    twins = [room(p).copy_(p) for p in params]
    expected = rust.perturb_(twins, gradients, like(params), norm, [RHO] * len(params))

    def body(*arguments):
        seen.append((arguments, copies(params)))

    stats = rust.at_perturbed(
        params=params, gradients=gradients, before=before, norm=norm, rhos=[RHO] * len(params), body=body, measure=True
    )
    ((arguments, there),) = seen
    assert arguments == (stats,)
    assert same_bits(there, twins)
    assert same_bits(params, old)
    assert places(params) == where
    torch.testing.assert_close(stats, expected)


def test_body_that_returns_a_step_of_sgd_has_it_taken_from_the_weights_before():
    params, gradients, before = problem("float32", torch.device("cpu"))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = [torch.randn_like(p) for p in params]
    done = []
    span = (len(params), 0.1, 0.0, 0.0, 0.01, False, False)
    rust.at_perturbed(
        params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params),
        lambda _: ("sgd", second, [], [], [span], done),
    )  # fmt: skip
    for twin, gradient in zip(twins, second, strict=True):
        twin.grad = gradient
    torch.optim.SGD(twins, lr=0.1, weight_decay=0.01, foreach=False).step()
    assert same_bits(params, twins)
    assert done == [True]


def test_body_that_returns_a_step_of_adam_has_it_taken_from_the_weights_before():
    params, gradients, before = problem("float32", torch.device("cpu"))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = [torch.randn_like(p) for p in params]
    average, square = ([torch.zeros_like(p) for p in params] for _ in range(2))
    steps, done = [torch.zeros(()) for _ in params], []
    span = (len(params), 0.1, 0.9, 0.999, 1e-8, 0.01, False, False, True)
    rust.at_perturbed(
        params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params),
        lambda _: ("adam", second, average, square, [], steps, [span], done),
    )  # fmt: skip
    for twin, gradient in zip(twins, second, strict=True):
        twin.grad = gradient
    torch.optim.AdamW(twins, lr=0.1, weight_decay=0.01, foreach=False).step()
    assert same_bits(params, twins)
    assert [step.item() for step in steps] == [1] * len(params)
    assert done == [True]


@pytest.mark.parametrize("answer", [("rmsprop", [], []), (), (3,), ("sgd",), ("adam", [])], ids=str)
def test_a_tuple_that_is_no_step_is_an_error_and_restores(answer):
    params, gradients, before = problem("float32", torch.device("cpu"))
    old = copies(params)
    with pytest.raises(ValueError, match=r"sgd|tuple") as caught:
        rust.at_perturbed(
            params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params), lambda _: answer
        )
    assert "\n" not in str(caught.value)
    assert same_bits(params, old)


def test_a_step_of_sgd_that_cannot_be_taken_restores_to_the_bit():
    params, gradients, before = problem("float32", torch.device("cpu"))
    old, done = copies(params), []
    with pytest.raises(ValueError, match="gradients"):
        rust.at_perturbed(
            params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params),
            lambda _: ("sgd", gradients[:-1], [], [], [(len(params), 0.1, 0.0, 0.0, 0.0, False, False)], done),
        )  # fmt: skip
    assert same_bits(params, old)
    assert done == []


@pytest.mark.parametrize("answer", [True, 3, "yes"])
def test_body_that_returns_something_else_is_an_error_and_restores(answer):
    params, gradients, before = problem("float32", torch.device("cpu"))
    old = copies(params)
    with pytest.raises(TypeError, match=r"returned by body.*expected None or a tuple"):
        rust.at_perturbed(
            params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params), lambda _: answer
        )
    assert same_bits(params, old)


@each_layout
@pytest.mark.parametrize("error", [ValueError("v"), KeyboardInterrupt(), SystemExit(3), Stop("s"), GeneratorExit()])
def test_exception_in_the_body_restores_to_the_bit_and_is_raised_unchanged(device, layout, error):
    params, gradients, before = problem(layout, device)
    old, where, calls = copies(params), places(params), []

    def body(_):
        calls.append(not same_bits(params, old))
        params[0].fill_(3)  # what the body does to the weights is taken back as well
        raise error

    with pytest.raises(type(error)) as caught:
        rust.at_perturbed(params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params), body)
    assert caught.value is error
    assert calls == [True]
    assert same_bits(params, old)
    assert places(params) == where


def test_traceback_of_the_body_survives(device):
    params, gradients, before = problem("float32", device)

    def body(_):
        raise LookupError("from the body") from KeyError("cause")

    with pytest.raises(LookupError, match="from the body") as caught:
        rust.at_perturbed(params, gradients, before, rust.gradient_norm(gradients), [RHO] * len(params), body)
    assert isinstance(caught.value.__cause__, KeyError)
    assert [entry.name for entry in caught.traceback][-1] == "body"


def test_body_is_not_called_when_the_norm_is_unusable():
    params, gradients, before = problem("float32", torch.device("cpu"))
    old, calls = copies(params), []
    with pytest.raises(ArithmeticError, match="norm"):
        rust.at_perturbed(params, gradients, before, torch.tensor(0.0, dtype=F64), [RHO] * len(params), calls.append)
    assert calls == []
    assert same_bits(params, old)


def test_body_may_call_back_into_rust_and_use_autograd(device):
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=F64, device=device))
    gradient, before = [torch.tensor([2.0], dtype=F64, device=device)], [torch.empty(1, dtype=F64, device=device)]
    found = []

    def body(_):
        (parameter**2 / 2).sum().backward()
        found.append(rust.gradient_norm([parameter.grad]).item())

    rust.at_perturbed([parameter], gradient, before, rust.gradient_norm(gradient), [RHO], body, measure=False)
    assert found == pytest.approx([2.05], rel=1e-15)
    assert parameter.item() == 2.0


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_gradient_at_the_perturbed_weights_is_that_of_the_reference(device, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(device, dtype)
    x, y = torch.randn(20, 6).to(device, dtype), torch.randint(0, 3, (20,), device=device)
    params = list(model.parameters())
    old = copies(params)

    def loss():
        return torch.nn.functional.cross_entropy(model(x), y)

    expected, expected_loss = paper.sam_gradient(loss, params, RHO)
    _, gradients = paper.gradients_of(loss, params)
    found = []
    rust.at_perturbed(
        params, gradients, [torch.empty_like(p) for p in params], rust.gradient_norm(gradients), [RHO] * len(params),
        lambda _: found.append(paper.gradients_of(loss, params)),
    )  # fmt: skip
    ((value, second),) = found
    tolerance = 1e-12 if dtype == F64 else 1e-6
    assert value == pytest.approx(expected_loss, rel=tolerance)
    for mine, theirs in zip(second, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
    assert same_bits(params, old)


# -- errors -----------------------------------------------------------------------------------------------------------

P, G, B = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)
N = torch.tensor(1.0, dtype=F64)


def body(_):
    raise AssertionError("the body must not run")


ERRORS = [
    (lambda: rust.gradient_norm([G, None]), TypeError, ["gradients", "None"]),
    (lambda: rust.gradient_norm(G), TypeError, ["gradients"]),
    (lambda: rust.gradient_norm([G, G.long()]), ValueError, ["gradients[1]", "int64"]),
    (lambda: rust.gradient_norm([G, G.to(torch.complex64)]), ValueError, ["gradients[1]", "complex64"]),
    (lambda: rust.gradient_norm([G.to_sparse()]), ValueError, ["gradients[0]", "sparse"]),
    (lambda: rust.perturb_([P], [], [B], N, [RHO]), ValueError, ["gradients", "0", "1"]),
    (lambda: rust.perturb_([P], [G], [], N, [RHO]), ValueError, ["before", "0", "1"]),
    (lambda: rust.perturb_([P], [G], [B], N, []), ValueError, ["rhos", "0", "1"]),
    (lambda: rust.perturb_([P], [G], [B], N, [NAN]), ValueError, ["rhos[0]", "NaN"]),
    (lambda: rust.perturb_([P], [G], [B], N, [INF]), ValueError, ["rhos[0]", "inf"]),
    (lambda: rust.perturb_([P], [G[:1]], [B], N, [RHO]), ValueError, ["gradients[0]", "(1, 3)", "(2, 3)"]),
    (lambda: rust.perturb_([P], [G], [B.T], N, [RHO]), ValueError, ["before[0]", "(3, 2)", "(2, 3)"]),
    (lambda: rust.perturb_([P], [G], [B.double()], N, [RHO]), ValueError, ["before[0]", "float64", "float32"]),
    (lambda: rust.perturb_([P.long()], [G], [B], N, [RHO]), ValueError, ["params[0]", "int64"]),
    (lambda: rust.perturb_([P], [G], [B], N.reshape(1), [RHO]), ValueError, ["norm", "(1,)"]),
    (lambda: rust.perturb_([P], [G], [B], N.long(), [RHO]), ValueError, ["norm", "int64"]),
    (lambda: rust.perturb_([P], [G], [B], 1.0, [RHO]), TypeError, ["norm", "float"]),
    (lambda: rust.perturb_([P, P], [G, G], [B, B.clone()], N, [RHO] * 2), ValueError, ["params", "share memory"]),
    (lambda: rust.perturb_([P], [G], [P], N, [RHO]), ValueError, ["params", "share memory"]),
    (lambda: rust.perturb_([P], [G], [B], 1e-320 * N, [RHO]), ArithmeticError, ["rhos[0] / norm"]),
    (lambda: rust.gradient_norm([G], []), ValueError, ["weights", "0", "1", "gradients"]),
    (lambda: rust.gradient_norm([G], [P[:1]]), ValueError, ["weights[0]", "(1, 3)", "(2, 3)"]),
    (lambda: rust.gradient_norm([G], [P.long()]), ValueError, ["weights[0]", "int64"]),
    (lambda: rust.gradient_norm([G], [1]), TypeError, ["weights", "int"]),
    (lambda: rust.perturb_([P], [G], [B], N, [RHO], p=1), ValueError, ["p", "1", "2 or inf"]),
    (lambda: rust.perturb_([P], [G], [B], N, [RHO], p=NAN), ValueError, ["p", "NaN", "2 or inf"]),
    (lambda: rust.perturb_([P], [G], [B], N, [RHO], p="2"), TypeError, ["p", "str"]),
    (lambda: rust.perturb_([P], [G], [B], N, [RHO], adaptive=2), TypeError, ["adaptive", "int"]),
    (lambda: rust.perturb_([P], [G], [B], N, [1e39], p=INF), ArithmeticError, ["rhos[0]", "range of float32"]),
    (lambda: rust.at_perturbed([P], [G], [B], N, [RHO], body, p=3), ValueError, ["p", "3", "2 or inf"]),
    (lambda: rust.at_perturbed([P], [G], [B], N, [RHO], body, adaptive=0.5), TypeError, ["adaptive", "float"]),
    (lambda: rust.select_([P], [], N > 0), ValueError, ["kept", "0", "1"]),
    (lambda: rust.select_([P], [B[:1]], N > 0), ValueError, ["kept[0]", "(1, 3)", "(2, 3)"]),
    (lambda: rust.select_([P], [B.double()], N > 0), ValueError, ["kept[0]", "float64", "float32"]),
    (lambda: rust.select_([P], [B.to_sparse()], N > 0), ValueError, ["kept[0]", "sparse"]),
    (lambda: rust.select_([P.to_sparse()], [B], N > 0), ValueError, ["tensors[0]", "sparse"]),
    (lambda: rust.select_([P[:1].expand(2, 3)], [B], N > 0), ValueError, ["tensors[0]", "expanded"]),
    (lambda: rust.select_([P], [B], N), ValueError, ["usable", "float64", "0-dim tensor of bool"]),
    (lambda: rust.select_([P], [B], P > 0), ValueError, ["usable", "(2, 3)", "0-dim tensor of bool"]),
    (lambda: rust.select_([P], [B], True), TypeError, ["usable", "bool"]),
    (lambda: rust.restore_([P], []), ValueError, ["before", "0", "1"]),
    (lambda: rust.restore_([P], [B[:1]]), ValueError, ["before[0]", "(1, 3)", "(2, 3)"]),
    (lambda: rust.restore_([P], [B.double()]), ValueError, ["before[0]", "float64", "float32"]),
    (lambda: rust.restore_([P], ["b"]), TypeError, ["before", "str"]),
    (lambda: rust.at_perturbed([P], [G], [B], N, [], body), ValueError, ["rhos", "0", "1"]),
    (lambda: rust.at_perturbed([P], [G], [B[:1]], N, [RHO], body), ValueError, ["before[0]", "(1, 3)"]),
    (lambda: rust.at_perturbed([P], [G], [B], N, [RHO], 3), TypeError, ["body", "int"]),
    (lambda: rust.at_perturbed([P], [G], [B], NAN * N, [RHO], body), ArithmeticError, ["norm", "NaN"]),
]


@pytest.mark.parametrize(("call", "error", "fragments"), ERRORS, ids=[" ".join(row[2]) for row in ERRORS])
def test_errors_name_argument_value_and_what_is_expected_and_change_nothing(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all((tensor == 1).all() for tensor in (P, G, B))


@pytest.mark.cuda
def test_tensors_of_two_devices_are_refused():
    for arguments in (
        ([P.cuda()], [G], [B.cuda()], N.cuda()),
        ([P.cuda()], [G.cuda()], [B], N.cuda()),
        ([P.cuda()], [G.cuda()], [B.cuda()], N),
    ):
        with pytest.raises(ValueError, match="cpu"):
            rust.perturb_(*arguments, [RHO])
    with pytest.raises(ValueError, match=r"gradients\[1\].*cpu"):
        rust.gradient_norm([G.cuda(), G])
