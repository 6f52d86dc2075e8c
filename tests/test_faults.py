"""Faults to survive: wherever a step fails, all is as before it, to the bit, and the next step works."""

import contextlib
import os
import random
import signal
import threading
import time
import warnings

import pytest
import torch
from faults import (
    BASES,
    PACKAGE,
    STEPS,
    TORCH,
    TWO,
    Alarm,
    Calls,
    Case,
    Disturbed,
    InjectedError,
    Left,
    Lines,
    Scene,
    calls_of,
    differences,
    fail_at_every_call,
    failing,
    lines_of,
    survive,
)

import igm_rs

every_base = pytest.mark.parametrize("base", BASES)
every_switch = pytest.mark.parametrize(
    "switches",
    [pytest.param({"rho": rho, "tau": tau}, id=f"rho={rho}-tau={tau}") for rho in (0.0, 0.05) for tau in (0.0, 1.5)],
)
FORMS = ("closure", "list", "none", "two", "replay")
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _as_in_a_script():
    """SIGINT raises, also where the tests run in the background; autograd that stays off fails no other test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    torch.set_grad_enabled(True)


class Scaler(torch.amp.GradScaler):
    """A scaler whose calls are its own to patch."""

    def __init__(self):
        super().__init__("cpu", init_scale=1024.0)


# --- kernels and features -------------------------------------------------------------------------------------------


@every_base
@every_switch
@pytest.mark.parametrize("place", ["first", "later"])
def test_every_kernel_of_a_step_with_closure(base, switches, place):
    """Refreshed at every second step: the step under test makes T where it is the later one."""
    names = fail_at_every_call(Case(base, place=place, refresh=2, **switches))
    assert ("at_perturbed" in names) == (switches["rho"] > 0)
    assert ("project_" in names) == (switches["tau"] > 0)
    assert {"batch_rows", "append_rows_"} <= set(names)
    if switches["tau"] > 0 and place == "later":
        assert "make_projector_from_rows" in names


@every_form
@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("project", ["gradient", "update"])
def test_every_kernel_of_every_form(form, base, project):
    names = fail_at_every_call(Case(base, form, project=project, refresh=1))
    assert ("perturb_" in names or "at_perturbed" in names) == (form != "none")
    assert "make_projector_from_rows" in names
    assert {"gradient": "project_", "update": "project_update_"}[project] in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("place", ["first", "later"])
def test_every_kernel_in_every_dtype(dtype, base, place):
    assert "at_perturbed" in fail_at_every_call(Case(base, place=place, dtype=dtype, refresh=2))


SETTINGS = {
    "refreshed by the turn": ({"refresh": "turn"}, "at_perturbed"),
    "Ȳ decayed": ({"place": "first", "covariance": 0.5}, "decay_"),
    "Ȳ kept as a matrix": ({"features": "samples", "size": 300, "refresh": 2}, "accumulate_"),
    "Ȳ centred": ({"features": "centred", "refresh": 1}, "centre_"),
    "all others": ({"names": (*TWO, "text"), "sources": "others", "refresh": 1, "place": "first"}, "project_"),
    "the sum of all others": (
        {"names": (*TWO, "text"), "sources": "others", "combine": "sum", "refresh": 1, "place": "first"},
        "make_projector_from_rows",
    ),
    "T and bias": ({"augment_bias": True, "refresh": 1}, "make_projector_from_rows"),
    "T of a matrix": ({"features": "samples", "size": 300, "route": "polynomial", "refresh": 2}, "make_projector"),
    "ridge": ({"projector": "ridge", "refresh": 1}, "make_projector_from_rows"),
    "null space": ({"projector": "null_space", "control": "random", "refresh": 1}, "make_projector_from_rows"),
    "orthogonal": ({"projector": "orthogonal", "refresh": 1}, "orthogonal_projector_"),
    "outside turns": ({"place": "outside"}, "make_projector_from_rows"),
    "outside turns, refreshed": ({"place": "outside", "refresh": 1}, "make_projector_from_rows"),
    "outside turns, orthogonal": ({"place": "outside", "projector": "orthogonal"}, "orthogonal_projector_"),
    "after a turn that was left": ({"place": "outside", "left": True, "covariance": "kept"}, "append_rows_"),
    "momentum anew": ({"place": "first", "reset": ("momentum", "lr")}, "at_perturbed"),
    "the first step of all": ({"place": "first", "trained": False, "refresh": 1}, "make_projector_from_rows"),
    "same random numbers": ({"preserve_rng": True}, "at_perturbed"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_every_kernel_in_every_setting(setting, base):
    options, called = SETTINGS[setting]
    assert called in fail_at_every_call(Case(base, **options))


@every_form
def test_an_interrupt_at_a_kernel(form):
    fail_at_every_call(Case(form=form, refresh=1), error=KeyboardInterrupt)


@every_form
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_every_call_of_the_clipping(form, base):
    names = fail_at_every_call(Case(base, form, max_grad_norm=0.1), others=[(torch.nn.utils, "clip_grads_with_norm_")])
    assert "clip_grads_with_norm_" in names


@pytest.mark.parametrize("form", ["closure", "list", "two"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_every_call_of_the_scaler(form, base):
    """The scaler as well goes on as if nothing had been, with no update() between the fault and the next step."""
    case = Case(base, form, dtype=torch.float32, scaler=Scaler)
    methods = [(Scaler, name) for name in ("scale", "unscale_", "_unscale_grads_", "get_scale", "step", "update")]
    names = fail_at_every_call(case, others=methods)
    assert "unscale_" in names


# --- the passes -----------------------------------------------------------------------------------------------------

PASSES = {"closure": 2, "list": 6, "replay": 2}
"""How often the loss is computed in a step of each form."""


def fault(_scene, _loss):
    raise InjectedError("in the closure")


def interrupt(_scene, loss):
    signal.raise_signal(signal.SIGINT)
    return loss


def leave_python(_scene, _loss):
    raise SystemExit(3)


RAISED = {
    "exception": (fault, InjectedError),
    "signal": (interrupt, KeyboardInterrupt),
    "exit": (leave_python, SystemExit),
}


@every_base
@every_switch
@pytest.mark.parametrize("act", RAISED)
def test_a_pass_that_raises(base, switches, act):
    for form, place in (("closure", "first"), ("closure", "later"), ("list", "later")):
        case = Case(base, form, place, refresh=2, **switches)
        passes = PASSES[form] // (1 if switches["rho"] else 2)
        for at in range(passes):
            survive(case, Disturbed(at, *RAISED[act]), leave=at % 2 == 0, say=f"{form}, {place}, pass {at}")


@pytest.mark.parametrize("act", RAISED)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_the_second_pass_of_a_replay_that_raises(base, act):
    for leave in (False, True):
        survive(Case(base, "replay"), Disturbed(1, *RAISED[act]), leave=leave)


def test_a_replay_that_has_failed_is_forgotten():
    scene = Case(form="replay").fresh()
    scene.disturb = Disturbed(1, *RAISED["exception"])._count
    with scene.turn():
        with pytest.raises(InjectedError):
            scene.step("audio", 3)
        scene.closure("audio", 3)()
        with pytest.warns(UserWarning, match="without a closure"):
            scene.opt.step()
    assert scene.opt.unperturbed_steps == 1


@pytest.mark.parametrize("act", RAISED)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_what_raises_before_and_between_the_two_calls(base, act, at):
    """The pass is the script's own; its exception leaves the turn, and with that the perturbation."""
    survive(Case(base, "two"), Disturbed(at, *RAISED[act]), leave=True)


def weight(scene):
    return scene.model.heads["audio"][0].weight


def sparse(scene, loss):
    weight(scene).grad = weight(scene).grad.to_sparse()
    return loss


def another_shape(scene, loss):
    weight(scene).grad.data = weight(scene).grad.data[:2]
    return loss


def integers(scene, loss):
    weight(scene).grad.data = weight(scene).grad.data.long()
    return loss


def no_gradient(scene, loss):
    scene.opt.zero_grad()
    return loss


UNUSABLE = {
    "sparse": (sparse, (TypeError, ValueError)),
    "of another shape": (another_shape, (ValueError, RuntimeError)),
    "integers": (integers, (TypeError, ValueError, RuntimeError)),
}


@every_base
@pytest.mark.parametrize("act", UNUSABLE)
@pytest.mark.parametrize("form", ["closure", "two", "replay"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_gradient_that_no_step_can_use(base, act, form, at):
    for number, project in enumerate(("gradient", "update")):
        survive(Case(base, form, project=project), Disturbed(at, *UNUSABLE[act]), leave=number == 0, say=project)


@pytest.mark.parametrize("act", UNUSABLE)
@every_base
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_a_gradient_that_no_step_can_use_without_a_closure(base, act, rho):
    survive(Case(base, "none", rho=rho), Disturbed(0, *UNUSABLE[act]), leave=rho == 0)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_closure_that_does_not_do_its_part(base, at):
    for leave in (False, True):
        survive(Case(base), Disturbed(at, lambda *_: None, TypeError), leave=leave)
        survive(Case(base), Disturbed(at, no_gradient, RuntimeError), leave=leave)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_signal_in_the_middle_of_a_pass(at, where):
    """It arrives in a hook of the script's own, with half of the network gone through."""
    case = Case()
    case.expected  # noqa: B018  # before any hook
    for leave in (False, True):
        calls = []

        def hook(*_, calls=calls):
            calls.append(1)
            if len(calls) == at + 1:
                signal.raise_signal(signal.SIGINT)

        class Hooked:
            error = KeyboardInterrupt
            armed = staticmethod(contextlib.nullcontext)

            def __enter__(self):
                head = self.scene.model.heads["audio"][1]
                register = head.register_forward_hook if where == "forward" else head.register_full_backward_hook
                self.handle = register(hook)
                return self

            def __exit__(self, *_):
                self.handle.remove()

        survive(case, Hooked(), leave=leave)
        assert len(calls) == at + 1


# --- the base's step ------------------------------------------------------------------------------------------------

KINDS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "plain sgd": (torch.optim.SGD, {"lr": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 1e-2}),
}


def raise_fault():
    raise InjectedError("in the base")


class Partly:
    """The base's step fails when it has updated this share of its parameters."""

    error = InjectedError

    def __init__(self, share):
        self.share = share
        self.scene = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.scene.opt.base.left = None

    def armed(self):
        self.scene.opt.base.left = self.share
        return contextlib.nullcontext()


@every_base
@every_switch
@pytest.mark.parametrize(("foreach", "project"), [(False, "gradient"), (True, "gradient"), (False, "update")], ids=str)
def test_a_base_that_fails_after_some_parameters(base, switches, foreach, project):
    kind, options = KINDS[base]
    kind = failing(kind, raise_fault)
    forms = [f for f in FORMS if switches["rho"] or f in ("closure", "none")]
    for number, form in enumerate(forms):
        place = "first" if number % 2 else "later"
        case = Case(lambda p: kind(p, foreach=foreach, **options), form, place, project=project, refresh=2, **switches)
        for index, share in enumerate((0, 0.5, 1)):
            survive(case, Partly(share), leave=(index + number) % 2 == 1, say=f"{form}, {place}, after {share}")


@pytest.mark.parametrize("act", ["interrupt", "exit"])
@every_base
def test_a_base_that_is_interrupted_by_a_signal(base, act):
    kind, options = KINDS[base]
    do, error = {
        "interrupt": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
        "exit": (lambda: leave_python(None, None), SystemExit),
    }[act]
    kind = failing(kind, do)
    case = Case(lambda p: kind(p, **options))
    for share in (0, 0.5, 1):
        stop = Partly(share)
        stop.error = error
        survive(case, stop, leave=share == 0.5, say=f"after {share}")


class Own(torch.optim.Optimizer):
    """A base with nested state, numbers of its own in the groups, and tensors that are replaced, not written to."""

    fails = False

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "weights": [1.0], "d": torch.tensor(1.0)})

    @torch.no_grad()
    def step(self, closure=None):
        for number, group in enumerate(self.param_groups):
            group["k"] += 1
            group["weights"].append(float(number))
            group["d"].mul_(1.5)
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["slow"] = state.get("slow", 0.0) * 0.9 + p.grad
                state.setdefault("past", []).append(p.grad.norm())
                state.setdefault("inner", {"square": torch.zeros_like(p)})["square"].add_(p.grad.square())
                p.sub_(group["lr"] * state["slow"] / (1 + state["inner"]["square"].sqrt()) / group["d"])
                if self.fails and number == 1 and index == 2:
                    raise InjectedError("in the middle")


class Middle(Partly):
    """A base of `Own` fails in its second group."""

    def __init__(self):
        super().__init__(None)

    def __exit__(self, *_):
        self.scene.opt.base.fails = False

    def armed(self):
        self.scene.opt.base.fails = True
        return contextlib.nullcontext()


@every_form
@pytest.mark.parametrize("project", ["gradient", "update"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_base_with_a_state_of_its_own_kind(form, project, trained):
    def base(params):
        params = list(params)
        return Own([{"params": params[:6]}, {"params": params[6:]}])

    case = Case(base, form, "later" if trained else "first", trained=trained, project=project)
    for leave in (False, True):
        survive(case, Middle(), leave=leave)


@pytest.mark.parametrize(("base", "key"), [("sgd", "momentum_buffer"), ("adam", "exp_avg"), ("adamw", "exp_avg_sq")])
@every_form
@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
def test_a_base_that_trips_over_its_own_state(base, key, form, foreach):
    """A buffer of another shape, as after a slip of the script: the error comes in the middle of the base's step."""
    case = Case(lambda p: BASES[base](p, foreach=foreach), form)
    scene = case.fresh()
    state = scene.opt.state[scene.model.heads["audio"][0].weight]
    sound = state[key]
    with scene.turn():
        state[key] = sound[:, :-1].clone()
        before = scene.state()
        with pytest.raises((RuntimeError, ValueError)):
            scene.step("audio", 3)
        assert not differences(scene.state(), before)
        scene.opt.state[scene.model.heads["audio"][0].weight][key] = sound
        assert not differences(scene.state(), case.expected[0])
        scene.step("audio", 3)
        assert not differences(scene.state(), case.expected[1])


def test_stale_gradients_of_the_inactive_modality_are_there_after_a_fault():
    kind, options = KINDS["adam"]
    kind = failing(kind, raise_fault)
    scene = Case(lambda p: kind(p, **options)).fresh()
    video = list(scene.model.encoders["video"].parameters())
    stale = [torch.randn_like(p) for p in video]
    scene.opt.base.left = 0.5
    with pytest.raises(InjectedError), scene.turn():
        scene.closure("audio", 3)()
        for p, gradient in zip(video, stale, strict=True):
            p.grad = gradient
        scene.opt.rho = 0.0
        scene.opt.step()
    assert all(p.grad is gradient for p, gradient in zip(video, stale, strict=True))


@pytest.mark.parametrize("form", ["closure", "list", "two", "replay"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("project", ["gradient", "update"])
def test_without_atomic_the_weights_are_restored_after_sam(form, share, project):
    """The perturbation keeps a copy of them anyway; the base's state is not kept. The step can be taken again."""
    kind, options = KINDS["sgd"]
    kind = failing(kind, raise_fault)
    case = Case(lambda p: kind(p, **options), form, atomic=False, project=project)
    scene = case.fresh()
    before = scene.state()
    stop = Partly(share)
    stop.scene = scene
    with scene.turn():
        with stop, pytest.raises(InjectedError):
            scene.step("audio", 3, stop.armed)
        assert not differences(scene.state()["weights"], before["weights"])
        assert scene.state()["recording"] == before["recording"]
        scene.step("audio", 3)
        assert differences(scene.state()["weights"], before["weights"])


# --- lines and moments ----------------------------------------------------------------------------------------------

WATCHED = {
    "igm_rs": [PACKAGE],
    "torch": [TORCH / "optim" / name for name in ("optimizer.py", "sgd.py", "adam.py", "adamw.py")]
    + [TORCH / "nn" / "utils" / "clip_grad.py", TORCH / "amp" / "grad_scaler.py"],
}


SHARE = 1 / 6
"""Of the lines that a step runs, so many are tried in each setting: others in another one."""


def some_of(log, seed):
    """Indices of a log of lines, drawn from the seed: a share of the lines, each at one of the times that it runs."""
    times = {}
    for index, line in enumerate(log):
        times.setdefault(line, []).append(index)
    draw = random.Random(seed)
    return sorted(draw.choice(indices) for indices in times.values() if draw.random() < SHARE)


INTERRUPTED = {
    "fused": {"refresh": 2},
    "adam": {"base": "adam", "refresh": 2},
    "adamw, foreach": {"base": lambda p: BASES["adamw"](p, foreach=True)},
    "the update": {"base": "adam", "project": "update"},
    "no SAM": {"rho": 0.0, "refresh": 1},
    "no SAM, no projection": {"rho": 0.0, "tau": 0.0, "base": "adam"},
    "a list": {"form": "list", "place": "first"},
    "no closure": {"form": "none", "base": "adam", "refresh": 2},
    "replayed": {"form": "replay"},
    "two calls": {"form": "two", "base": "adam", "refresh": 2},
    "outside turns": {"place": "outside"},
    "momentum anew": {"place": "first", "reset": ("momentum", "lr"), "covariance": 0.5},
    "clipped": {"max_grad_norm": 0.1},
    "scaled": {"dtype": torch.float32, "scaler": Scaler, "base": "adam"},
    "same random numbers": {"preserve_rng": True},
}


def interrupt_at(case, indices, files, log):
    for number, at in enumerate(indices):
        path, line = log[at]
        survive(
            case,
            Lines(files, at),
            leave=case.form not in ("closure", "list") or number % 2 == 1,  # the script's own pass is dropped with that
            whole=True,
            say=f"line {path.rpartition('/')[2]}:{line}, {at} of {len(log)}",
        )


@pytest.mark.parametrize("setting", INTERRUPTED)
def test_an_interrupt_at_any_line(setting):
    """Wherever a signal is looked at, the step has been taken wholly or not at all."""
    case = Case(**INTERRUPTED[setting])
    case.expected  # noqa: B018  # what is done once for all is done
    files = [*WATCHED["igm_rs"], *WATCHED["torch"]]
    log = lines_of(case, files)
    assert any(path.startswith(str(PACKAGE)) for path, _ in log)
    for part, needed in (("clip_grad", "max_grad_norm" in case.options), ("grad_scaler", case.scaler is not None)):
        assert any(part in path for path, _ in log) or not needed
    interrupt_at(case, some_of(log, setting), files, log)


@pytest.mark.slow
@pytest.mark.parametrize("setting", INTERRUPTED)
def test_an_interrupt_at_every_line_every_time(setting):
    case = Case(**INTERRUPTED[setting])
    case.expected  # noqa: B018
    files = [*WATCHED["igm_rs"], *WATCHED["torch"]]
    log = lines_of(case, files)
    interrupt_at(case, range(len(log)), files, log)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_signal_at_a_random_moment(form, base):
    """A timer's, from a tenth of the time that a step takes before its beginning to its end."""
    case = Case(base, form, refresh=2)
    case.expected  # noqa: B018
    times = []
    for _ in range(5):
        scene = case.fresh()
        with scene.turn():
            begin = time.perf_counter()
            scene.step("audio", 3)
            times.append(time.perf_counter() - begin)
    draw = random.Random(form + base)
    interrupted = 0
    for trial in range(40):
        scene = case.fresh()
        alarm = Alarm(draw.uniform(0, min(times)))
        raised = False
        try:
            with scene.turn():
                with alarm:
                    scene.step("audio", 3, alarm.armed)
                found = scene.state()
                raise Left
        except Left:
            pass
        except KeyboardInterrupt:
            raised = True
            found = scene.state()
        taken = not differences(found, case.expected[1])
        assert taken or not differences(found, case.expected[0]), (trial, differences(found, case.expected[0])[:6])
        assert taken or raised, trial
        interrupted += raised
        with scene.turn():
            for t in (4,) if taken else (3, 4):
                scene.step("audio", t)
            assert not differences(scene.state(), case.expected[2]), trial
    assert interrupted


def wait_for_an_interrupt():
    """Compute until another thread's SIGINT arrives."""
    timer = threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        x = torch.randn(40, 40)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            x = torch.tanh(x @ x)
    finally:
        timer.join()


def long_pass(_scene, loss):
    wait_for_an_interrupt()
    return loss


@every_base
@pytest.mark.parametrize("at", [0, 1, "base"])
def test_an_interrupt_from_another_thread_in_a_long_pass(base, at):
    kind, options = KINDS[base]
    kind = failing(kind, wait_for_an_interrupt)
    case = Case(lambda p: kind(p, **options), refresh=2)
    stop = Partly(0.5) if at == "base" else Disturbed(at, long_pass, KeyboardInterrupt)
    stop.error = KeyboardInterrupt
    survive(case, stop, leave=True)


# --- around a step --------------------------------------------------------------------------------------------------


@every_form
def test_one_fault_after_another(form):
    """Ten faults at different places in a row, and then the step."""
    case = Case(form=form, refresh=2)
    names = calls_of(case)
    scene = case.fresh()
    draw = random.Random(form)
    with scene.turn():
        for _ in range(10):
            at = draw.randrange(len(names))
            fault = Calls(at, "before" if names[at] in STEPS else draw.choice(["before", "after"]))
            with fault, pytest.raises(InjectedError):
                scene.step("audio", 3, fault.armed)
            assert not differences(scene.state(), case.expected[0])
        scene.step("audio", 3)
        assert not differences(scene.state(), case.expected[1])


def test_a_hook_before_the_step_that_fails_changes_nothing():
    case = Case()
    scene = case.fresh()
    handle = scene.opt.register_step_pre_hook(lambda *_: raise_fault())
    with pytest.raises(InjectedError), scene.turn():
        scene.step("audio", 3)
    handle.remove()
    assert not differences(scene.state(), case.expected[0])


def test_a_hook_after_the_step_that_fails_finds_it_taken():
    case = Case()
    scene = case.fresh()
    handle = scene.opt.register_step_post_hook(lambda *_: raise_fault())
    with pytest.raises(InjectedError), scene.turn():
        scene.step("audio", 3)
    handle.remove()
    assert not differences(scene.state(), case.expected[1])


def ending(scene, armed):
    """The end of a turn, where T is made."""
    turn = scene.turn()
    turn.__enter__()
    scene.step("audio", 3)
    with armed():
        turn.__exit__(None, None, None)


def refreshing(scene, armed):
    with armed():
        scene.opt.refresh("audio")


def collecting(scene, armed):
    with armed(), torch.no_grad(), scene.opt.collect("audio"):
        for x, _ in scene.case.data["audio"][:3]:
            scene.model("audio", x)


def collecting_in_a_turn(scene, armed):
    with scene.turn():
        collecting(scene, armed)
        scene.step("audio", 3)


AROUND = {
    "turn": ({}, ending),
    "refresh": ({"refresh": "manual"}, refreshing),
    "collect": ({}, collecting),
    "collect in a turn": ({}, collecting_in_a_turn),
}


@pytest.mark.parametrize("what", AROUND)
@pytest.mark.parametrize("projector", ["flat", "orthogonal"])
@pytest.mark.parametrize("life", ["fresh", "kept"])
def test_a_fault_where_a_projector_is_made_outside_a_step(what, projector, life):
    """Weights, momentum and every T are as before, and when it is done again all is as without the fault."""
    options, act = AROUND[what]
    case = Case(projector=projector, covariance=life, **options)
    scene = case.fresh()
    calls = Calls()
    with calls:
        act(scene, calls.armed)
    assert calls.log
    expected = scene.state()
    for at, name in enumerate(calls.log):
        for when in ("before", "after"):
            scene = case.fresh()
            fault = Calls(at, when)
            with fault, pytest.raises(InjectedError):
                act(scene, fault.armed)
            found = scene.state()
            for key in ("weights", "projectors", "recording", "gradients on"):
                if key != "weights" or act is not ending:
                    assert not differences(found[key], case.expected[0][key]), (when, name, key)
            if act is ending:  # the step has been taken; what remains is the end of the turn
                with scene.turn():
                    pass
            else:
                act(scene, contextlib.nullcontext)
            assert not differences(scene.state(), expected), (when, at, name, differences(scene.state(), expected)[:6])


@pytest.mark.parametrize("what", ["rho is nothing", "T cannot be made"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_warning_that_is_an_error(monkeypatch, what, base):
    """Whatever warns in a step, it is taken wholly or not at all."""
    if what == "rho is nothing":
        options, message = {"rho": 1e-12, "dtype": torch.float32, "trained": False, "place": "first"}, "resolution"
    else:
        options, message = {"refresh": 1}, "did not converge"
    case = Case(base, **options)

    def failing(*_args, **_kwargs):
        raise ArithmeticError("did not converge")

    def prepared():
        return Scene(case) if what == "rho is nothing" else case.fresh()

    case.start  # noqa: B018
    states = []
    for action in ("error", "ignore"):
        scene = prepared()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            if what != "rho is nothing":
                patch.setattr(igm_rs._igm_rs, "make_projector_from_rows", failing)
            warnings.filterwarnings(action, f".*{message}")
            states.append(scene.state())
            with scene.turn():
                if action == "ignore":
                    scene.step("audio", 3)
                else:
                    with pytest.raises(Warning, match=message):
                        scene.step("audio", 3)
                states.append(scene.state())
    before, raised, _, taken = states
    assert not differences(raised, before) or not differences(raised, taken)
