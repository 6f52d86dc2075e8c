"""Rows A1-A9, B1-B4 and the LR schedulers of the optimizer contract, a test (or more) named after each row."""

import copy
import itertools
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import OwnHeads, Pair, SharedHead, batches, closure_for, distance, same, unchanged
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

import igm_rs
from igm_rs import IGMOptimizer

TWO = ("audio", "video")
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}
SWITCHES = [
    pytest.param({"rho": rho, "tau": tau}, id=f"rho={rho}-tau={tau}") for rho in (0.0, 0.05) for tau in (0.0, 1.5)
]
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
every_switch = pytest.mark.parametrize("switches", SWITCHES)


def build(base=BASES["sgd"], dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = OwnHeads().to(dtype)
    return model, IGMOptimizer(base(model.parameters()), **model.options(), **options)


def snapshot(opt):
    return copy.deepcopy(opt.state_dict())


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def train(model, opt, data, steps, start=0):
    """`steps` steps of each modality in turns of `steps`."""
    for name in TWO:
        with opt.turn(name):
            for t in range(start, start + steps):
                opt.step(closure_for(opt, model, name, data[name][t]))


# --- A1 -------------------------------------------------------------------------------------------------------------


def test_a1_is_an_optimizer_and_builds_like_one():
    layer = nn.Linear(3, 2)
    opt = IGMOptimizer(layer.parameters(), lr=0.1, momentum=0.9)
    assert isinstance(opt, torch.optim.Optimizer)
    assert type(opt.base) is torch.optim.SGD
    assert opt.modalities == ("all",)
    assert opt.param_groups[0]["momentum"] == 0.9
    assert opt.param_groups[0]["params"][0] is layer.weight


def test_a1_builds_from_a_class_and_from_a_ready_base():
    layer = nn.Linear(3, 2)
    assert type(IGMOptimizer(layer.parameters(), base=torch.optim.AdamW, lr=1e-3).base) is torch.optim.AdamW
    base = torch.optim.Adam([{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias]}], lr=0.2)
    opt = IGMOptimizer(base)
    assert opt.base is base
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.2]


# --- A2 -------------------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize(("rho", "calls"), [(0.0, 1), (0.05, 2)])
def test_a2_closure_runs_without_gradients_beforehand(base, rho, calls):
    model, opt = build(base, rho=rho)
    x, y = batches(TWO, 1)["audio"][0]
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = cross_entropy(model("audio", x), y)
        loss.backward()
        return loss

    expected = cross_entropy(model("audio", x), y).item()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        loss = opt.step(closure)
    assert seen == [True] * calls
    assert loss.item() == expected


# --- A3 -------------------------------------------------------------------------------------------------------------


def test_a3_step_without_closure_projects_and_warns_once():
    model, opt = build(rho=0.05, tau=3.0)
    data = batches(TWO, 3)
    train(model, opt, data, 1)
    twin, plain = build(rho=0.0, tau=3.0)
    saved = snapshot(opt)
    saved["igm"]["rho"] = dict.fromkeys(TWO, 0.0)
    plain.load_state_dict(saved)
    twin.load_state_dict(model.state_dict())
    for t, expectation in ((1, True), (2, False)):
        for m, o in ((model, opt), (twin, plain)):
            o.zero_grad()
            cross_entropy(m("audio", data["audio"][t][0]), data["audio"][t][1]).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        assert [w.category for w in caught] == [UserWarning] * expectation
        if expectation:
            assert "without a closure while rho is 0.05" in str(caught[0].message)
        plain.step()
        assert distance(model, twin) == 0
        assert opt.last_stats["projected"]["audio.0"]["cosine"] < 1
    assert opt.unperturbed_steps == 2


# --- A4 -------------------------------------------------------------------------------------------------------------


@every_base
@every_switch
def test_a4_two_call_form_equals_step_with_closure(base, switches):
    pairs = [build(base, **switches) for _ in range(2)]
    data = batches(TWO, 4)
    for name, t in itertools.product(TWO, range(4)):
        x, y = data[name][t]
        (model, opt), (twin, other) = pairs
        with opt.turn(name):
            opt.step(closure_for(opt, model, name, (x, y)))
        with other.turn(name):
            for call in (other.first_step, other.second_step):
                cross_entropy(twin(name, x), y).backward()
                call(zero_grad=True)
        assert distance(model, twin) == 0
    assert same(opt.state_dict()["igm"]["projection"], other.state_dict()["igm"]["projection"])


def test_a4_first_step_perturbs_by_rho_and_second_needs_it():
    model, opt = build(rho=0.05)
    before = weights(model)
    with pytest.raises(RuntimeError, match="second_step without first_step"):
        opt.second_step()
    cross_entropy(model("audio", batches(TWO, 1)["audio"][0][0]), batches(TWO, 1)["audio"][0][1]).backward()
    opt.first_step()
    length = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), before, strict=True)).sqrt().item()
    assert length == pytest.approx(0.05, rel=1e-12)
    with pytest.raises(RuntimeError, match="between first_step and second_step: the weights were restored"):
        opt.step()
    assert unchanged(model, before)


# --- A5 -------------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@every_base
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_a5_exception_restores_weights(base, which, error):
    model, opt = build(base, tau=1.5)
    data = batches(TWO, 4)
    train(model, opt, data, 2)
    before, state = weights(model), snapshot(opt)
    calls = []
    usual = closure_for(opt, model, "audio", data["audio"][3])

    def failing():
        calls.append(1)
        loss = usual()
        if len(calls) == which:
            raise error("in the middle")
        return loss

    with opt.turn("audio"), pytest.raises(error):
        opt.step(failing)
    assert len(calls) == which
    assert unchanged(model, before)
    assert same(state, snapshot(opt))
    with opt.turn("audio"):
        opt.step(usual)
    assert not unchanged(model, before)


def test_a5_a_real_signal_in_the_second_pass_restores_weights():
    model, opt = build()
    data = batches(TWO, 1)
    before = weights(model)
    calls = []
    usual = closure_for(opt, model, "audio", data["audio"][0])

    def interrupted():
        calls.append(1)
        loss = usual()
        if len(calls) == 2:
            assert not unchanged(model, before)
            signal.raise_signal(signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(interrupted)
    assert unchanged(model, before)


def test_a5_a_kernel_that_fails_restores_weights(monkeypatch):
    model, opt = build(tau=1.5)
    data = batches(TWO, 3)
    train(model, opt, data, 2)
    before, state = weights(model), snapshot(opt)

    def broken(*_args, **_kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(igm_rs._igm_rs, "project_", broken)
    with opt.turn("audio"), pytest.raises(RuntimeError, match="no such kernel"):
        opt.step(closure_for(opt, model, "audio", data["audio"][2]))
    assert unchanged(model, before)
    assert same(state["state"], snapshot(opt)["state"])


def test_a5_exception_between_first_and_second_step_restores_at_the_end_of_the_turn():
    model, opt = build()
    x, y = batches(TWO, 1)["audio"][0]
    before = weights(model)

    def half_a_step():
        with opt.turn("audio"):
            cross_entropy(model("audio", x), y).backward()
            opt.first_step(zero_grad=True)
            raise ValueError("between")

    with pytest.raises(ValueError, match="between"):
        half_a_step()
    assert unchanged(model, before)


# --- A6 -------------------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("poison", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("switches", [{"rho": 0.05, "tau": 0.0}, {"rho": 0.05, "tau": 1.5}], ids=str)
def test_a6_unusable_gradient_skips_the_step(base, poison, which, switches):
    model, opt = build(base, **switches)
    data = batches(TWO, 4)
    train(model, opt, data, 2)
    before, state = weights(model), snapshot(opt)
    calls = []
    usual = closure_for(opt, model, "audio", data["audio"][3])

    def poisoned():
        calls.append(1)
        loss = usual()
        if len(calls) == which:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(0) if poison == 0.0 else p.grad.view(-1)[:1].fill_(poison)
        return loss

    with opt.turn("audio"):
        opt.step(poisoned)
    assert len(calls) == which
    assert unchanged(model, before)
    assert opt.skipped_steps == 1
    assert opt.last_stats["skipped"] is True
    after = snapshot(opt)
    after["igm"]["counters"]["skipped"] = 0
    assert same(state, after)
    with opt.turn("audio"):
        opt.step(usual)
    assert not unchanged(model, before)


@pytest.mark.parametrize("tau", [0.0, 1.5])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a6_without_sam_a_non_finite_gradient_is_skipped(tau, poison):
    model, opt = build(rho=0.0, tau=tau)
    data = batches(TWO, 3)
    train(model, opt, data, 2)
    before = weights(model)
    closure_for(opt, model, "audio", data["audio"][2])()
    model.heads["audio"][0].bias.grad[0] = poison
    opt.step()
    assert unchanged(model, before)
    assert opt.skipped_steps == 1


def test_a6_both_off_zero_gradient_is_the_base_optimizers_business():
    model, opt = build(rho=0.0, tau=0.0)
    twin = copy.deepcopy(model)
    base = BASES["sgd"](twin.parameters())
    for m in (model, twin):
        for p in m.encoders["audio"].parameters():
            p.grad = torch.zeros_like(p)
    opt.step()
    base.step()
    assert distance(model, twin) == 0
    assert opt.skipped_steps == 0


# --- A7 -------------------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("present", [1, 2])
def test_a7_gradient_in_one_pass_only(base, present):
    """A branch that is taken in one of the two passes: restored, and left to the base as it treats None."""
    torch.manual_seed(0)
    trunk, branch = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    twins = copy.deepcopy((trunk, branch))
    opt = IGMOptimizer(base([*trunk.parameters(), *branch.parameters()]), rho=0.05)
    x = torch.randn(6, 4, dtype=torch.float64)
    calls = []

    def closure():
        opt.zero_grad()
        calls.append(1)
        out = trunk(x) + (branch(x) if len(calls) == present else 0)
        loss = out.square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    # by hand: ε* from the first pass over what had gradients, the base's step with the second pass's gradients
    other = base([p for m in twins for p in m.parameters()])
    first = list(twins[0].parameters()) + (list(twins[1].parameters()) if present == 1 else [])
    out = twins[0](x) + (twins[1](x) if present == 1 else 0)
    gradients = torch.autograd.grad(out.square().mean(), first)
    norm = sum((g * g).sum() for g in gradients).sqrt()
    saved = [p.detach().clone() for p in first]
    with torch.no_grad():
        for p, g in zip(first, gradients, strict=True):
            p.add_(0.05 / norm * g)
    out = twins[0](x) + (twins[1](x) if present == 2 else 0)
    out.square().mean().backward()
    with torch.no_grad():
        for p, s in zip(first, saved, strict=True):
            p.copy_(s)
    other.step()
    for mine, theirs in zip((trunk, branch), twins, strict=True):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


# --- A8 -------------------------------------------------------------------------------------------------------------


@every_base
@every_switch
@pytest.mark.parametrize("project", ["gradient", "update"])
def test_a8_storage_dtype_and_strides_stay(base, switches, project):
    model, opt = build(base, project=project, **switches)
    with torch.no_grad():  # a weight with the strides of a transpose
        layer = model.encoders["audio"][0]
        layer.weight.set_(layer.weight.t().contiguous().t())
    kept = [(p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()]
    train(model, opt, batches(TWO, 3), 3)
    assert [(p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()] == kept
    assert kept[0][2] == (1, 8)


# --- A9 -------------------------------------------------------------------------------------------------------------


@every_base
@every_switch
def test_a9_inactive_modality_does_not_move(base, switches):
    model, opt = build(base, **switches)
    data = batches(TWO, 4)
    train(model, opt, data, 2)
    video = [*model.encoders["video"].parameters(), *model.heads["video"].parameters()]
    before = [p.detach().clone() for p in video]
    momentum = copy.deepcopy([opt.state[p] for p in video])
    for p in video:
        p.grad = torch.randn_like(p)  # stale

    def closure():
        opt.zero_grad(set_to_none=False)
        video[0].grad.fill_(3.0)
        loss = cross_entropy(model("audio", data["audio"][3][0]), data["audio"][3][1])
        loss.backward()
        return loss

    with opt.turn("audio"):
        opt.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(video, before, strict=True))
    assert same(momentum, [opt.state[p] for p in video])
    assert torch.equal(video[0].grad, torch.full_like(video[0], 3.0)), "a stale gradient is hidden, not lost"


# --- both off -------------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("off", [{"rho": 0.0, "tau": 0.0}, {"rho": 0.0, "heads": None}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_off_is_the_base_optimizer_to_the_bit(base, off, dtype):
    torch.manual_seed(1)
    model = OwnHeads().to(dtype)
    twin = copy.deepcopy(model)
    opt = IGMOptimizer(base(model.parameters()), **(model.options() | off))
    other = base(twin.parameters())
    for t, (x, y) in enumerate(batches(TWO, 6, dtype)["audio"]):
        for m, o in ((model, opt), (twin, other)):
            o.zero_grad()
            cross_entropy(m("audio", x), y).backward()
        with opt.turn("audio"):
            opt.step()
        other.step()
        assert distance(model, twin) == 0, t


# --- B1, B2 ---------------------------------------------------------------------------------------------------------

RESUME = """
import sys, torch
sys.path[:0] = {paths!r}
from test_contract import resume
torch.set_num_threads(1)
for case in torch.load(sys.argv[1], weights_only=True):
    print(case["id"], resume(case), sep=": ")
"""


RESUMED = {
    f"{base}-rho={rho}-tau={tau}-{'middle' if middle else 'boundary'}": {
        "base": base, "rho": rho, "tau": tau, "middle": middle
    }
    for base in BASES
    for rho in (0.0, 0.05)
    for tau in (0.0, 1.5)
    for middle in (False, True)
}  # fmt: skip


def drive(model, opt, data, steps):
    """Steps [start, stop) of a run of turns of 5 steps each; a turn may be left in the middle and taken up again."""
    position = steps.start
    while position < steps.stop:
        turn = position // 5
        with opt.turn(TWO[turn % 2]):
            while position < steps.stop and position // 5 == turn:
                opt.step(closure_for(opt, model, TWO[turn % 2], data[TWO[turn % 2]][position]))
                position += 1
            if position % 5 and position == steps.stop:
                return copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})
    return copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})


def resume(case):
    """Take a checkpoint up and compare the end of the run with that of the run that was not interrupted."""
    model, opt = build(BASES[case["base"]], rho=case["rho"], tau=case["tau"])
    model.load_state_dict(case["checkpoint"]["model"])
    opt.load_state_dict(case["checkpoint"]["opt"])
    end = drive(model, opt, batches(TWO, 20), range(case["at"], 20))
    parts = [part for part in ("model", "opt") if not same(end[part], case["end"][part])]
    return f"another {' and '.join(parts)}" if parts else "the same"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """What a new process made of the checkpoint of each case."""
    torch.set_num_threads(1)
    cases = []
    for name, case in RESUMED.items():
        at = 7 if case["middle"] else 10
        options = {"rho": case["rho"], "tau": case["tau"]}
        model, opt = build(BASES[case["base"]], **options)
        end = drive(model, opt, batches(TWO, 20), range(20))
        model, opt = build(BASES[case["base"]], **options)
        checkpoint = drive(model, opt, batches(TWO, 20), range(at))
        cases.append(case | {"id": name, "at": at, "checkpoint": checkpoint, "end": end})
    file = tmp_path_factory.mktemp("resumed") / "cases.pt"
    torch.save(cases, file)
    paths = [str(Path(__file__).parent), str(Path(igm_rs.__file__).parents[1])]
    command = [sys.executable, "-c", RESUME.format(paths=paths), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", RESUMED)
def test_b1_b2_train_save_load_in_a_new_process_train_is_bit_for_bit(resumed, case):
    """5 + 5 steps, the boundary of a turn between, or the checkpoint in the middle of a turn; then on to 20."""
    assert resumed[case] == "the same"


def test_b2_perturbed_weights_and_scratch_are_not_in_the_checkpoint(tmp_path):
    model, opt = build(tau=1.5)
    train(model, opt, batches(TWO, 3), 3)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    loaded = torch.load(tmp_path / "opt.pt", weights_only=True)
    assert same(loaded, opt.state_dict())
    per_parameter = {key for entry in loaded["state"].values() for key in entry}
    assert per_parameter == {"momentum_buffer"}
    assert loaded.keys() == {"state", "param_groups", "igm"}


# --- B3, B4 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_b3_covariance_and_projector_keep_their_precision(dtype):
    model, opt = build(dtype=dtype, tau=1.5, rho=0.0)
    data = batches(TWO, 3, dtype)
    for name in TWO:
        with opt.turn(name):
            for t in range(3):
                closure_for(opt, model, name, data[name][t])()
                opt.step()
    _, other = build(dtype=dtype, tau=1.5, rho=0.0)
    other.load_state_dict(opt.state_dict())
    for name in TWO:
        for layer in ("0", "1"):
            key = f"{name}.{layer}"
            assert other.projectors[name][key].dtype == torch.float32
            assert torch.equal(other.projectors[name][key], opt.projectors[name][key])
            assert other.covariances[name][key].dtype == torch.float64
            assert torch.equal(other.covariances[name][key], opt.covariances[name][key])


def test_b4_turn_round_modality_and_counters_survive():
    model, opt = build(tau={"audio": 1.0, "video": 2.0})
    data = batches(TWO, 9)
    train(model, opt, data, 2)
    opt.rho["audio"] = 0.03
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data["audio"][4]))
        saved = snapshot(opt)
    _, other = build()
    other.load_state_dict(saved)
    assert (other.turns, other.round, other.skipped_steps) == (2, 1, 0)
    assert other.rho == {"audio": 0.03, "video": 0.05}
    assert other.tau == {"audio": 1.0, "video": 2.0}
    assert same(saved, other.state_dict())
    assert other.state_dict()["igm"]["counters"]["open"] == "audio"


# --- LR schedulers --------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=6),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [2],
    ),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda e: 0.5**e, lambda e: 1 / (e + 1)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("on", ["igm", "base"])
def test_c_schedulers_move_the_base_lr(make, on):
    torch.manual_seed(0)
    model = OwnHeads().double()
    twin = copy.deepcopy(model)

    def optimizer(m):
        groups = [{"params": m.encoders.parameters()}, {"params": m.heads.parameters(), "lr": 0.05}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    base = optimizer(model)
    opt = IGMOptimizer(base, rho=0.0)
    scheduler = make(opt if on == "igm" else base)
    other = optimizer(twin)
    expected = make(other)
    lrs = set()
    for x, y in batches(TWO, 6)["audio"]:
        for m, o, s in ((model, opt, scheduler), (twin, other, expected)):
            o.zero_grad()
            loss = cross_entropy(m("audio", x), y)
            loss.backward()
            o.step()
            s.step(*([torch.tensor(1.0)] if "Plateau" in type(s).__name__ else []))
        assert [g["lr"] for g in base.param_groups] == [g["lr"] for g in other.param_groups]
        lrs.add(base.param_groups[0]["lr"])
        assert distance(model, twin) == 0
    assert len(lrs) > 1


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_c_schedulers_go_on_after_load(make):
    groups = lambda m: [{"params": m.encoders.parameters()}, {"params": m.heads.parameters()}]  # noqa: E731

    def build_two():
        torch.manual_seed(0)
        model = OwnHeads().double()
        opt = IGMOptimizer(torch.optim.SGD(groups(model), lr=0.1, momentum=0.9), **model.options(), tau=1.5)
        return model, opt, make(opt)

    data = batches(TWO, 6)["audio"]

    def run(model, opt, scheduler, steps):
        for t in steps:
            opt.step(closure_for(opt, model, "audio", data[t]))
            scheduler.step(*([torch.tensor(1.0)] if "Plateau" in type(scheduler).__name__ else []))

    model, opt, scheduler = build_two()
    run(model, opt, scheduler, range(3))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), scheduler.state_dict()))
    run(model, opt, scheduler, range(3, 6))
    twin, other, again = build_two()
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    run(twin, other, again, range(3, 6))
    assert [g["lr"] for g in other.base.param_groups] == [g["lr"] for g in opt.param_groups]
    assert distance(model, twin) == 0


def test_a12_step_hooks_fire_once():
    """Those of the optimizer, those set on the base before it was wrapped, and torch's global ones."""
    layer = nn.Linear(2, 2)
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    calls = []
    base.register_step_pre_hook(lambda *_: calls.append("base's pre"))
    opt = IGMOptimizer(base, rho=0.0)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global post"))
    layer(torch.ones(1, 2)).sum().backward()
    opt.step()
    handle.remove()
    assert calls == ["base's pre", "pre", "post", "global post"]


def test_rust_calls_per_step_do_not_grow_with_the_number_of_parameters(monkeypatch):
    """The calls of a step are counted on a model with many more tensors."""

    def count(extra):
        torch.manual_seed(0)
        model = OwnHeads()
        for name in TWO:
            model.encoders[name].extend(nn.Linear(8, 8) for _ in range(extra))
        opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **model.options())
        data = batches(TWO, 3, torch.float32)
        train(model, opt, data, 2)
        calls = []
        for name in dir(igm_rs._igm_rs):
            function = getattr(igm_rs._igm_rs, name)
            if callable(function):

                def counted(*args, _name=name, _function=function, **kwargs):
                    calls.append(_name)
                    return _function(*args, **kwargs)

                patch.setattr(igm_rs._igm_rs, name, counted)
        with opt.turn("audio"):
            opt.step(closure_for(opt, model, "audio", data["audio"][2]))
            return sorted(calls)

    with monkeypatch.context() as patch:
        few = count(0)
    with monkeypatch.context() as patch:
        many = count(40)
    assert few == many
    assert {"gradient_norm", "at_perturbed", "project_"} <= set(few)


def test_shared_head_pairs_with_itself_and_drives_both():
    pair = Pair(SharedHead(), BASES["sgd"], tau=1.5)
    assert max(pair.run(rounds=2)) <= 1e-12
    assert pair.opt.pairs == {"audio": {"video": [("head", "head")]}, "video": {"audio": [("head", "head")]}}
