"""Random sequences of everything that a script can do with the optimizer, rule by rule against the reference.

A machine draws a model (modalities, heads, widths down to 1, dtype), a base optimizer and the options of Algorithm 1.
Its twin stands under ``reference.Algorithm1``. Each rule does one thing to both; after each, weights, the base's state,
Ȳ, T and the counters of both are compared. The profile says how many examples there are: see ``conftest.py``.
"""

import contextlib
import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import same
from reference import Algorithm1
from torch import nn
from torch.nn.functional import huber_loss
from torch.optim.lr_scheduler import LambdaLR, StepLR

from igm_rs import IGMOptimizer

pytestmark = [  # said once by an optimizer to its user; the machine makes them say it on purpose
    pytest.mark.filterwarnings(r"ignore:step\(\) was called without a closure while rho:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:'\w+' is the only modality and refresh is 'turn':UserWarning"),
    pytest.mark.filterwarnings(r"ignore:rho = .* is below the resolution of the weights:UserWarning"),
]

NAMES = ("audio", "video", "text")

# Relative to the largest entry, or to one. float64: the whole run, some hundred operations, on both sides from the same
# start. Narrower dtypes: one rule, after which the twin takes over weights and state. In a whole run every step
# multiplies what rounding has made of the weights before by its curvature, and SAM's g/‖g‖ and Adam's g/√v by more:
# that is the method's and no fault of either side. In one rule the gradients of the first pass are equal to the bit,
# and what is left is the order in which two correct sides round: 1e-6 is some 16 roundings of float32. In bfloat16 a
# perturbed weight may round to its neighbour, and so may the step after it: two units in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}
DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)

# Adam divides by √v + eps: a gradient that is zero but for rounding would come out as up to lr of motion. With eps = lr
# rounding of the gradient is not made larger than it is.
BASES = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "sgd dampening": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.8, dampening=0.3),
    "sgd nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, eps=1e-3, weight_decay=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-3, weight_decay=1e-2),
}
SCHEDULERS = {
    "none": None,
    "step": lambda base: StepLR(base, step_size=2, gamma=0.5),
    "lambda": lambda base: LambdaLR(base, lambda epoch: 1 / (1 + epoch)),
}


class InterruptionError(Exception):
    """What a closure, a turn or a collecting pass of this machine fails with."""


# --- models ----------------------------------------------------------------------------------------------------------


@st.composite
def plans(draw):
    """Draw the shapes of a model."""
    names = NAMES[: draw(st.sampled_from([2, 3, 1]), label="modalities")]
    width = st.sampled_from([3, 1, 2, 6])
    kind = draw(st.sampled_from(["own heads", "shared head", "no heads"]), label="heads")
    shared_depth = draw(st.integers(1, 2))
    depth = {n: shared_depth if kind == "shared head" else draw(st.integers(1, 2)) for n in names}
    deep, first = draw(width), draw(width)
    return {
        "names": names,
        "kind": kind,
        "inputs": {n: draw(width) for n in names},
        "positions": draw(st.sampled_from([0, 0, 2]), label="token positions"),
        "depth": depth,
        # what the encoder gives to the head: the same for all where the head is shared
        "encoded": {n: deep if depth[n] == 1 else first if kind == "shared head" else draw(width) for n in names},
        "deep": deep,
        "out": draw(st.sampled_from([2, 1, 3])),
        "listed nowhere": draw(st.booleans()),
        "listed twice": len(names) > 1 and draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**16)),
    }


class Model(nn.Module):
    """An encoder for each modality, heads of one or two Linear layers, and parameters that several modalities share."""

    def __init__(self, plan):
        super().__init__()
        torch.manual_seed(plan["seed"])
        self.kind, self.out = plan["kind"], plan["out"]
        names, deep, out = plan["names"], plan["deep"], plan["out"]

        def head(name):
            last = nn.Linear(deep, out)
            if plan["depth"][name] == 1:
                return nn.Sequential(last)
            return nn.Sequential(nn.Linear(plan["encoded"][name], deep), nn.Tanh(), last)

        encoders = {n: nn.Sequential(nn.Linear(plan["inputs"][n], plan["encoded"][n]), nn.Tanh()) for n in names}
        self.encoders = nn.ModuleDict(encoders)
        if self.kind == "shared head":
            self.heads = nn.ModuleDict({"all": head(names[0])})
        else:
            self.heads = nn.ModuleDict({n: head(n) for n in names})
        self.nowhere = nn.Parameter(torch.randn(out)) if plan["listed nowhere"] else None
        self.twice = nn.Parameter(torch.randn(out)) if plan["listed twice"] else None
        self.added = nn.ParameterList()
        self.to(plan["dtype"])

    def forward(self, name, x):
        output = self.head(name)(self.encoders[name](x))
        if self.twice is not None and name in NAMES[:2]:
            output = output * (1 + 0.1 * self.twice)
        for parameter in [*([] if self.nowhere is None else [self.nowhere]), *self.added]:
            output = output + parameter
        return output

    def head(self, name):
        return self.heads["all" if self.kind == "shared head" else name]

    def linears(self, name):
        """Return the Linear layers of the head of `name` by the names that the optimizer gives them."""
        layers = [layer for layer in self.head(name) if isinstance(layer, nn.Linear)]
        label = "head" if self.kind == "shared head" else name
        return {label if len(layers) == 1 else f"{label}.{i}": layer for i, layer in enumerate(layers)}

    def modalities(self):
        """Return what belongs to each modality; a shared head belongs to nobody, and so to all."""
        own = {name: [encoder] for name, encoder in self.encoders.items()}
        for name, parts in own.items():
            if self.kind == "no heads":
                parts.append(self.heads[name])
            if self.twice is not None and name in NAMES[:2]:
                parts.append(self.twice)
        return own

    def loss(self, name, batch):
        """Return the Huber loss: its gradient stays of order one, whatever the weights do."""
        x, y = batch
        return huber_loss(self(name, x), y)


def batch_of(plan, name, seed, size):
    """Return inputs, which have a mean, and targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = [size] + ([plan["positions"]] if plan["positions"] else [])
    x = torch.randn(*shape, plan["inputs"][name], generator=generator, dtype=torch.float64) + 0.5
    y = 2 * torch.randn(*shape, plan["out"], generator=generator, dtype=torch.float64)
    return x.to(plan["dtype"]), y.to(plan["dtype"])


# --- optimizers ------------------------------------------------------------------------------------------------------


@st.composite
def options(draw, names, kind):
    """Draw the options of Algorithm 1, the base and the scheduler."""
    orthogonal = kind != "no heads" and draw(st.integers(0, 3), label="orthogonal if 3") == 3
    rhos = st.sampled_from([0.05, 0.0, 0.02])
    taus = st.sampled_from([1.5, 0.4] if orthogonal else [1.5, 0.0, 0.4])  # of P tau says nothing but whether

    def listed(name):
        others = [n for n in names if n != name]
        return draw(st.none() | st.lists(st.sampled_from(others), min_size=1, unique=True)) if others else None

    chosen = {
        "rho": {n: draw(rhos) for n in names} if draw(st.booleans()) else dict.fromkeys(names, 0.05),
        "tau": {n: draw(taus) for n in names} if draw(st.booleans()) else dict.fromkeys(names, 1.5),
        "sources": draw(st.sampled_from(["previous", "others", "listed"])),
        "features": draw(st.sampled_from(["mean", "samples"] + ([] if orthogonal else ["centred"]))),
        "covariance": draw(st.sampled_from(["fresh", "kept"] + ([] if orthogonal else [0.5]))),
        "refresh": draw(st.sampled_from(["turn", 1, 2, 3, "manual"])),
        "project": draw(st.sampled_from(["gradient", "update"])),
        "max_grad_norm": draw(st.sampled_from([None, None, 0.1, 10.0])),
        "reset": draw(st.sampled_from([(), ("momentum",), ("lr",), ("momentum", "lr")])),
    }
    if chosen["sources"] == "listed":
        chosen["sources"] = {n: listed(n) for n in names}
    if orthogonal:
        batches, normalise = draw(st.sampled_from([None, 3])), draw(st.booleans())
        chosen |= {"projector": "orthogonal", "alpha": 0.5, "batches": batches, "normalise": normalise}
    return chosen


@st.composite
def setups(draw):
    """Draw a model and what trains it."""
    plan = draw(plans())
    return {
        "plan": plan,
        "options": draw(options(plan["names"], plan["kind"])),
        "atomic": draw(st.booleans()),
        "base": draw(st.sampled_from(sorted(BASES, reverse=True))),
        "groups": draw(st.sampled_from(["one", "two", "rho", "tau"]), label="param_groups"),
        "scheduler": draw(st.sampled_from(sorted(SCHEDULERS))),
    }


def groups_of(setup, model):
    """Return the base's groups: one; or the last layers apart, with an lr, a rho or a tau of their own."""
    if setup["groups"] == "one":
        return list(model.parameters())
    last = list(dict.fromkeys(p for name in model.encoders for p in model.head(name)[-1].parameters()))
    rest = [p for p in model.parameters() if all(p is not q for q in last)]
    own = {"two": {"lr": 0.02 if setup["base"].startswith("sgd") else 5e-4}, "rho": {"rho": 0.1}, "tau": {"tau": 0.7}}
    return [{"params": rest}, {"params": last} | own[setup["groups"]]]


def optimizer_for(setup, model):
    """Return IGMOptimizer as a script makes it."""
    names, kind = setup["plan"]["names"], setup["plan"]["kind"]
    heads = {}
    if kind == "shared head":
        heads = {"head": list(model.linears(names[0]).values())}
    elif kind == "own heads":
        heads = {"heads": {n: list(model.linears(n).values()) for n in names}}
    base, own = BASES[setup["base"]](groups_of(setup, model)), {"atomic": setup["atomic"]} | setup["options"]
    return IGMOptimizer(base, model.modalities(), **heads, **own)


def oracle_for(setup, model):
    """Return the reference on its own model."""
    heads = None
    if setup["plan"]["kind"] != "no heads":
        heads = {n: list(model.linears(n).values()) for n in setup["plan"]["names"]}
    base = BASES[setup["base"]](groups_of(setup, model))
    return Algorithm1(model.modalities(), base, heads, **copy.deepcopy(setup["options"]))


def scheduler_for(setup, optimizer):
    """Return the scheduler that was drawn, or None."""
    make = SCHEDULERS[setup["scheduler"]]
    return None if make is None else make(optimizer)


# --- comparing -------------------------------------------------------------------------------------------------------


def near(actual, expected, tolerance, what):
    """Assert that no entry is further off than `tolerance` times the largest, or one."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    gap = float((actual.detach().double() - expected.detach().double()).abs().max()) if expected.numel() else 0.0
    assert gap <= tolerance * scale, f"{what} differs by {gap:.3g} where {tolerance * scale:.3g} is allowed"


def backward(function):
    """Return a closure that adds to the gradients."""

    def closure():
        loss = function()
        loss.backward()
        return loss

    return closure


def tensors_of(state):
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


# --- the machine -----------------------------------------------------------------------------------------------------

which = st.integers(0, 2)
seeds = st.integers(0, 2**16)
sizes = st.sampled_from([3, 1, 5])
micro = st.sampled_from([1, 1, 2, 3])
poisons = st.sampled_from([None, None, None, (1, 0.0), (1, math.inf), (1, math.nan), (2, 0.0), (2, math.nan)])


class Machine(RuleBasedStateMachine):
    """IGMOptimizer and the reference, side by side."""

    def __init__(self):
        super().__init__()
        self.turn = None  # the context manager of the turn under way
        self.saved = None

    @initialize(setup=setups())
    def build(self, setup):
        self.setup, self.plan, self.names = setup, setup["plan"], setup["plan"]["names"]
        self.dtype = self.plan["dtype"]
        self.model, self.twin = Model(self.plan), Model(self.plan)
        self.opt, self.oracle = optimizer_for(setup, self.model), oracle_for(setup, self.twin)
        self.scheduler = scheduler_for(setup, self.opt)
        self.twin_scheduler = scheduler_for(setup, self.oracle.base)
        self.stepped = False  # since the scheduler is there
        self.note_storage()

    def note_storage(self):
        self.storage = [(p.data_ptr(), p.stride(), p.dtype) for p in self.model.parameters()]
        self.hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.model.modules())

    def teardown(self):
        if self.turn is not None:
            self.leave_turn()

    # -- parts of the rules --

    def name_of(self, index):
        """Return the modality that steps: that of the turn, or whichever was drawn."""
        return self.oracle.active or self.names[index % len(self.names)]

    def others(self, name):
        return [n for n in self.names if n != name]

    def batches(self, name, seed, size, count):
        return [batch_of(self.plan, name, seed + i, size) for i in range(count)]

    def functions(self, model, name, data, poison=None, also=None):
        """Return a loss for each micro-batch; `poison` multiplies the first one in a pass, `also` joins it."""
        passes = itertools.count(1)

        def first():
            number = next(passes)
            loss = model.loss(name, data[0])
            if also is not None:
                loss = loss + model.loss(*also)
            return loss * poison[1] if poison is not None and poison[0] == number else loss

        return [first, *(lambda batch=batch: model.loss(name, batch) for batch in data[1:])]

    def snapshot(self):
        return copy.deepcopy(([p.detach() for p in self.model.parameters()], self.opt.state_dict()))

    @contextlib.contextmanager
    def nothing_changes(self):
        """What fails leaves weights, the base's state, Ȳ, T and counters as they were, to the bit."""
        before = self.snapshot()
        yield
        assert same(self.snapshot(), before)
        self.oracle.waiting = {}  # and the rows of a step that failed never count

    @contextlib.contextmanager
    def only_moves(self, name):
        """Whoever is not active does not move, to the bit."""
        moving = {id(p) for p in self.oracle.parameters[name]}
        still = [
            (p, p.detach().clone())
            for p, q in zip(self.model.parameters(), self.twin.parameters(), strict=True)
            if id(q) not in moving
        ]
        yield
        assert all(torch.equal(p, before) for p, before in still), f"a step of {name!r} moved what is not its own"

    def sam(self, name):
        return any(self.oracle._rho(name, p) > 0 for p in self.oracle.parameters[name])

    def check_loss(self, loss, expected):
        tolerance = TOLERANCE[self.dtype]
        assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)

    def enter_turn(self, name):
        self.turn = self.opt.turn(name)
        self.turn.__enter__()

    def leave_turn(self, *exception):
        turn, self.turn = self.turn, None
        return turn.__exit__(*(exception or (None, None, None)))

    # -- steps --

    @rule(index=which, seed=seeds, size=sizes, none=st.booleans(), poison=poisons, joint=st.booleans())
    def step_with_closure(self, index, seed, size, none, poison, joint):
        name = self.name_of(index)
        data = self.batches(name, seed, size, 1)
        also = None
        if joint and self.oracle.active and self.others(name):  # outside any turn nobody could tell whose step it is
            other = self.others(name)[0]
            also = (other, *self.batches(other, seed + 9, size, 1))
        if not self.oracle.active:
            none = True if poison and poison[1] == 0 else none  # all gradients zero: nobody could tell either
        (mine,) = self.functions(self.model, name, data, poison, also)

        def closure():
            self.opt.zero_grad(set_to_none=none)
            loss = mine()
            loss.backward()
            return loss

        with self.only_moves(name):
            loss = self.opt.step(closure)
        expected = self.oracle.step(name, self.functions(self.twin, name, data, poison, also))
        self.stepped = True
        self.check_loss(loss, expected)

    @rule(index=which, seed=seeds, size=sizes, count=micro, none=st.booleans(), poison=poisons, joint=st.booleans())
    def step_with_gradients_at_hand(self, index, seed, size, count, none, poison, joint):
        name = self.name_of(index)
        data = self.batches(name, seed, size, count)
        also = None
        if joint and self.oracle.active and self.others(name):
            other = self.others(name)[-1]
            also = (other, *self.batches(other, seed + 9, size, 1))
        if not self.oracle.active:
            none = True if poison and poison[1] == 0 else none
        with self.only_moves(name):
            self.opt.zero_grad(set_to_none=none)
            for function in self.functions(self.model, name, data, poison, also):
                function().backward()
            assert self.opt.step() is None
        self.oracle.step(name, self.functions(self.twin, name, data, poison, also), "gradients")
        self.stepped = True

    @rule(index=which, seed=seeds, size=sizes, count=micro, poison=poisons, form=st.sampled_from([list, tuple]))
    def step_with_a_list_of_closures(self, index, seed, size, count, poison, form):
        name = self.name_of(index)
        data = self.batches(name, seed, size, count)
        with self.only_moves(name):
            loss = self.opt.step(form(map(backward, self.functions(self.model, name, data, poison))))
        expected = self.oracle.step(name, self.functions(self.twin, name, data, poison))
        self.stepped = True
        self.check_loss(loss, expected)

    @rule(index=which, seed=seeds, size=sizes, count=micro, poison=poisons)
    def step_with_a_replay(self, index, seed, size, count, poison):
        name = self.name_of(index)
        data = self.batches(name, seed, size, count)
        functions = self.functions(self.model, name, data, poison)
        with self.only_moves(name):
            self.opt.zero_grad()
            for function in functions:
                function().backward()
            self.opt.replay(list(map(backward, functions)))
            self.opt.step()
        self.oracle.step(name, self.functions(self.twin, name, data, poison), "replay")
        self.stepped = True

    @rule(index=which, seed=seeds, size=sizes, count=micro, poison=poisons, clear=st.booleans())
    def two_calls(self, index, seed, size, count, poison, clear):
        name = self.name_of(index)
        data = self.batches(name, seed, size, count)
        functions = self.functions(self.model, name, data, poison)
        with self.only_moves(name):
            self.opt.zero_grad()
            for function in functions:
                function().backward()
            self.opt.first_step(zero_grad=clear)
            if not clear:
                self.opt.zero_grad()
            for function in functions:
                function().backward()
            self.opt.second_step(zero_grad=clear)
        self.oracle.step(name, self.functions(self.twin, name, data, poison), "two calls")

    @rule(index=which, seed=seeds, size=sizes, end=st.sampled_from(["step", "first_step", "load", "turn", "refresh"]))
    def first_call_without_second(self, index, seed, size, end):
        name = self.name_of(index)
        with self.nothing_changes():
            self.opt.zero_grad()
            self.model.loss(name, *self.batches(name, seed, size, 1)).backward()
            before = [p.detach().clone() for p in self.model.parameters()]
            self.opt.first_step()
            moved = [not torch.equal(p, q) for p, q in zip(self.model.parameters(), before, strict=True)]
            assert any(moved) == self.sam(name)
            if end == "load":
                self.opt.load_state_dict(self.opt.state_dict())
            elif end == "turn" and self.turn is None:
                with pytest.raises(RuntimeError, match="the begun step was dropped"), self.opt.turn(name):
                    pass
            else:
                calls = {"first_step": self.opt.first_step, "refresh": lambda: self.opt.refresh(name)}
                with pytest.raises(RuntimeError, match="the begun step was dropped"):
                    calls.get(end, self.opt.step)()
        with pytest.raises(RuntimeError, match="second_step without first_step"):
            self.opt.second_step()

    @rule(
        index=which,
        seed=seeds,
        size=sizes,
        number=st.integers(1, 2),
        kind=st.sampled_from([ValueError, KeyboardInterrupt]),
    )
    def closure_that_raises(self, index, seed, size, number, kind):
        name = self.name_of(index)
        if not self.sam(name):
            number = 1
        (mine,) = self.functions(self.model, name, self.batches(name, seed, size, 1))
        passes = []

        def closure():
            self.opt.zero_grad()
            loss = mine()
            passes.append(loss)
            if len(passes) == number:
                raise kind("on purpose")
            loss.backward()
            return loss

        with self.nothing_changes(), pytest.raises(kind, match="on purpose"):
            self.opt.step(closure)

    @rule(index=which, seed=seeds, size=sizes, fault=st.sampled_from(["no loss", "no backward", "zero_grad"]))
    def closure_that_is_no_closure(self, index, seed, size, fault):
        name = self.name_of(index)
        data = self.batches(name, seed, size, 2)

        def closure():
            if fault != "zero_grad":
                self.opt.zero_grad()
            loss = self.model.loss(name, data[0])
            if fault != "no backward":
                loss.backward()
            return None if fault == "no loss" else loss

        def clears():
            self.opt.zero_grad()
            return closure()

        expected = {
            "no loss": (TypeError, "closure returned None"),
            "no backward": (RuntimeError, "closure computed no gradient"),
            "zero_grad": (RuntimeError, "zero_grad inside a closure of a list"),
        }
        kind, message = expected[fault]
        with self.nothing_changes(), pytest.raises(kind, match=message):
            self.opt.step([closure, clears] if fault == "zero_grad" else closure)

    @precondition(lambda self: self.turn is None and len(self.names) > 1)
    @rule(seed=seeds, size=sizes)
    def step_of_two_modalities_outside_any_turn(self, seed, size):
        def closure():
            self.opt.zero_grad()
            loss = sum(self.model.loss(n, *self.batches(n, seed, size, 1)) for n in self.names[:2])
            loss.backward()
            return loss

        with (
            self.nothing_changes(),
            pytest.raises(RuntimeError, match="has gradients of its own, expected exactly one"),
        ):
            self.opt.step(closure)

    # -- turns --

    @precondition(lambda self: self.turn is None)
    @rule(index=which)
    def enter(self, index):
        name = self.names[index % len(self.names)]
        self.enter_turn(name)
        self.oracle.enter(name)

    @precondition(lambda self: self.turn is not None)
    @rule()
    def leave(self):
        self.leave_turn()
        self.oracle.leave()

    @precondition(lambda self: self.turn is not None)
    @rule(index=which)
    def switch(self, index):
        self.leave()
        self.enter(index)

    @precondition(lambda self: self.turn is not None)
    @rule(kind=st.sampled_from([InterruptionError, KeyboardInterrupt]))
    def leave_by_an_exception(self, kind):
        error = kind()
        with contextlib.suppress(kind):  # a context manager hands an exception on by raising it, or by saying no
            assert not self.leave_turn(kind, error, None)
        self.oracle.leave(failed=True)

    @rule(index=which, seed=seeds, size=sizes, again=which)
    def turn_that_fails_after_a_step(self, index, seed, size, again):
        if self.turn is None:
            self.enter(index)
        self.step_with_closure(index, seed, size, True, None, False)
        self.leave_by_an_exception(InterruptionError)
        self.both_sides_agree()
        self.enter(again)

    @precondition(lambda self: self.turn is not None)
    @rule(index=which)
    def turn_inside_a_turn(self, index):
        with pytest.raises(RuntimeError, match="leave the one before the other begins"):
            self.opt.turn(self.names[index % len(self.names)]).__enter__()

    # -- features --

    @rule(index=which, seed=seeds, sizes=st.lists(sizes, max_size=3), gradients=st.booleans(), fails=st.booleans())
    def collect(self, index, seed, sizes, gradients, fails):
        name = self.name_of(index)
        data = [batch_of(self.plan, name, seed + i, size) for i, size in enumerate(sizes)]

        def gather():
            with self.opt.collect(name), torch.set_grad_enabled(gradients):
                for x, _ in data:
                    self.model(name, x)
                if fails:
                    raise InterruptionError

        if fails:
            before = self.snapshot()
            with pytest.raises(InterruptionError):
                gather()
            assert same(self.snapshot(), before)
        else:
            gather()
            self.oracle.collect(name, [lambda x=x: self.twin(name, x) for x, _ in data])

    @precondition(lambda self: self.turn is not None and len(self.names) > 1)
    @rule()
    def collect_of_another_modality_inside_a_turn(self):
        with pytest.raises(RuntimeError, match="collect in its own turn or outside any"):
            self.opt.collect(self.others(self.oracle.active)[0]).__enter__()

    @rule(index=which)
    def refresh(self, index):
        name = self.names[index % len(self.names)]
        self.opt.refresh(name)
        self.oracle.refresh(name)

    @rule(index=which, seed=seeds, size=sizes, all_of_them=st.booleans())
    def training_forward_without_a_step(self, index, seed, size, all_of_them):
        for name in self.names if all_of_them else [self.name_of(index)]:
            x, _ = batch_of(self.plan, name, seed, size)
            self.model(name, x)
            self.oracle.forward(lambda name=name, x=x: self.twin(name, x))

    @precondition(lambda self: self.turn is None)
    @rule(seed=seeds, size=sizes)
    def steps_after_a_forward_of_all(self, seed, size):
        self.training_forward_without_a_step(0, seed, size, True)
        for index in range(len(self.names)):
            self.step_with_gradients_at_hand(index, seed + index, size, 1, True, None, False)
            self.both_sides_agree()

    @rule(index=which, seed=seeds, size=sizes, how=st.sampled_from(["no_grad", "inference_mode", "eval"]))
    def evaluation_forward(self, index, seed, size, how):
        x, _ = batch_of(self.plan, self.names[index % len(self.names)], seed, size)
        if how == "eval":
            self.model.eval()
            self.model(self.names[index % len(self.names)], x)
            self.model.train()
        else:
            with getattr(torch, how)():
                self.model(self.names[index % len(self.names)], x)

    # -- settings --

    @rule(none=st.booleans())
    def zero_grad(self, none):
        self.opt.zero_grad(set_to_none=none)
        assert all(p.grad is None if none else p.grad is None or not p.grad.any() for p in self.model.parameters())

    @rule(factor=st.sampled_from([0.5, 2.0]), group=st.integers(0, 3))
    def change_lr(self, factor, group):
        for optimizer in (self.opt, self.oracle.base):
            groups = optimizer.param_groups
            groups[group % len(groups)]["lr"] = min(0.05, groups[group % len(groups)]["lr"] * factor)

    @rule(index=which, value=st.sampled_from([0.05, 0.0, 0.02, 0.1]))
    def change_rho(self, index, value):
        name = self.names[index % len(self.names)]
        self.opt.rho[name] = self.oracle.rho[name] = value

    @rule(rho=st.sampled_from([0.05, 0.0]), tau=st.sampled_from([1.5, 0.4]))
    def change_rho_and_tau_of_all(self, rho, tau):
        self.opt.rho, self.opt.tau = rho, dict.fromkeys(self.names, tau)
        self.oracle.rho, self.oracle.tau = dict.fromkeys(self.names, rho), dict.fromkeys(self.names, tau)

    @rule(index=which, value=st.sampled_from([1.5, 0.0, 0.4, 4.0]))
    def change_tau(self, index, value):
        name = self.names[index % len(self.names)]
        value = value or (0.1 if self.oracle.kind == "orthogonal" else 0.0)
        self.opt.tau[name] = self.oracle.tau[name] = value

    @precondition(lambda self: self.scheduler is not None and self.stepped)
    @rule()
    def scheduler_step(self):
        self.scheduler.step()
        with warnings.catch_warnings():  # a step that is skipped does not reach the twin's base
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)`", UserWarning)
            self.twin_scheduler.step()

    @precondition(lambda self: len(self.model.added) < 2)
    @rule(seed=seeds, own=st.sampled_from([{}, {"lr": 0.01}, {"rho": 0.03}, {"weight_decay": 0.1}]))
    def add_param_group(self, seed, own):
        self.add_to(self.model, self.opt, seed, own)
        self.add_to(self.twin, self.oracle, seed, own)
        self.setup = self.setup | {"added": [*self.setup.get("added", []), (seed, own)]}
        self.saved = None
        self.scheduler = scheduler_for(self.setup, self.opt)  # PyTorch's schedulers know the groups they were made with
        self.twin_scheduler = scheduler_for(self.setup, self.oracle.base)
        self.stepped = False
        self.note_storage()

    def add_to(self, model, optimizer, seed, own):
        generator = torch.Generator().manual_seed(seed)
        parameter = nn.Parameter(torch.randn(self.plan["out"], generator=generator, dtype=torch.float64).to(self.dtype))
        model.added.append(parameter)
        optimizer.add_param_group({"params": [parameter]} | own)

    # -- state --

    def checkpoint(self):
        """Return model, optimizer and scheduler as they come back from a file."""
        file = io.BytesIO()
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        torch.save({"model": self.model.state_dict(), "opt": self.opt.state_dict(), "scheduler": scheduler}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    @rule()
    def load_into_the_same(self):
        self.opt.load_state_dict(self.checkpoint()["opt"])
        self.oracle.waiting = {}

    @rule()
    def load_into_a_fresh_one(self):
        state = self.checkpoint()
        model = Model(self.plan)
        opt = optimizer_for(self.setup, model)
        for seed, own in self.setup.get("added", []):
            self.add_to(model, opt, seed, own)
        model.load_state_dict(state["model"])
        self.go_on_with(model, opt, state)

    @rule()
    def deepcopy(self):
        self.go_on_with(*copy.deepcopy((self.model, self.opt)))

    @rule()
    def pickle(self):
        self.go_on_with(*pickle.loads(pickle.dumps((self.model, self.opt))))

    def go_on_with(self, model, opt, state=None):
        """Put another model and optimizer in the place of the present ones, which are gone."""
        name = self.oracle.active
        if self.turn is not None:
            with contextlib.suppress(InterruptionError):
                self.leave_turn(InterruptionError, InterruptionError(), None)
        lrs = [group["lr"] for group in opt.param_groups]
        scheduler = scheduler_for(self.setup, opt)
        if scheduler is not None:
            scheduler.load_state_dict(self.scheduler.state_dict() if state is None else state["scheduler"])
        for group, lr in zip(opt.param_groups, lrs, strict=True):
            group["lr"] = lr
        if state is not None:
            opt.load_state_dict(state["opt"])
        gone, self.model, self.opt, self.scheduler = self.model, model, opt, scheduler
        assert not any(module._forward_pre_hooks for module in gone.modules())  # the hooks went with their optimizer
        self.stepped = False
        self.oracle.forget()
        if name is not None:
            self.enter_turn(name)
            self.oracle.enter(name)
        hooks = self.hooks
        self.note_storage()
        assert self.hooks == hooks

    @rule()
    def save(self):
        twin = copy.deepcopy(
            (self.twin, self.oracle, None if self.scheduler is None else self.twin_scheduler.state_dict())
        )
        self.saved = self.checkpoint(), twin

    @precondition(lambda self: self.saved is not None and self.turn is None)
    @rule()
    def go_back_to_what_was_saved(self):
        state, twin = copy.deepcopy(self.saved)  # PyTorch's optimizers go on with the very tensors that they load
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.twin, self.oracle, scheduler = twin
        self.oracle.forget()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
            lrs = [group["lr"] for group in self.oracle.base.param_groups]
            self.twin_scheduler = scheduler_for(self.setup, self.oracle.base)
            self.twin_scheduler.load_state_dict(scheduler)
            for group, lr in zip(self.oracle.base.param_groups, lrs, strict=True):
                group["lr"] = lr

    # -- what always holds --

    @invariant()
    def both_sides_agree(self):
        self.compare_settings()
        self.compare_features()
        self.compare_weights()
        assert [(p.data_ptr(), p.stride(), p.dtype) for p in self.model.parameters()] == self.storage
        layers = [m for m in self.model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in layers) == self.hooks

    def compare_settings(self):
        opt, oracle = self.opt, self.oracle
        assert (opt.turns, opt.skipped_steps, opt.unperturbed_steps) == (
            oracle.turns,
            oracle.skipped,
            oracle.unperturbed,
        )
        assert opt.round == oracle.turns // len(self.names)
        assert dict(opt.rho) == oracle.rho
        assert dict(opt.tau) == oracle.tau
        for mine, theirs in zip(opt.param_groups, oracle.base.param_groups, strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine.keys() - {"params"}:
                assert mine[key] == theirs[key], key

    def compare_features(self):
        """Ȳ and T. Features of a first pass are equal to the bit but in float64, where nobody evens the weights out."""
        tolerance = max(1e-6 * (self.dtype != torch.float64), 1e-10)
        covariances, projectors = self.opt.covariances, self.opt.projectors
        for name in self.names:
            layers = {} if self.plan["kind"] == "no heads" else self.twin.linears(name)
            if self.oracle.kind == "flat":
                seen = {label: layer for label, layer in layers.items() if self.oracle.rows[name].get(layer)}
                assert covariances.get(name, {}).keys() == seen.keys()
                for label, layer in seen.items():
                    near(covariances[name][label], self.oracle.covariance_of(name, layer), tolerance, f"Ȳ of {label}")
                made = self.oracle.projectors[name]
            else:
                made = self.oracle.layer_projectors
            assert projectors[name].keys() == {label for label, layer in layers.items() if layer in made}
            for label, projector in projectors[name].items():
                near(projector, made[layers[label]], tolerance, f"T of {label}")

    def compare_weights(self):
        tolerance = TOLERANCE[self.dtype]
        for (label, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            near(p, q, tolerance, label)
            mine, theirs = tensors_of(self.opt.state.get(p, {})), tensors_of(self.oracle.base.state.get(q, {}))
            assert mine.keys() == theirs.keys(), label
            for key, value in mine.items():
                near(value, theirs[key], tolerance, f"{key} of {label}")
                if self.dtype != torch.float64:
                    theirs[key].copy_(value)
            if self.dtype != torch.float64:
                q.detach().copy_(p.detach())


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(max_examples=max(100, settings.default.max_examples), stateful_step_count=40)
