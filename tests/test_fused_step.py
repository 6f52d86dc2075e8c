"""The fused SAM + base step inside the optimizer: when it is taken, and that it changes nothing but the time."""

import copy

import pytest
import torch
from models import OwnHeads, batches, closure_for, distance

from igm_rs import IGMOptimizer
from igm_rs._fused import FusedAdam, FusedSGD

TWO = ("audio", "video")
SETTINGS = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    (torch.optim.SGD, {"weight_decay": 1e-2}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 1e-2, "amsgrad": True}),
    (torch.optim.AdamW, {"weight_decay": 1e-2}),
    (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
]


def run(model, opt, data):
    for t in range(3):
        for name in TWO:
            with opt.turn(name):
                opt.step(closure_for(opt, model, name, data[name][t]))


def counted(monkeypatch):
    calls = []
    for kind in (FusedSGD, FusedAdam):

        def fused(*args, usual=kind.prepare, **kwargs):
            calls.append(1)
            return usual(*args, **kwargs)

        monkeypatch.setattr(kind, "prepare", fused)
    return calls


@pytest.mark.parametrize(("base", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_equals_restore_and_torchs_own_step_to_the_bit(monkeypatch, base, settings, dtype):
    calls = counted(monkeypatch)
    model = OwnHeads().to(dtype)
    twin = copy.deepcopy(model)
    opts = []
    for m, fused in ((model, True), (twin, False)):
        groups = [{"params": m.encoders.parameters(), "lr": 0.05}, {"params": m.heads.parameters()}]
        opt = IGMOptimizer(base(groups, lr=0.1, **settings), **m.options(), tau=1.5)
        if not fused:
            opt._core.fused = None
        opts.append(opt)
    data = batches(TWO, 3, dtype)
    run(model, opts[0], data)
    assert len(calls) == 6
    run(twin, opts[1], data)
    assert len(calls) == 6
    assert distance(model, twin) == 0
    mine, theirs = (opt.state_dict()["state"] for opt in opts)
    assert mine.keys() == theirs.keys()
    for key, entry in mine.items():
        assert entry.keys() == theirs[key].keys()
        assert all(torch.equal(entry[name], theirs[key][name]) for name in entry)


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, torch.float32, True),
        ({"rho": 0.0}, torch.float32, True),
        ({"project": "update"}, torch.float32, False),
        ({}, torch.bfloat16, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_when_the_fused_step_is_taken(monkeypatch, base, options, dtype, expected):
    calls = counted(monkeypatch)
    model = OwnHeads().to(dtype)
    opt = IGMOptimizer(base(model.parameters(), lr=0.1), **model.options(), **options)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, dtype)["audio"][0]))
    assert bool(calls) == expected


@pytest.mark.parametrize("change", [{"lr": torch.tensor(0.1)}, {"fused": True}, {"differentiable": True}], ids=str)
def test_groups_that_only_torch_can_step(monkeypatch, change):
    calls = counted(monkeypatch)
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options())
    opt.param_groups[0].update(change)
    before = copy.deepcopy(model)
    if not change.get("differentiable"):
        with opt.turn("audio"):
            opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
        assert distance(model, before) > 0
    assert not opt._core.fused.possible(list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()])
    assert not calls


def test_a_subclass_of_sgd_steps_by_itself(monkeypatch):
    class Doubled(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            return super().step(closure)

    calls = counted(monkeypatch)
    model = OwnHeads()
    opt = IGMOptimizer(Doubled(model.parameters(), lr=0.1), **model.options())
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
    assert not calls


def test_groups_with_and_without_momentum_side_by_side(monkeypatch):
    calls = counted(monkeypatch)
    model = OwnHeads()
    twin = copy.deepcopy(model)
    data = batches(TWO, 3, torch.float32)
    opts = []
    for m, fused in ((model, True), (twin, False)):
        groups = [{"params": m.encoders.parameters(), "momentum": 0.0}, {"params": m.heads.parameters()}]
        opt = IGMOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), **m.options())
        opt._core.fused = opt._core.fused if fused else None
        run(m, opt, data)
        opts.append(opt)
    assert len(calls) == 6
    assert distance(model, twin) == 0
    assert opts[0].state_dict()["state"].keys() == opts[1].state_dict()["state"].keys()
