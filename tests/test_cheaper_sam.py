"""Cheaper SAM, honest about what it is: sam_every, sam_scope="head", skip_inert; other norms: p, adaptive."""

import contextlib
import copy
import gc
import io
import itertools
import math
import pickle
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from faults import InjectedError, Lines
from models import WIDTHS, OwnHeads, batches, closure_for, same, unchanged
from torch import nn
from torch.nn.functional import cross_entropy

import igm_rs
from igm_rs import IGMOptimizer

TWO = ("audio", "video")
ETA = 0.01


class Noisy(OwnHeads):
    """Encoders with BatchNorm and dropout, and dropout in the head; what an encoder gives may be packed."""

    def __init__(self, names=TWO, pack=None, dropout=0.3):
        super().__init__(names)
        for encoder in self.encoders.values():
            encoder.insert(1, nn.BatchNorm1d(8))
            encoder.append(nn.Dropout(dropout))
            if pack is not None:
                encoder.append(pack)
        for head in self.heads.values():
            head.insert(2, nn.Dropout(dropout))

    def forward(self, name, x):
        z = self.encoders[name](x)
        return self.heads[name](z if isinstance(z, torch.Tensor) else z["z"] if isinstance(z, dict) else z[0])

    def options(self):
        names = list(self.encoders)
        return {"modalities": {n: self.encoders[n] for n in names}, "heads": {n: self.heads[n] for n in names}}


def noisy(seed=0, base=torch.optim.SGD, kind=Noisy, **options):
    torch.manual_seed(seed)
    model = kind().double()
    opt = IGMOptimizer(base(model.parameters(), lr=0.1), **model.options(), **({"tau": 1.5} | options))
    return model, opt


def passes_of(model, name="audio"):
    """A list that grows by one entry whenever the encoder and the head of `name` really compute."""
    calls = []
    model.encoders[name][0].register_forward_hook(lambda *_: calls.append("encoder"))
    model.heads[name][0].register_forward_hook(lambda *_: calls.append("head"))
    return calls


def by_hand(model, name, batch, rho, p=2.0, adaptive=False, head_only=True):
    """Gradients at θ and at θ + ε*, in plain torch, of a model without random numbers."""
    features = model.encoders[name](batch[0])
    params = list(model.encoders[name].parameters()), list(model.heads[name].parameters())
    loss = cross_entropy(model.heads[name](features), batch[1])
    first = torch.autograd.grad(loss, [*params[0], *params[1]])
    of_encoder, of_head = first[: len(params[0])], first[len(params[0]) :]
    moved = params[1] if head_only else [*params[0], *params[1]]
    gradients = of_head if head_only else first
    scales = [q.detach().abs() + ETA if adaptive else torch.ones_like(q) for q in moved]
    norm = math.sqrt(sum(float((t * g).square().sum()) for t, g in zip(scales, gradients, strict=True)))
    before = [q.detach().clone() for q in moved]
    with torch.no_grad():
        for q, t, g in zip(moved, scales, gradients, strict=True):
            q.add_(rho * t * g.sign() if p == math.inf else (rho / norm) * t * t * g)
    if head_only:
        second = torch.autograd.grad(cross_entropy(model.heads[name](features.detach()), batch[1]), params[1])
        result = [*of_encoder, *second]
    else:
        result = torch.autograd.grad(cross_entropy(model(name, batch[0]), batch[1]), moved)
    with torch.no_grad():
        for q, saved in zip(moved, before, strict=True):
            q.copy_(saved)
    return [*params[0], *params[1]], result


# --- p and adaptive ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_gradient_at_the_perturbed_weights_by_hand(p, adaptive, scope):
    torch.manual_seed(0)
    model = OwnHeads().double()
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), **model.options(), p=p, adaptive=adaptive, sam_scope=scope
    )
    batch = batches(TWO, 1)["audio"][0]
    params, expected = by_hand(model, "audio", batch, 0.05, p, adaptive, scope == "head")
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batch))
    for q, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(q.grad, gradient, rtol=0, atol=1e-14)
    stats = opt.last_stats
    assert stats["second_pass"] == {"all": "taken", "head": "head"}[scope]
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected))
    assert stats["grad_norm_perturbed"] == pytest.approx(norm, rel=1e-12)
    if adaptive:
        assert stats["effective_perturbation"] is None
    else:
        assert stats["effective_perturbation"] == pytest.approx(1.0, abs=1e-9)
    assert stats["moved"] == 1.0


@pytest.mark.parametrize("options", [{"p": math.inf}, {"adaptive": True}, {"p": math.inf, "adaptive": True}], ids=str)
def test_two_call_form_and_replay_perturb_alike(options):
    data = batches(TWO, 1)["audio"][0]
    gradients = []
    for form in ("closure", "two", "replay"):
        torch.manual_seed(0)
        model = OwnHeads().double()
        opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), **options)
        closure = closure_for(opt, model, "audio", data)
        with opt.turn("audio"):
            if form == "closure":
                opt.step(closure)
            else:
                closure()
                if form == "two":
                    opt.first_step()
                    closure()
                    opt.second_step()
                else:
                    opt.replay(closure)
                    opt.step()
        gradients.append([q.grad for q in model.heads["audio"].parameters()] + [q.data for q in model.parameters()])
    assert same(gradients[0], gradients[1])
    assert same(gradients[0], gradients[2])


@pytest.mark.parametrize("options", [{}, {"p": math.inf}, {"adaptive": True}, {"sam_scope": "head"}], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_what_is_maximised_is_perturbed_downhill(base, options):
    """SAM around a base that maximises L is SAM around one that minimises −L: ε* looks for the worst on either side."""
    ends = []
    for sign in (1, -1):
        torch.manual_seed(0)
        model = OwnHeads().double()
        given = base(model.parameters(), lr=0.05, maximize=sign == -1)
        opt = IGMOptimizer(given, rho=0.1, tau=0.0, **model.options(), **options)
        for x, y in batches(("audio",), 3)["audio"]:

            def closure(opt=opt, model=model, x=x, y=y, sign=sign):
                opt.zero_grad()
                loss = sign * torch.nn.functional.cross_entropy(model("audio", x), y)
                loss.backward()
                return loss

            opt.step(closure)
            told = opt.last_stats
            assert told["loss_perturbed"] * sign > told["loss"] * sign
            assert told["effective_perturbation"] is None or told["effective_perturbation"] == pytest.approx(1)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    "options", [{"p": math.inf}, {"adaptive": True}, {"rho": {"audio": 0.05, "video": 0.1}}], ids=str
)
def test_groups_with_their_own_rho(options):
    torch.manual_seed(0)
    model = OwnHeads().double()
    groups = [{"params": model.encoders.parameters(), "rho": 0.01}, {"params": model.heads.parameters()}]
    opt = IGMOptimizer(torch.optim.SGD(groups, lr=0.1), **model.options(), **options)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0]))
    effective = opt.last_stats["effective_perturbation"]
    assert effective == (pytest.approx(1.0, abs=1e-9) if "rho" in options else None)


def test_an_adaptive_perturbation_below_the_resolution_is_warned_about():
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), adaptive=True, rho=1e-9)
    with opt.turn("audio"), pytest.warns(UserWarning, match="the realised perturbation moved [0-9.]+% of them"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))


# --- sam_every --------------------------------------------------------------------------------------------------------


def run(model, opt, data, steps=7, calls=None):
    """Alternate between the modalities; return what the steps of "audio" say of their second pass."""
    told = []
    for t in range(steps):
        for name in TWO:
            with opt.turn(name):
                opt.step(closure_for(opt, model, name, data[name][t]))
            if name == "audio":
                told.append(opt.last_stats["second_pass"])
    return told


def test_sam_in_the_first_and_every_third_step_of_each_modality():
    model, opt = noisy(sam_every=3)
    calls = passes_of(model)
    data = batches(TWO, 7)
    assert run(model, opt, data) == ["taken", "every", "every", "taken", "every", "every", "taken"]
    assert calls.count("encoder") == 7 + 3
    assert opt.unperturbed_steps == 0


def test_a_step_between_is_one_without_sam_to_the_bit():
    model, opt = noisy(sam_every=2)
    data = batches(TWO, 2)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data["audio"][0]))
        twin, other = copy.deepcopy((model, opt))
        other.rho["audio"] = 0.0
        torch.manual_seed(3)
        opt.step(closure_for(opt, model, "audio", data["audio"][1]))
    with other.turn("audio"):
        torch.manual_seed(3)
        other.step(closure_for(other, twin, "audio", data["audio"][1]))
    assert same(model.state_dict(), twin.state_dict())
    stats = opt.last_stats
    assert (stats["second_pass"], other.last_stats["second_pass"]) == ("every", "off")
    for key in ("loss_perturbed", "sharpness", "grad_norm_perturbed", "effective_perturbation", "moved"):
        assert stats[key] is None


def test_a_step_between_needs_no_closure():
    model, opt = noisy(sam_every=2)
    data = batches(TWO, 2)
    with opt.turn("audio"):
        closure_for(opt, model, "audio", data["audio"][0])()
        with pytest.warns(UserWarning, match="without a closure"):
            opt.step()
        assert opt.last_stats["second_pass"] == "no closure"
        closure_for(opt, model, "audio", data["audio"][1])()
        opt.step()
        assert opt.last_stats["second_pass"] == "every"
    assert opt.unperturbed_steps == 1


def test_a_skipped_step_does_not_count():
    model, opt = noisy(sam_every=2)
    data = batches(TWO, 2)["audio"]

    def broken():
        loss = closure_for(opt, model, "audio", data[0])()
        model.encoders["audio"][0].weight.grad.fill_(math.nan)
        return loss

    told = []
    with opt.turn("audio"):
        for closure in (
            broken,
            closure_for(opt, model, "audio", data[0]),
            broken,
            closure_for(opt, model, "audio", data[1]),
        ):
            opt.step(closure)
            told.append((opt.last_stats["skipped"], opt.last_stats["second_pass"]))
    assert told == [(True, None), (False, "taken"), (True, "every"), (False, "every")]


def test_the_count_survives_a_checkpoint():
    whole, parts = noisy(sam_every=3), noisy(sam_every=3)
    data = batches(TWO, 7)
    told = run(*whole, data)
    first = run(*parts, {n: d[:2] for n, d in data.items()}, 2)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts] + [torch.get_rng_state()], file)
    file.seek(0)
    model, opt = noisy(1, sam_every=3)
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    assert first + run(model, opt, {n: d[2:] for n, d in data.items()}, 5) == told


# --- skip_inert -------------------------------------------------------------------------------------------------------


def test_a_perturbation_that_moves_nothing_has_no_second_pass():
    torch.manual_seed(0)
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), rho=1e-15, skip_inert=True)
    plain = copy.deepcopy(model)
    other = IGMOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1), **plain.options(), rho=0.0)
    calls = passes_of(model)
    data = batches(TWO, 3, torch.float32)["audio"]
    opt._core.warned.add("perturbation")
    for o, m in ((opt, model), (other, plain)):
        with o.turn("audio"):
            for batch in data:
                o.step(closure_for(o, m, "audio", batch))
    assert calls == ["encoder", "head"] * 3
    assert (opt.inert_steps, other.inert_steps) == (3, 0)
    assert unchanged(model, list(plain.parameters()))
    stats = opt.last_stats
    assert (stats["second_pass"], stats["moved"], stats["effective_perturbation"]) == ("unchanged", 0.0, 0.0)
    assert (stats["loss_perturbed"], stats["grad_norm_perturbed"]) == (None, None)
    assert copy.deepcopy((model, opt))[1].inert_steps == 3


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("rho", [1e-7, 0.05])
@pytest.mark.parametrize("scope", ["all", "head"])
def test_where_a_weight_moves_the_second_pass_is_taken(rho, base, scope):
    torch.manual_seed(0)
    model = OwnHeads()
    twin = copy.deepcopy(model)
    data = batches(TWO, 2, torch.float32)["audio"]
    for m, skip in ((model, True), (twin, False)):
        options = m.options() | {"rho": rho, "skip_inert": skip, "sam_scope": scope}
        opt = IGMOptimizer(base(m.parameters(), lr=0.01), **options)
        opt._core.warned.add("perturbation")
        with opt.turn("audio"):
            for batch in data:
                opt.step(closure_for(opt, m, "audio", batch))
        assert opt.inert_steps == 0
        assert opt.last_stats["moved"] > 0
    assert unchanged(model, list(twin.parameters()))


def test_inert_with_the_head_alone_keeps_every_gradient():
    torch.manual_seed(0)
    model = OwnHeads()
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), rho=1e-15, skip_inert=True, sam_scope="head"
    )
    opt._core.warned.add("perturbation")
    before = copy.deepcopy(model)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
    assert opt.last_stats["second_pass"] == "unchanged"
    for q, old in zip(model.encoders["audio"].parameters(), before.encoders["audio"].parameters(), strict=True):
        torch.testing.assert_close(q, old - 0.1 * q.grad, rtol=0, atol=1e-7)
        assert q.grad.any()


# --- sam_scope="head" -------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    z: torch.Tensor
    other: str


@dataclass
class Record:
    z: torch.Tensor

    def __getitem__(self, key):
        return self.z


class Pack(nn.Module):
    """Puts what an encoder gives into a container."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, z):
        return {
            "tuple": lambda: (z, None),
            "namedtuple": lambda: Packed(z, "other"),
            "list": lambda: [z, [z]],
            "dict": lambda: {"z": z, "size": 8},
            "OrderedDict": lambda: OrderedDict(z=z),
            "dataclass": lambda: Record(z),
        }[self.kind]()


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("kind", ["tuple", "namedtuple", "list", "dict", "OrderedDict", "dataclass"])
def test_whatever_an_encoder_gives_stands_in_for_it(kind, none):
    torch.manual_seed(0)
    model = Noisy(pack=Pack(kind), dropout=0.0).double()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), **model.options(), sam_scope="head", tau=0.0)
    twin = Noisy(dropout=0.0).double()
    for n in TWO:
        twin.encoders[n][:4].load_state_dict(model.encoders[n][:4].state_dict())
        twin.heads[n].load_state_dict(model.heads[n].state_dict())
    batch = batches(TWO, 1)["audio"][0]
    calls = passes_of(model)

    def closure():
        opt.zero_grad(set_to_none=none)
        loss = cross_entropy(model("audio", batch[0]), batch[1])
        loss.backward()
        return loss

    _, expected = by_hand(twin, "audio", batch, 0.05)
    with opt.turn("audio"):
        opt.step(closure)
    mine = [*model.encoders["audio"].parameters(), *model.heads["audio"].parameters()]
    for q, gradient in zip(mine, expected, strict=True):
        torch.testing.assert_close(q.grad, gradient, rtol=0, atol=1e-13)
    assert calls == ["encoder", "head", "head"]
    assert model.encoders["audio"][1].num_batches_tracked == 1
    assert not any("forward" in vars(module) for module in model.modules())


def test_in_place_work_on_the_features_does_not_reach_the_second_pass():
    torch.manual_seed(0)
    model = OwnHeads().double()
    for name in TWO:
        del model.encoders[name][1]
        model.heads[name].insert(0, nn.Hardtanh(-0.2, 0.2, inplace=True))
    options = {"modalities": model.options()["modalities"], "heads": dict(model.heads)}
    seen = []

    class Doubling(nn.Module):
        def forward(self, z):
            seen.append(z.detach().clone())
            return z.mul_(2)

    model.heads["audio"].insert(0, Doubling())
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options, sam_scope="head")
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0]))
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_a_list_of_closures_gets_each_its_own_features():
    torch.manual_seed(0)
    model = OwnHeads().double()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), **model.options(), sam_scope="head", tau=0.0)
    x, y = batches(TWO, 1)["audio"][0]
    parts = list(zip(x.chunk(3), y.chunk(3), strict=True))

    def part(u, v):
        def closure():
            loss = cross_entropy(model("audio", u), v) / 3
            loss.backward()
            return loss

        return closure

    _, expected = by_hand(model, "audio", (x, y), 0.05)
    calls = passes_of(model)
    with opt.turn("audio"):
        opt.step([part(u, v) for u, v in parts])
    mine = [*model.encoders["audio"].parameters(), *model.heads["audio"].parameters()]
    for q, gradient in zip(mine, expected, strict=True):
        torch.testing.assert_close(q.grad, gradient, rtol=0, atol=1e-13)
    assert calls == ["encoder", "head"] * 3 + ["head"] * 3


def test_replay_stands_on_the_passes_that_the_trainer_made():
    results = []
    for form in ("closure", "replay"):
        model, opt = noisy(sam_scope="head", preserve_rng=True)
        batch = batches(TWO, 2)["audio"]
        calls = passes_of(model)
        torch.manual_seed(5)
        with opt.turn("audio"):
            for one in batch:
                closure = closure_for(opt, model, "audio", one)
                if form == "closure":
                    opt.step(closure)
                    continue
                opt.remember_rng()
                closure()
                with torch.no_grad():
                    model("video", batches(TWO, 1)["video"][0][0])
                opt.replay(closure)
                opt.step()
        results.append([q.data for q in model.parameters()])
        assert calls == ["encoder", "head", "head"] * 2
    assert opt.last_stats["second_pass"] == "head"


@pytest.mark.parametrize("more", ["first", "second"])
def test_other_calls_in_the_second_pass_are_an_error(more):
    model, opt = noisy(sam_scope="head")
    x, y = batches(TWO, 1)["audio"][0]
    count = itertools.count()
    before = [q.detach().clone() for q in model.parameters()]

    def closure():
        opt.zero_grad()
        if (next(count) == 0) == (more == "first"):
            model.encoders["audio"](x)
        loss = cross_entropy(model("audio", x), y)
        loss.backward()
        return loss

    often = {"first": "less", "second": "more"}[more]
    with opt.turn("audio"), pytest.raises(RuntimeError, match=f"calls Sequential {often} often"):
        opt.step(closure)
    assert unchanged(model, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_forward_passes_that_no_step_follows_are_forgotten():
    model, opt = noisy(sam_scope="head")
    x, y = batches(TWO, 1)["audio"][0]
    model.encoders["audio"](x)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", (x, y)))
        model.encoders["audio"](x)
        opt.forget_step()
        closure = closure_for(opt, model, "audio", (x, y))
        closure()
        opt.replay(closure)
        opt.step()
        assert opt.last_stats["second_pass"] == "head"
        model.encoders["audio"](x)
        closure()
        opt.replay(closure)
        with pytest.raises(RuntimeError, match="less often"):
            opt.step()


def test_the_encoder_may_be_called_several_times_and_without_gradients():
    torch.manual_seed(0)
    model = OwnHeads().double()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), sam_scope="head")
    x, y = batches(TWO, 1)["audio"][0]
    calls = passes_of(model)

    def closure():
        opt.zero_grad()
        with torch.no_grad():
            target = model.encoders["audio"](x.flip(0))
        one, two = model.encoders["audio"](x), model.encoders["audio"](x + 1)
        loss = cross_entropy(model.heads["audio"](one + two + target), y)
        loss.backward()
        return loss

    with opt.turn("audio"):
        opt.step(closure)
    assert calls.count("encoder") == 3 + 1  # without gradients it runs again: it was not noted


def test_the_same_random_numbers_in_the_head_though_the_encoder_draws_none():
    model, opt = noisy(sam_scope="head", preserve_rng=True)
    masks = []
    model.heads["audio"][2].register_forward_hook(lambda _, args, out: masks.append(out.detach() == 0))
    with opt.turn("audio"):
        for batch in batches(TWO, 3)["audio"]:
            opt.step(closure_for(opt, model, "audio", batch))
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first, second)


class Trunk(nn.Module):
    """An encoder for each modality, a trunk and a head that they share."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({n: nn.Linear(WIDTHS[n], 8) for n in TWO})
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, name, x):
        return self.head(self.trunk(self.encoders[name](x)))


@pytest.mark.parametrize("listed", [True, False], ids=["trunk listed", "trunk not listed"])
def test_a_shared_trunk_keeps_the_gradients_of_the_first_pass(listed):
    torch.manual_seed(0)
    model = Trunk().double()
    modalities = {n: [model.encoders[n], model.trunk] if listed else [model.encoders[n]] for n in TWO}
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), modalities, head=model.head, sam_scope="head", model=model
    )
    x, y = batches(TWO, 1)["audio"][0]
    gradients = []

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model("audio", x), y)
        loss.backward()
        gradients.append([None if q.grad is None else q.grad.clone() for q in model.parameters()])
        return loss

    with opt.turn("audio"):
        opt.step(closure)
    head = {id(q) for q in model.head.parameters()}
    for q, first, second in zip(model.parameters(), *gradients, strict=True):
        assert same(q.grad, second if id(q) in head else first)
    assert model.trunk[1].num_batches_tracked == 1


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
def test_an_exception_in_either_pass_leaves_everything(at, error):
    model, opt = noisy(sam_scope="head")
    data = batches(TWO, 2)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
        before = copy.deepcopy((model.state_dict(), opt.state_dict()))
        count = itertools.count()
        seen = []

        def closure():
            opt.zero_grad()
            loss = cross_entropy(model("audio", data[1][0]), data[1][1])
            loss.backward()
            seen.append([q.grad for q in model.encoders["audio"].parameters()])
            if next(count) == at:
                raise error
            return loss

        with pytest.raises(error):
            opt.step(closure)
        if at == 1:
            first, _ = seen
            assert all(a is q.grad for a, q in zip(first, model.encoders["audio"].parameters(), strict=True))
            assert all(g is None for g in seen[1])
            buffers = {k for k in before[0] if "running" in k or "num_batches" in k}
            assert same({k: v for k, v in model.state_dict().items() if k not in buffers},
                        {k: v for k, v in before[0].items() if k not in buffers})  # fmt: skip
        assert same(opt.state_dict(), before[1])
        assert not any("forward" in vars(module) for module in model.modules())
        opt.step(closure_for(opt, model, "audio", data[1]))
        assert opt.last_stats["second_pass"] == "head"


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_everything():
    def scene():
        model, opt = noisy(sam_scope="head", preserve_rng=True)
        data = batches(TWO, 2)["audio"]
        turn = opt.turn("audio")
        turn.__enter__()
        opt.step(closure_for(opt, model, "audio", data[0]))
        closure = closure_for(opt, model, "audio", data[1])
        return model, opt, closure, turn

    folder = [f"{igm_rs.__path__[0]}/{name}.py" for name in ("_step", "_head_pass", "_core", "_batchnorm")]
    model, opt, closure, _ = scene()
    lines = Lines(folder)
    with lines.armed():
        opt.step(closure)
    after = [q.detach().clone() for q in model.parameters()]
    assert len(lines.log) > 200
    for at in range(len(lines.log)):
        model, opt, closure, _ = scene()
        before = [q.detach().clone() for q in model.parameters()]
        with pytest.raises(KeyboardInterrupt), Lines(folder, at).armed():
            opt.step(closure)
        where = lines.log[at]
        assert unchanged(model, before) or unchanged(model, after), where
        assert not any("forward" in vars(module) for module in model.modules()), where
        assert not opt._core.head_pass._hidden, where
        assert not opt._core.tap.muted, where
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d)), where


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_listen_at_their_own_encoders(how):
    model, opt = noisy(sam_scope="head")
    data = batches(TWO, 2)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
    twin, other = how((model, opt))
    hooks = [len(m._forward_hooks) for m in model.modules()]
    for m, o in ((model, opt), (twin, other)):
        torch.manual_seed(4)
        with o.turn("audio"):
            o.step(closure_for(o, m, "audio", data[1]))
        assert o.last_stats["second_pass"] == "head"
    assert same(model.state_dict(), twin.state_dict())
    assert [len(m._forward_hooks) for m in twin.modules()] == hooks


def test_no_hook_outlives_the_optimizer():
    model, opt = noisy(sam_scope="head")
    alone = copy.deepcopy(model)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    assert not any(m._forward_hooks for m in model.modules())
    alone("audio", batches(TWO, 1)["audio"][0][0])
    alone("video", batches(TWO, 1)["video"][0][0])
    assert not any(m._forward_hooks for m in alone.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, between graphs
@pytest.mark.parametrize("what", ["encoder", "model", "in place"])
def test_compiled_modules(what):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = OwnHeads().double()
    plain = copy.deepcopy(model)
    data = batches(TWO, 3)["audio"]
    results = []
    for m, compiled in ((model, True), (plain, False)):
        call = m
        if compiled and what == "encoder":
            for n in TWO:
                m.encoders[n] = torch.compile(m.encoders[n], backend="aot_eager")
        elif compiled and what == "model":
            call = torch.compile(m, backend="aot_eager")
        elif compiled:
            for n in TWO:
                m.encoders[n].compile(backend="aot_eager")
        opt = IGMOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), **m.options(), sam_scope="head")
        with opt.turn("audio"):
            for batch in data:
                opt.step(closure_for(opt, call, "audio", batch) if call is m else _closure_of(opt, call, batch))
        assert opt.last_stats["second_pass"] == "head"
        results.append([q.data for q in m.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch._dynamo.reset()


def _closure_of(opt, call, batch):
    def closure():
        opt.zero_grad()
        loss = cross_entropy(call("audio", batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def test_with_a_grad_scaler_each_gradient_is_unscaled_once():
    results = []
    batch = batches(TWO, 1)["audio"][0]
    for scaled in (False, True):
        torch.manual_seed(0)
        model = OwnHeads().double()
        opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), sam_scope="head")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None

        def closure(model=model, opt=opt, scaler=scaler, batch=batch):
            opt.zero_grad()
            loss = cross_entropy(model("audio", batch[0]), batch[1])
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        with opt.turn("audio"):
            opt.step(closure, scaler=scaler)
        results.append([q.data for q in model.parameters()])
    assert same(*results)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("where", ["encoder", "head", "head again"])
def test_an_unusable_gradient_of_either_part_skips_the_step(base, where):
    model, opt = noisy(base=base, sam_scope="head")
    data = batches(TWO, 2)["audio"]
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data[0]))
        before = [q.detach().clone() for q in model.parameters()]
        count = itertools.count()

        def closure():
            loss = closure_for(opt, model, "audio", data[1])()
            part = model.encoders if where == "encoder" else model.heads
            if next(count) == (where == "head again"):
                part["audio"][0].weight.grad.fill_(math.inf)
            return loss

        opt.step(closure)
        assert opt.last_stats["skipped"]
        assert opt.last_stats["second_pass"] == ("head" if where == "head again" else None)
    assert unchanged(model, before)


def test_two_call_form_is_refused():
    model, opt = noisy(sam_scope="head")
    closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0])()
    with pytest.raises(RuntimeError, match="first_step with sam_scope='head'"):
        opt.first_step()


def test_a_head_without_gradients_is_an_error():
    model, opt = noisy(sam_scope="head")
    x, _ = batches(TWO, 1)["audio"][0]

    def closure():
        opt.zero_grad()
        loss = model.encoders["audio"](x).square().mean()
        loss.backward()
        return loss

    with opt.turn("audio"), pytest.raises(RuntimeError, match="no parameter of the head of 'audio' has a gradient"):
        opt.step(closure)


def test_an_outer_forward_of_the_user_is_put_back():
    model, opt = noisy(sam_scope="head")
    encoder = model.encoders["audio"]
    usual = encoder.forward
    calls = []

    def mine(x):
        calls.append(1)
        return usual(x)

    encoder.forward = mine
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0]))
    assert calls == [1]
    assert vars(encoder)["forward"] is mine


def test_nested_encoders_count_once():
    torch.manual_seed(0)
    model = OwnHeads().double()
    modalities = {n: [model.encoders[n], model.encoders[n][0]] for n in TWO}
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), modalities, heads=dict(model.heads), sam_scope="head"
    )
    calls = passes_of(model)
    with opt.turn("audio"), contextlib.nullcontext():
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0]))
    assert calls == ["encoder", "head", "head"]
