"""The step that waits for no device: the same numbers as the usual path, and nothing of a gradient that is unusable."""

import copy
import math
import pickle

import pytest
import torch
from models import OwnHeads, Pair, batches, closure_for, same, unchanged
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer, _device, _igm_rs

TWO = ("audio", "video")
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
}
OPTIONS = [
    {},
    {"rho": 0.0},
    {"project": "update"},
    {"max_grad_norm": 0.1},
    {"refresh": 2},
    {"sam_every": 2},
    {"sam_scope": "head"},
    {"p": math.inf},
    {"adaptive": True},
    {"skip_inert": True},
    {"tau": 0.0},
    {"rho": 0.0, "tau": 0.0},
    {"features": "centred", "covariance": "kept"},
    {"features": "samples", "augment_bias": True, "covariance": 0.5},
    {"projector": "orthogonal", "covariance": "kept", "batches": 5},
    {"projector": "ridge", "combine": "sum", "sources": "others"},
    {"control": "random"},
]
every_base = pytest.mark.parametrize("base", BASES)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture
def device(monkeypatch):
    """A switch: whether a step is taken as on a device, without a look at what it computes."""
    usual = _igm_rs.at_perturbed

    def at_perturbed(params, gradients, before, norm, *rest, **more):
        """On a device a norm that is no use moves nothing; on the CPU it is an error."""
        if not (math.isfinite(norm) and norm > 0):
            gradients, norm = [torch.zeros_like(g) for g in gradients], torch.ones_like(norm)
        return usual(params, gradients, before, norm, *rest, **more)

    def switch(on):
        monkeypatch.setattr(_device, "on_device", lambda _: on)
        monkeypatch.setattr(_igm_rs, "at_perturbed", at_perturbed if on else usual)

    return switch


def made(base, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = OwnHeads().to(dtype)
    return model, IGMOptimizer(BASES[base](model.parameters()), **model.options(), **({"tau": 1.5} | options))


def closure_of(opt, model, name, batch, spoil):
    """The usual closure, which in the passes listed in `spoil` ends with an infinity or with zeros."""
    passes = iter(range(9))

    def closure():
        loss = closure_for(opt, model, name, batch)()
        number = next(passes)
        if number in spoil:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.fill_(spoil[number])
        return loss

    return closure


def run(model, opt, spoilt=()):
    """Two rounds of three steps a turn; what `spoilt` lists by (round, name, step) is spoilt. Return all stats."""
    data = batches(TWO, 6, next(model.parameters()).dtype)
    told = []
    for r in range(2):
        for name in TWO:
            with opt.turn(name):
                for t in range(3):
                    spoil = dict(spoilt).get((r, name, t), {})
                    opt.step(closure_of(opt, model, name, data[name][3 * r + t], spoil))
                    told.append(opt.last_stats)
    return told


def compare(told, expected, to_the_bit=True):
    for mine, theirs in zip(told, expected, strict=True):
        a, b = dict(mine), dict(theirs)
        if b["skipped"]:  # what is measured of a step that was not taken may be there, as nobody knew
            keep = ("active", "step", "skipped", "skipped_steps", "turn", "round", "projected")
            a, b = ({key: one[key] for key in keep} for one in (a, b))
        assert same(a, b) if to_the_bit else a.keys() == b.keys()
        for key in () if to_the_bit else ("active", "turn", "round", "step", "skipped", "skipped_steps", "second_pass"):
            assert a.get(key) == b.get(key), key


@every_base
@every_option
def test_equals_the_usual_step_to_the_bit(device, base, options):
    results = []
    for on in (True, False):
        device(on)
        model, opt = made(base, **options)
        opt._core.fused = None
        results.append((model.state_dict(), run(model, opt), opt.state_dict(), opt.covariances, opt.projectors))
    (weights, told, *state), (others, expected, *wanted) = results
    assert same(weights, others)
    assert same(state, wanted)
    compare(told, expected)


def near(a, b):
    """Equal but for round-off: T of features with rows of zeros among them is computed in another order."""
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


UNLIKE = [{"rho": 0.0, "tau": 0.0}, {"sam_every": 2}]
"""A zero is the base's own affair; and whose turn it is to be SAM's is decided before a skipped step is known of."""

SPOILT = [
    {(0, "audio", 1): {0: math.inf}},
    {(0, "audio", 1): {0: math.nan}, (1, "audio", 2): {1: math.inf}},
    {(0, "video", 2): {1: math.nan}, (1, "video", 1): {0: 0.0}},
    {(0, "audio", 2): {1: 0.0}, (1, "video", 1): {0: -math.inf}, (1, "video", 2): {0: math.nan}},
    {(0, "audio", 0): {0: math.inf}},
    {(0, "audio", 0): {1: math.nan}},
]


@every_base
@pytest.mark.parametrize("options", [one for one in OPTIONS if one not in UNLIKE], ids=str)
@pytest.mark.parametrize("spoilt", SPOILT, ids=str)
def test_an_unusable_gradient_leaves_nothing(device, base, options, spoilt):
    results = []
    for on in (True, False):
        device(on)
        model, opt = made(base, **options)
        opt._core.fused = None
        told = run(model, opt, spoilt.items())
        results.append((model.state_dict(), told, opt.state_dict(), opt.projectors, opt.skipped_steps))
    (weights, told, *state), (others, expected, *wanted) = results
    near(weights, others)
    compare(told, expected, to_the_bit=False)
    assert state[-1] == wanted[-1]
    assert state[0]["igm"]["counters"] == wanted[0]["igm"]["counters"]
    near(state[0]["state"], wanted[0]["state"])
    near(state[1], wanted[1])


@every_base
@pytest.mark.parametrize("options", [{}, {"project": "update"}, {"refresh": 3}, {"p": math.inf}], ids=str)
def test_equals_the_reference(device, base, options):
    device(True)
    if "p" in options:
        pytest.importorskip("reference")
    torch.manual_seed(0)
    try:
        pair = Pair(OwnHeads(), BASES[base], tau=1.5, **options)
    except TypeError:
        pytest.skip("the reference does not know this option")
    assert max(pair.run(rounds=2)) < 1e-11


def test_skipped_steps_are_counted_when_asked_for(device):
    device(True)
    model, opt = made("sgd")
    data = batches(TWO, 4)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
        for _ in range(2):
            opt.step(closure_of(opt, model, "audio", data[1], {0: math.nan}))
        counters = opt._core.counters
        assert (counters.skipped, counters.steps) == (0, 3)  # nobody has looked
        stats = opt.last_stats
        assert (stats["skipped"], stats["skipped_steps"], stats["step"]) == (True, 2, 1)
        assert opt.skipped_steps == 2
        assert (counters.skipped, counters.steps, counters.taken["audio"], counters.pending) == (2, 1, 1, {})
        opt.step(closure_for(opt, model, "audio", data[2]))
        assert (opt.last_stats["skipped"], opt.last_stats["skipped_steps"], opt.last_stats["step"]) == (False, 2, 2)
        assert (stats["skipped"], stats["skipped_steps"], stats["step"]) == (True, 2, 1)  # of its own step, still
        assert stats["projected"] == {}


@pytest.mark.parametrize("way", ["state dict", "deepcopy", "pickle", "turn end"])
def test_whoever_needs_the_counts_settles_them(device, way):
    device(True)
    model, opt = made("sgd")
    data = batches(TWO, 4)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
        opt.step(closure_of(opt, model, "audio", data[1], {0: math.nan}))
        if way == "state dict":
            counters = opt.state_dict()["igm"]["counters"]
            assert (counters["skipped"], counters["steps"]) == (1, 1)
            assert "pending" not in counters
            return
        if way != "turn end":
            twins = copy.deepcopy((model, opt)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
            opt = twins[1]
    assert (opt._core.counters.skipped, opt._core.counters.steps) == (1, 1)


def test_a_failure_after_the_device_has_decided_is_undone(device, monkeypatch):
    device(True)
    model, opt = made("adam")
    data = batches(TWO, 4)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
        opt.step(closure_of(opt, model, "audio", data[1], {1: math.inf}))
        before = [p.detach().clone() for p in model.parameters()]
        monkeypatch.setattr(type(opt._core.counters), "doubt", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.step(closure_for(opt, model, "audio", data[2]))
        monkeypatch.undo()
        assert unchanged(model, before)
        assert opt.skipped_steps == 1
        assert opt.state_dict()["igm"]["counters"]["steps"] == 1


def test_a_perturbation_below_the_resolution_is_warned_about_at_the_end_of_the_turn(device):
    device(True)
    model, opt = made("sgd", torch.float32, rho=1e-9)
    data = batches(TWO, 1, torch.float32)["audio"]
    turn = opt.turn("audio")
    turn.__enter__()
    opt.step(closure_for(opt, model, "audio", data[0]))
    with pytest.warns(UserWarning, match="below the resolution"):
        turn.__exit__(None, None, None)
    assert opt.turns == 1


def test_without_atomic_a_step_waits_and_copies_nothing(device):
    device(True)
    model, opt = made("adam", atomic=False)
    opt._core.fused = None
    data = batches(TWO, 2)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
        before = [p.detach().clone() for p in model.parameters()]
        opt.step(closure_of(opt, model, "audio", data[1], {1: math.inf}))
    assert not opt._core.spare
    assert unchanged(model, before)
    assert opt._core.counters.skipped == 1


@pytest.mark.cuda
@every_base
@every_option
def test_nothing_waits_on_cuda(base, options):
    torch.manual_seed(0)
    model = OwnHeads().cuda()
    opt = IGMOptimizer(BASES[base](model.parameters()), **model.options(), **({"tau": 1.5} | options))
    data = batches(TWO, 6, torch.float32, device="cuda")
    refresh = options.get("refresh", "turn")
    for name in TWO:
        with opt.turn(name):
            for batch in data[name][:2]:  # makes the base's state, and T
                opt.step(closure_for(opt, model, name, batch))
    for name in TWO:
        with opt.turn(name):
            torch.cuda.synchronize()
            if refresh == "turn" and "skip_inert" not in options:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for batch in data[name][2:]:
                    opt.step(closure_for(opt, model, name, batch))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert opt.last_stats["skipped_steps"] == 0


@pytest.mark.cuda
@pytest.mark.parametrize("base", [name for name in BASES if name != "adam"])
@pytest.mark.parametrize("spoil", [{0: math.inf}, {1: math.nan}], ids=str)
def test_an_unusable_gradient_on_cuda_leaves_nothing(base, spoil):
    torch.manual_seed(0)
    model = OwnHeads().cuda()
    opt = IGMOptimizer(BASES[base](model.parameters()), **model.options(), tau=1.5)
    data = batches(TWO, 3, torch.float32, device="cuda")["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
        before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
        closure = closure_of(opt, model, "audio", data[1], spoil)
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same((model.state_dict(), opt.state_dict()["state"]), before)
        assert opt.skipped_steps == 1
        loss = opt.step(closure_for(opt, model, "audio", data[2]))
        assert math.isfinite(loss.item())
        assert not opt.last_stats["skipped"]
    assert cross_entropy(model("audio", data[2][0]), data[2][1]).isfinite()
