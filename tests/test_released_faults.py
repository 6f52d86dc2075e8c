"""Faults and state of ``mode="released"``: a step is taken wholly or not at all; copies, checkpoints, hooks."""

import contextlib
import copy
import functools
import gc
import io
import pickle

import pytest
import torch
from faults import (
    BASES,
    PACKAGE,
    TORCH,
    Case,
    Disturbed,
    InjectedError,
    Lines,
    Scene,
    differences,
    fail_at_every_call,
    failing,
    lines_of,
    survive,
)
from models import OwnHeads
from released_models import ADAM, SGD, TWO, batches, closure_for, net
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer, Released

RMSPROP = functools.partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9)
GATHERING = Released(gather="turn")
"""Its turns make T, so that the next one projects."""


@pytest.fixture(autouse=True)
def _a_form_of_its_own(monkeypatch):
    """Scenes can take a released step; autograd that stays off fails no other test."""
    monkeypatch.setattr(Scene, "_released", released_step, raising=False)
    yield
    torch.set_grad_enabled(True)


def released_step(scene, name, t, armed):
    """One released step of a scene; `disturb` has the last word on both losses."""
    x, y = scene.case.data[name][t]
    head = scene.model.heads[name]

    def last_word(loss):
        return loss if scene.disturb is None else scene.disturb(scene, loss)

    def closure():
        features = scene.model.encoders[name](x)
        return last_word(cross_entropy(head(features), y)), lambda: last_word(cross_entropy(head(features), y.roll(1)))

    with armed():
        scene.opt.step(closure)


def case_of(base="sgd", mode=GATHERING, **options):
    return Case(base, "released", mode=mode, **options)


SETTINGS = {
    "as released": {"mode": "released"},
    "T of the turn": {},
    "taken back": {"mode": Released(gather="turn", restore=True)},
    "the whole again": {"mode": Released(gather="turn", second_pass="whole", norm="all")},
    "the update": {"project": "update"},
    "the first of a turn": {"place": "first"},
    "outside turns": {"place": "outside"},
    "clipped": {"max_grad_norm": 0.1},
    "half precision": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("base", ["sgd", "adam", RMSPROP], ids=["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:the turn of '.*' begins and '.*' has no T")
def test_every_kernel(setting, base):
    names = fail_at_every_call(case_of(base, **SETTINGS[setting]))
    assert "at_shifted" in names
    projects = {"project_", "project_update_"} & set(names)
    assert bool(projects) == (setting != "as released")  # whose T is made by a pass, of which there was none


def act(scene, loss):
    """What fails in a pass."""
    raise InjectedError("in the pass")


class FailsBackwards(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, __):
        raise InjectedError("in the backward pass")


def act_backwards(scene, loss):
    """What fails in a backward pass."""
    return FailsBackwards.apply(loss)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("acting", [act, act_backwards], ids=["forward", "backward"])
@pytest.mark.parametrize("at", [0, 1], ids=["closure", "flat"])
@pytest.mark.parametrize("second_pass", ["head", "whole"])
@pytest.mark.parametrize("base", ["sgd", "adam", RMSPROP], ids=["SGD", "Adam", "RMSprop"])
def test_every_pass(base, second_pass, at, acting, leave):
    case = case_of(base, mode=Released(gather="turn", second_pass=second_pass))
    survive(case, Disturbed(at, acting, InjectedError), leave=leave)


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


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("project", ["gradient", "update"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_base_that_fails_after_some_parameters(kind, share, project, restore):
    kind = failing(kind, raise_fault)
    case = case_of(lambda p: kind(p, lr=0.05), mode=Released(gather="turn", restore=restore), project=project)
    survive(case, Partly(share), leave=share == 0.5)


@pytest.mark.parametrize("restore", [False, True])
def test_without_atomic_the_weights_are_those_before_a_base_that_fails(restore):
    kind = failing(torch.optim.SGD, raise_fault)
    mode = Released(gather="turn", restore=restore)
    scene = case_of(lambda p: kind(p, lr=0.05, momentum=0.9), mode=mode, atomic=False).fresh()
    before, fault = scene.state(), Partly(0.5)
    fault.scene = scene
    with scene.turn():
        with fault, pytest.raises(InjectedError):
            scene.step("audio", 3, fault.armed)
        assert not differences(scene.state()["weights"], before["weights"])
        scene.step("audio", 3)
    assert differences(scene.state()["weights"], before["weights"])


def test_what_is_perturbed_and_not_stepped_is_restored_where_the_base_fails():
    """A parameter that only L depends on, where F alone has a say in the gradient."""
    kind = failing(torch.optim.SGD, raise_fault)
    model = torch.nn.Linear(2, 1).double()
    model.idle = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = IGMOptimizer(kind(model.parameters(), lr=0.1), mode=Released(flat_ratio=1.0))
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        y = model(torch.ones(3, 2, dtype=torch.float64)).sum()
        return y * model.idle, lambda: model(torch.ones(3, 2, dtype=torch.float64)).sum()

    opt.base.left = 0.5
    with pytest.raises(InjectedError), opt.turn("all"):
        opt.step(closure)
    assert all(map(torch.equal, before, model.parameters()))
    opt.base.left = None
    with opt.turn("all"):
        opt.step(closure)
    assert not any(map(torch.equal, before, model.parameters()))


WATCHED = [PACKAGE, *(TORCH / "optim" / name for name in ("optimizer.py", "sgd.py", "adam.py"))]


each_way = pytest.mark.parametrize(
    "base", ["sgd", lambda p: BASES["adam"](p, foreach=True)], ids=["fused", "by the base itself"]
)


def interrupt_at_every(nth, base):
    """Wherever a signal is looked at, the step has been taken wholly or not at all."""
    case = case_of(base)
    case.expected  # noqa: B018  # what is done once for all is done
    log = lines_of(case, WATCHED)
    assert any(path.endswith("_released.py") for path, _ in log)
    for at in range(0, len(log), nth):
        survive(case, Lines(WATCHED, at), leave=at % 2 == 1, whole=True, say=str(log[at]))


@each_way
def test_an_interrupt_at_some_lines(base):
    interrupt_at_every(13, base)


@pytest.mark.slow
@each_way
def test_an_interrupt_at_every_line(base):
    interrupt_at_every(1, base)


# --- state ------------------------------------------------------------------------------------------------------------


def train(model, opt, name, data, collect=False):
    """A turn over the batches, and a pass that makes T where there is to be one."""
    with opt.turn(name):
        for batch in data[name]:
            opt.step(closure_for(model, name, batch))
    if collect:
        model.eval()
        with opt.collect(name), torch.no_grad():
            for batch in data[name]:
                model.heads[name](model.encoders[name](batch["x"]))
        model.train()


def pickled(both):
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("base", [SGD, ADAM], ids=["SGD", "Adam"])
def test_a_copy_goes_on_as_the_original(base, copied):
    model, data = net(), batches(TWO, 3)
    opt = model.optimizer(base, mode=Released(rho_head=0.1, flat_ratio=0.5))
    train(model, opt, "audio", data, collect=True)
    other, twin = copied((model, opt))
    assert twin.mode == opt.mode
    for one, its in ((model, opt), (other, twin)):
        train(one, its, "video", data)
        assert its.last_stats["projected"]
        assert its.covariances["video"] == {}, "steps gather nothing, in a copy too"
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("base", [SGD, ADAM, RMSPROP], ids=["SGD", "Adam", "RMSprop"])
def test_a_checkpoint_in_the_middle_of_a_turn(base):
    model, data = net(), batches(TWO, 4)
    opt = model.optimizer(base)
    train(model, opt, "audio", data, collect=True)
    with opt.turn("video"):
        for batch in data["video"][:2]:
            opt.step(closure_for(model, "video", batch))
        file = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), file)
        for batch in data["video"][2:]:
            opt.step(closure_for(model, "video", batch))
    file.seek(0)
    other = net(seed=1)
    twin = other.optimizer(base)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    twin.load_state_dict(state)
    with twin.turn("video"):
        for batch in data["video"][2:]:
            twin.step(closure_for(other, "video", batch))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert not differences(opt.state_dict(), twin.state_dict())


def test_a_state_dict_of_the_papers_mode_loads():
    """The mode is an argument, not state."""
    model, data = net(), batches(TWO, 2)
    before = model.optimizer(mode="paper")
    after = model.optimizer()
    after.load_state_dict(before.state_dict())
    train(model, after, "audio", data)
    assert after.turns == 1


def test_distributed_checkpoints_make_the_state_without_a_step():
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), **model.options(), mode="released")
    before = [p.detach().clone() for p in model.parameters()]
    state = get_optimizer_state_dict(model, opt)
    assert all(map(torch.equal, before, model.parameters()))
    set_optimizer_state_dict(model, opt, state)
    assert opt.last_stats == {}


def test_no_hook_stays_and_no_scratch_is_kept_alive():
    model, data = net(), batches(TWO, 2)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    opt = model.optimizer()
    during = hooks()
    train(model, opt, "audio", data, collect=True)
    assert hooks() == during
    del opt
    gc.collect()
    assert hooks() == 0


def test_several_processes_are_refused_before_the_closure(monkeypatch):
    """Each would climb by the gradient of its own batch: autograd.grad, unlike backward, is averaged by nobody."""
    model = net()
    opt = model.optimizer(tau=0.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    before = copy.deepcopy((dict(model.named_parameters()), opt.state_dict()))
    with pytest.raises(RuntimeError, match=r"mode='released' in 2 processes: .* expected one process, or mode='paper'"):
        opt.step(lambda: pytest.fail("the closure was called"))
    assert not differences(before, (dict(model.named_parameters()), opt.state_dict()))
