"""What ``mode="released"`` refuses: arguments, switches, closures and other forms of a step, with class and message."""

import copy
import dataclasses
import math

import pytest
import torch
from faults import differences
from released_models import F32, PAPER, TWO, batches, closure_for, net

import igm_rs
from igm_rs import Released

PAIR = "expected a pair (loss, flat): L(θ) with its graph, and a callable"

REFUSED_ARGUMENTS = {
    "mode": ({"mode": "authors"}, ["mode is 'authors'", "'paper', 'released' or an igm_rs.Released"]),
    "pairing": ({"pairing": "name"}, ["pairing is 'name' with mode='released'", "mode=igm_rs.Released(pairing=…)"]),
    "reset": ({"reset": "lr"}, ["reset is 'lr' with mode='released'", "mode=igm_rs.Released(reset=…)"]),
    "p": ({"p": math.inf}, ["p is inf with mode='released', which has no use for it; expected 2.0"]),
    "adaptive": ({"adaptive": True}, ["adaptive is True with mode='released'", "expected False"]),
    "sam_every": ({"sam_every": 2}, ["sam_every is 2 with mode='released'", "expected 1"]),
    "sam_scope": ({"sam_scope": "head"}, ["sam_scope is 'head' with mode='released'", "expected 'all'"]),
    "skip_inert": ({"skip_inert": True}, ["skip_inert is True with mode='released'", "expected False"]),
    "preserve_rng": ({"preserve_rng": True}, ["preserve_rng is True with mode='released'", "expected False"]),
    "refresh": ({"refresh": 5}, ["refresh is 5 with Released(gather='pass')", "'turn' or 'manual'", "gather='turn'"]),
    "no head": (
        {"mode": Released(rho_head=0.1), "heads": None},
        ["rho_head is 0.1 without a head", "heads= or head="],
    ),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_arguments_that_have_no_place_in_this_mode(case):
    options, fragments = REFUSED_ARGUMENTS[case]
    with pytest.raises(ValueError, match=fragments[0].partition(" ")[0]) as caught:
        net().optimizer(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)


REFUSED_FIELDS = [
    ({"norm": "each"}, ValueError, "norm is 'each', expected one of 'tensor', 'all'"),
    ({"rho_head": -1.0}, ValueError, "rho_head is -1.0, expected a finite number >= 0"),
    ({"rho_head": "0.1"}, TypeError, "rho_head is '0.1' (str), expected a number"),
    ({"restore": 1}, TypeError, "restore is 1 (int), expected True or False"),
    ({"second_pass": "all"}, ValueError, "second_pass is 'all', expected one of 'head', 'whole'"),
    ({"flat_ratio": 1.5}, ValueError, "flat_ratio is 1.5, expected a share in [0, 1]"),
    ({"gather": "steps"}, ValueError, "gather is 'steps', expected one of 'pass', 'turn'"),
    ({"layers": "convolutions"}, ValueError, "layers is 'convolutions', expected one of 'linear', 'all'"),
    ({"pairing": "size"}, ValueError, "pairing is 'size', expected one of 'position', 'name', 'shape'"),
    ({"reset": "weights"}, ValueError, "reset is 'weights', expected one of 'momentum', 'lr'"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED_FIELDS, ids=[row[2] for row in REFUSED_FIELDS])
def test_values_of_the_switches(fields, error, message):
    with pytest.raises(error) as caught:
        Released(**fields)
    assert str(caught.value) == message


def changed(change):
    """A maker of closures whose pair (loss, flat) is changed into something else."""
    return lambda model, name, batch: lambda: change(*closure_for(model, name, batch)())


def backward(loss, flat):
    loss.backward()
    return loss, flat


REFUSED_STEPS = {
    "no closure": (
        lambda *_: None,
        TypeError,
        (
            "step() without a closure with mode='released', expected one that returns a pair (loss, flat): L(θ) with "
            "its graph, and a callable that returns the loss of the head at the weights of the moment, on the features "
            "of that pass"
        ),
    ),
    "a list": (
        lambda *of: [closure_for(*of)],
        TypeError,
        "closure is a list with mode='released', expected one callable: the perturbation is that of one batch",
    ),
    "a number": (lambda *_: 3, TypeError, "closure is a int, expected a callable"),
    "None": (changed(lambda *_: None), TypeError, f"closure returned None with mode='released', {PAIR}"),
    "a loss alone": (
        changed(lambda loss, _: loss),
        TypeError,
        f"closure returned a Tensor with mode='released', {PAIR}",
    ),
    "two losses": (
        changed(lambda loss, _: (loss, loss)),
        TypeError,
        f"closure returned (Tensor, Tensor) with mode='released', {PAIR}",
    ),
    "a number for a loss": (
        changed(lambda _, flat: (1.0, flat)),
        TypeError,
        "closure returned the loss as a float, expected a tensor with its graph",
    ),
    "a loss without a graph": (
        changed(lambda loss, flat: (loss.detach(), flat)),
        ValueError,
        (
            "closure returned a loss without a graph, expected one computed from the parameters, not detached, and "
            "with no backward() before"
        ),
    ),
    "several losses": (
        changed(lambda loss, flat: (loss.expand(3), flat)),
        ValueError,
        "closure returned a loss of the shape (3,), expected one number",
    ),
    "backward": (
        changed(backward),
        RuntimeError,
        (
            "closure has left gradients with mode='released', expected it to compute the loss and no more: step() "
            "calls backward()"
        ),
    ),
    "flat returns a number": (
        changed(lambda loss, _: (loss, lambda: 1.0)),
        TypeError,
        "flat returned the loss as a float, expected a tensor with its graph",
    ),
    "flat returns no graph": (
        changed(lambda loss, _: (loss, lambda: torch.ones(()))),
        ValueError,
        "flat returned a loss without a graph",
    ),
    "a loss of something else": (
        lambda *_: lambda: (torch.ones((), requires_grad=True) * 1, lambda: None),
        RuntimeError,
        (
            "closure returned a loss that depends on none of the 11 parameters of 'audio', expected one that is "
            "computed from them"
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED_STEPS)
def test_closures_that_cannot_be_taken_change_nothing(case):
    make, error, message = REFUSED_STEPS[case]
    model = net()
    opt = model.optimizer()
    first, second = batches(TWO, 2)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(model, "audio", first))
        before = copy.deepcopy((dict(model.named_parameters()), opt.state_dict()))
        closure = make(model, "audio", second)
        with pytest.raises(error) as caught:
            opt.step(closure)
        assert str(caught.value).startswith(message)
        assert not differences(before, (dict(model.named_parameters()), opt.state_dict()))
        opt.step(closure_for(model, "audio", second))


def test_a_loss_of_two_modalities_outside_turns():
    model = net()
    opt = model.optimizer()
    data = batches(TWO, 1)

    def closure():
        losses = [closure_for(model, name, data[name][0])()[0] for name in TWO]
        return sum(losses), lambda: losses[0]

    with pytest.raises(
        RuntimeError, match="step outside any turn: 'audio' and 'video' of 'audio', 'video' has gradients"
    ):
        opt.step(closure)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("first_step", lambda opt: opt.first_step()),
        ("second_step", lambda opt: opt.second_step()),
        ("replay", lambda opt: opt.replay(lambda: None)),
        ("remember_rng", lambda opt: opt.remember_rng()),
    ],
)
def test_other_forms_of_a_step(what, call):
    opt = net().optimizer()
    with pytest.raises(RuntimeError) as caught:
        call(opt)
    assert str(caught.value) == f"{what} with mode='released', expected step(closure), which makes both passes itself"


def test_a_scaler():
    model = net(dtype=F32)
    opt = model.optimizer()
    with pytest.raises(ValueError, match="scaler is given with mode='released', expected none: step"):
        opt.step(closure_for(model, "audio", batches(TWO, 1, F32)["audio"][0]), scaler=torch.amp.GradScaler("cpu"))


def test_a_cuda_graph(monkeypatch):
    monkeypatch.setattr("igm_rs._released.capturing", lambda _: True)
    model = net()
    opt = model.optimizer()
    with opt.turn("audio"), pytest.raises(RuntimeError, match="mode='released' while a CUDA graph is recorded"):
        opt.step(closure_for(model, "audio", batches(TWO, 1)["audio"][0]))


def test_everything_frozen_is_no_step():
    model = net()
    opt = model.optimizer()
    for p in model.parameters():
        p.requires_grad_(False)
    given = torch.ones((), requires_grad=True)
    loss = given * 1
    with opt.turn("audio"):
        assert opt.step(lambda: (loss, lambda: loss)) is loss
    assert opt.last_stats == {}


def test_mode_is_told():
    assert net().optimizer().mode == Released()
    assert net().optimizer(mode=PAPER).mode is PAPER
    assert net().optimizer(mode="paper").mode == "paper"
    assert {"Released", "released"} <= set(igm_rs.__all__)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Released().norm = "all"
