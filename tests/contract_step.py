"""Rows A1 to A14 of the contract: the step."""

import contextlib
import copy
import itertools
import math
import warnings

import torch
from contract import check, expect
from contract_problems import (
    CLOSE,
    DECAY,
    LR,
    MOMENTUM,
    RHO,
    TWO,
    Loss,
    alike,
    close,
    in_turns,
    momentum,
    oracle,
    two_modalities,
    unmoved,
    usual,
    weights,
)
from models import batches
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Interrupted(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@check("A1", "is an Optimizer with groups of its own")
def a1_is_an_optimizer(subject):
    problem = Loss()
    first, second = problem.model[0], problem.model[2]
    opt = subject.make(
        problem.model, [{"params": first.parameters(), "lr": 0.3}, {"params": second.parameters()}], lr=LR
    )
    expect(isinstance(opt, torch.optim.Optimizer), "is no torch.optim.Optimizer")
    expect([group["lr"] for group in opt.param_groups] == [0.3, LR], "the lr of a group is lost")
    expect(opt.defaults["lr"] == LR, "the default lr is lost")
    expect(alike(opt.param_groups[0]["params"], list(first.parameters())), "holds other parameters")


@check("A1", "is built from a ready base optimizer", needs=("wraps",))
def a1_from_a_ready_base(subject):
    problem = Loss()
    base = torch.optim.SGD(problem.model.parameters(), lr=LR, momentum=MOMENTUM)
    problem.backward()
    base.step()
    twin, other, step = oracle(problem, subject)
    other.load_state_dict(copy.deepcopy(base.state_dict()))
    opt = subject.around(base)
    subject.step(opt, problem.closure(opt, 1))
    step(lambda: twin(1))
    close(problem, twin, CLOSE, "does not go on with the momentum of the base")


@check("A2", "step(closure) without gradients beforehand moves the weights and returns the loss at θ")
def a2_no_gradients_beforehand(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject)
    expected = problem().item()
    loss = opt.step(problem.closure(opt))
    step(twin)
    close(problem, twin, CLOSE, "another step than with gradients beforehand")
    expect(loss is not None, "returned None")
    expect(float(loss) == expected, "returned another loss than that of the first pass")


@check("A2", "the closure runs with gradients enabled, twice with SAM and once without")
def a2_calls_of_the_closure(subject):
    problem = Loss()
    opt = usual(subject, problem)
    enabled = []
    inner = problem.closure(opt)

    def closure():
        enabled.append(torch.is_grad_enabled())
        return inner()

    subject.step(opt, closure)
    passes = 2 if subject.sam else 1
    expect(len(enabled) == passes, f"{len(enabled)} passes, not {passes}")
    expect(all(enabled), "gradients are disabled in the closure")
    with torch.no_grad():
        opt.step(closure)
    expect(all(enabled), "gradients are disabled in the closure")


@check("A2", "with rho=0 the closure runs once", needs=("sam",))
def a2_one_pass_when_switched_off(subject):
    problem = Loss()
    opt = usual(subject, problem, rho=0.0)
    subject.step(opt, problem.closure(opt))
    expect(problem.passes == 1, f"{problem.passes} passes with rho=0, not 1")


@check("A3", "step() is the base optimizer's step")
def a3_without_closure(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject, rho=0.0)
    for t in range(3):
        problem.backward(t)
        opt.step()
        step(lambda t=t: twin(t))
    close(problem, twin, 0.0, "not the base's step")


@check("A3", "a step() that leaves SAM out is warned about once, and counted", needs=("sam",))
def a3_told_once(subject):
    problem = Loss()
    opt = usual(subject, problem)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(3):
            problem.backward(t)
            opt.step()
    expect(len(caught) == 1, f"warned {len(caught)} times in three steps")
    expect(subject.counters(opt).get("unperturbed") == 3, "not counted")


@check("A4", "first_step() and second_step() are step(closure)", needs=("sam",))
def a4_two_calls(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject)
    before = weights(problem.model)
    for t in range(3):
        subject.two_calls(opt, problem.closure(opt, t))
        step(lambda t=t: twin(t))
    close(problem, twin, CLOSE, "not the step of SAM")
    problem.backward()
    before = weights(problem.model)
    opt.first_step()
    pairs = zip(problem.model.parameters(), before, strict=True)
    length = math.sqrt(sum((p - q).square().sum().item() for p, q in pairs))
    expect(abs(length - RHO) <= 1e-6 * RHO, "the perturbation has another length than rho")


def _fails_in_pass(subject, which, error):
    problem = Loss()
    opt = usual(subject, problem)
    for t in range(2):
        subject.step(opt, problem.closure(opt, t))
    before, state = weights(problem.model), momentum(opt)
    twin, other, step = oracle(problem, subject)
    for p, q in zip(twin.model.parameters(), problem.model.parameters(), strict=True):
        other.state[p]["momentum_buffer"] = opt.state[q]["momentum_buffer"].clone()
    calls = []
    inner = problem.closure(opt, 2)

    def closure():
        calls.append(None)
        loss = inner()
        if len(calls) == which:
            raise error
        return loss

    try:
        subject.step(opt, closure)
    except error:
        pass
    else:
        expect(False, "the exception did not come through")
    expect(len(calls) == which, f"failed in call {len(calls)}, not {which}")
    unmoved(problem.model, before, f"{error.__name__} in pass {which}: the weights have changed")
    expect(alike(state, momentum(opt)), f"{error.__name__} in pass {which}: the state has changed")
    subject.step(opt, problem.closure(opt, 2))
    step(lambda: twin(2))
    close(problem, twin, CLOSE, f"the step after {error.__name__} in pass {which} is another")


@check("A5", "an exception in the first pass")
def a5_exception_in_pass_1(subject):
    for error in (ValueError, KeyboardInterrupt, Interrupted):
        _fails_in_pass(subject, 1, error)


@check("A5", "an exception in the second pass", needs=("sam",))
def a5_exception_in_pass_2(subject):
    for error in (ValueError, KeyboardInterrupt, Interrupted):
        _fails_in_pass(subject, 2, error)


@check("A5", "a failure in the middle of the base's own step")
def a5_base_fails_half_way(subject):
    problem = Loss()
    opt = usual(subject, problem)
    subject.step(opt, problem.closure(opt))
    last = list(problem.model.parameters())[-1]
    opt.state[last]["momentum_buffer"] = torch.zeros(17, dtype=last.dtype)  # no buffer of this parameter
    before, state = weights(problem.model), momentum(opt)
    try:
        subject.step(opt, problem.closure(opt, 1))
    except (RuntimeError, ValueError):
        pass
    else:
        expect(False, "a momentum buffer of a wrong shape was taken")
    unmoved(problem.model, before, "the weights have changed")
    expect(alike(state, momentum(opt)), "the momentum has changed")


def _poisoned(subject, which, poison):
    """A step in whose pass `which` (1 or 2) the gradient is `poison`, or in both where it is a zero."""
    problem = Loss()
    opt = usual(subject, problem, weight_decay=DECAY)
    for t in range(2):
        subject.step(opt, problem.closure(opt, t))
    before, state = weights(problem.model), momentum(opt)
    counted = subject.counters(opt).get("skipped", 0)
    calls = []
    inner = problem.closure(opt, 2)
    last = list(problem.model.parameters())[-1]

    def closure():
        calls.append(None)
        loss = inner()
        if len(calls) == which:
            if poison == 0:
                for p in problem.model.parameters():
                    p.grad.zero_()
            else:
                last.grad[0] = poison
        return loss

    subject.step(opt, closure)
    what = f"gradient {poison:g} in pass {which}"
    unmoved(problem.model, before, f"{what}: the weights have changed")
    expect(alike(state, momentum(opt)), f"{what}: the momentum has changed")
    return subject.counters(opt).get("skipped", 0) - counted


@check("A6", "an infinite or NaN gradient in the first pass moves nothing")
def a6_not_finite_in_pass_1(subject):
    for poison in (math.inf, -math.inf, math.nan):
        _poisoned(subject, 1, poison)


@check("A6", "an infinite or NaN gradient in the second pass moves nothing", needs=("sam",))
def a6_not_finite_in_pass_2(subject):
    for poison in (math.inf, -math.inf, math.nan):
        _poisoned(subject, 2, poison)


@check("A6", "a zero gradient in either pass moves nothing", needs=("sam",))
def a6_zero(subject):
    for which in (1, 2):
        _poisoned(subject, which, 0)


@check("A6", "a skipped step is counted", needs=("sam",))
def a6_counted(subject):
    for which, poison in itertools.product((1, 2), (math.nan, 0)):
        counted = _poisoned(subject, which, poison)
        expect(counted == 1, f"gradient {poison:g} in pass {which}: counted {counted} times as skipped")


def _in_one_pass(subject, present):
    problem = Loss()
    opt = usual(subject, problem, weight_decay=DECAY)
    twin, _, step = oracle(problem, subject, weight_decay=DECAY)
    subject.step(opt, problem.closure(opt))
    step(twin)

    def without(one, forward):
        """A forward pass in which the last bias gets no gradient in the pass that is not `present`."""
        calls = []

        def masked():
            calls.append(None)
            if len(calls) != present:
                bias = one.model[2].bias
                bias.requires_grad_(False)
                loss = forward()
                loss.backward = lambda: (torch.Tensor.backward(loss), bias.requires_grad_(True))[0]
                return loss
            return forward()

        return masked

    mine = without(problem, lambda: problem(1))

    def closure():
        opt.zero_grad()
        loss = mine()
        loss.backward()
        return loss

    subject.step(opt, closure)
    step(without(twin, lambda: twin(1)))
    close(problem, twin, CLOSE, f"a gradient in pass {present} only: not handled as the base handles a missing one")


@check("A7", "a gradient in the first pass only", needs=("sam",))
def a7_in_pass_1_only(subject):
    _in_one_pass(subject, 1)


@check("A7", "a gradient in the second pass only", needs=("sam",))
def a7_in_pass_2_only(subject):
    _in_one_pass(subject, 2)


@check("A8", "data_ptr, dtype and strides stay, also of parameters that are not contiguous")
def a8_storage(subject):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double().to(memory_format=torch.channels_last)
    )
    model[2].weight = nn.Parameter(torch.randn(12, 3, dtype=torch.float64).t())
    opt = subject.make(model, lr=LR, momentum=MOMENTUM)
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(3, (6,))

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    def layout():
        return [(id(p), p.data_ptr(), p.dtype, p.stride(), p.requires_grad) for p in model.parameters()]

    before, old = layout(), weights(model)
    for _ in range(3):
        subject.step(opt, closure)
    expect(layout() == before, "a parameter has another storage, dtype or stride")
    expect(not any(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True)), "a parameter did not move")


@check("A9", "with zeroed and with stale gradients, momentum and weight decay on", needs=("modal",))
def a9_inactive_does_not_move(subject):
    for stale in (0.0, 3.0):
        model, opt = two_modalities(subject)
        data = batches(TWO, 12)
        in_turns(subject, model, opt, data, 0, 6)
        video = [*model.encoders["video"].parameters(), *model.heads["video"].parameters()]
        before, buffers = [p.detach().clone() for p in video], copy.deepcopy([opt.state[p] for p in video])

        def closure(model=model, opt=opt, video=video, stale=stale, data=data):
            opt.zero_grad(set_to_none=False)
            for p in video:
                p.grad = torch.full_like(p, stale)
            loss = cross_entropy(model("audio", data["audio"][7][0]), data["audio"][7][1])
            loss.backward()
            return loss

        with subject.turn(opt, "audio"):
            subject.step(opt, closure)
        same = all(torch.equal(p, q) for p, q in zip(video, before, strict=True))
        expect(same, f"the inactive modality moved with gradients {stale:g}")
        expect(alike(buffers, [opt.state[p] for p in video]), f"its momentum changed with gradients {stale:g}")


class OwnNorm(nn.BatchNorm1d):
    """A subclass, as users write them."""


def _normed():
    torch.manual_seed(0)
    return Loss(model=nn.Sequential(nn.Linear(5, 8), OwnNorm(8), nn.BatchNorm1d(8), nn.Linear(8, 3)))


def _statistics(model):
    return [buffer.clone() for buffer in model.buffers()]


@check("A10", "once a step, for subclasses of BatchNorm too")
def a10_once_a_step(subject):
    problem = _normed()
    opt = usual(subject, problem)
    seen = copy.deepcopy(problem)
    seen()
    subject.step(opt, problem.closure(opt))
    counts = {int(norm.num_batches_tracked) for norm in problem.model[1:3]}
    expect(counts == {1}, f"a step counts as {max(counts)} batches")
    same = alike(_statistics(problem.model), _statistics(seen.model))
    expect(same, "the statistics are not those of one forward pass at θ")


@check("A10", "frozen layers and layers in evaluation mode stay as they are")
def a10_frozen_layers(subject):
    problem = _normed()
    opt = usual(subject, problem)
    problem()
    problem.model[1].eval()
    problem.model[2].track_running_stats = False
    before = _statistics(problem.model)
    subject.step(opt, problem.closure(opt))
    expect(alike(before, _statistics(problem.model)), "the statistics of a frozen layer have moved")
    expect(not problem.model[1].training, "a layer in evaluation mode was put into training")
    expect(not problem.model[2].track_running_stats, "a frozen layer was thawed")


@check("A10", "after an exception in the last pass they are recorded again")
def a10_after_an_exception(subject):
    problem = _normed()
    opt = usual(subject, problem)
    inner = problem.closure(opt)

    def closure():
        loss = inner()
        if problem.passes == (2 if subject.sam else 1):
            raise ValueError
        return loss

    with contextlib.suppress(ValueError):
        subject.step(opt, closure)
    counts = [int(norm.num_batches_tracked) for norm in problem.model[1:3]]
    problem()
    after = [int(norm.num_batches_tracked) for norm in problem.model[1:3]]
    expect(after == [count + 1 for count in counts], "a forward pass is no longer recorded")


def _dropout_masks(subject, device):
    problem = Loss(model=nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)), device=device)
    opt = usual(subject, problem, preserve_rng=True)
    masks = []
    problem.model[1].register_forward_hook(lambda _module, _inputs, output: masks.append(output == 0))
    for t in range(2):
        subject.step(opt, problem.closure(opt, t))
    first, second, third, fourth = masks
    expect(torch.equal(first, second), "the second pass drew another mask")
    expect(torch.equal(third, fourth), "the second pass drew another mask")
    expect(not torch.equal(first, third), "two steps drew the same mask")


@check("A11", "the second pass draws the mask of the first", needs=("sam",))
def a11_same_dropout(subject):
    _dropout_masks(subject, "cpu")


@check("A11 (CUDA)", "the second pass draws the mask of the first, on a GPU", needs=("sam",))
def a11_same_dropout_cuda(subject):
    _dropout_masks(subject, "cuda")


@check("A12", "the optimizer's own and the global hooks fire once each, in torch's order")
def a12_hooks(subject):
    problem = Loss()
    opt = usual(subject, problem)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    try:
        subject.step(opt, problem.closure(opt))
    finally:
        for handle in handles:
            handle.remove()
    expect(calls == ["global pre", "pre", "post", "global post"], f"fired: {', '.join(calls)}")


@check("A12", "hooks set on the base beforehand fire once", needs=("wraps",))
def a12_hooks_of_the_base(subject):
    problem = Loss()
    base = torch.optim.SGD(problem.model.parameters(), lr=LR)
    calls = []
    base.register_step_pre_hook(lambda *_: calls.append("pre"))
    base.register_step_post_hook(lambda *_: calls.append("post"))
    opt = subject.around(base)
    subject.step(opt, problem.closure(opt))
    expect(calls == ["pre", "post"], f"fired: {', '.join(calls)}")


@check("A13", "micro-batches make the step of the whole batch, the same ones in both passes")
def a13_accumulation(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject)
    seen = []

    def micro(t, part):
        x, y = (half.chunk(3)[part] for half in problem.batches[t])

        def closure():
            seen.append(part)
            loss = cross_entropy(problem.model(x), y) / 3
            loss.backward()
            return loss

        return closure

    for t in range(3):
        subject.accumulate(opt, [micro(t, part) for part in range(3)])
        step(lambda t=t: twin(t))
    expect(seen == [0, 1, 2] * (6 if subject.sam else 3), "a pass saw other micro-batches")
    close(problem, twin, CLOSE, "not the step of the whole batch")


def _right_or_refused(kind, make, result, expected):
    """Either `make` refuses with an error that names the `kind`, or `result` of what it makes is `expected`."""
    try:
        opt = make()
    except (TypeError, ValueError) as error:
        expect(kind in str(error), f"refused without a word of what is {kind}")
        return
    found = result(opt)
    expect(torch.allclose(found, expected, rtol=0, atol=CLOSE), "accepted, and the result is wrong")


@check("A14", "an embedding with sparse gradients")
def a14_sparse(subject):
    x, y = torch.tensor([1, 2, 2, 4]), torch.tensor([0, 1, 2, 0])

    def problem(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 3)).double()
        one = Loss(model=model)
        one.batches = [(x, y)]
        return one

    dense, one = problem(False), problem(True)
    twin, _, step = oracle(dense, subject, momentum=0.0)
    step(twin)

    def result(opt):
        subject.step(opt, one.closure(opt))
        return one.model[0].weight.detach()

    _right_or_refused("sparse", lambda: usual(subject, one, momentum=0.0), result, twin.model[0].weight.detach())


@check("A14", "a complex parameter")
def a14_complex(subject):
    torch.manual_seed(0)
    start = torch.randn(4, dtype=torch.complex128)
    target = torch.randn(4, dtype=torch.complex128)
    model, real = nn.Module(), nn.Module()
    model.w, real.w = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    twin_of = Loss(model=nn.Identity())
    twin_of.model = real
    twin, _, step = oracle(twin_of, subject)

    def loss(w):
        return (w - torch.view_as_real(target)).square().sum() + w.pow(4).sum()

    for _ in range(2):
        step(lambda: loss(twin.model.w))

    def result(opt):
        def closure():
            opt.zero_grad()
            value = loss(torch.view_as_real(model.w))
            value.backward()
            return value

        for _ in range(2):
            subject.step(opt, closure)
        return torch.view_as_real(model.w.detach())

    _right_or_refused("complex", lambda: subject.make(model, lr=LR, momentum=MOMENTUM), result, twin.model.w.detach())


@check("A14", "an integer parameter beside others")
def a14_integer(subject):
    problem = Loss()
    twin, _, step = oracle(problem, subject)
    step(twin)
    problem.model.register_parameter("table", nn.Parameter(torch.arange(4), requires_grad=False))

    def result(opt):
        subject.step(opt, problem.closure(opt))
        return torch.cat([p.detach().double().flatten() for p in problem.model.parameters()])

    expected = [p.detach().flatten() for p in twin.model.parameters()]
    _right_or_refused(
        "int", lambda: usual(subject, problem), result, torch.cat([torch.arange(4, dtype=torch.float64), *expected])
    )
