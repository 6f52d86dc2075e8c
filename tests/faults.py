"""Faults: ways to make a step fail at its n-th call, line or moment, and scenes compared to the bit."""

import ast
import contextlib
import functools
import itertools
import math
import signal
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from models import OwnHeads, batches
from torch import nn
from torch.nn.functional import cross_entropy

import igm_rs
from igm_rs import IGMOptimizer

TWO = ("audio", "video")
PACKAGE = Path(igm_rs.__file__).parent
TORCH = Path(torch.__file__).parent
CONTEXTS = {contextlib.__file__, str(TORCH / "autograd" / "grad_mode.py"), str(TORCH / "utils" / "_contextlib.py")}
"""Where the context managers are written that a step enters."""


BASES = {
    "sgd": lambda p, **more: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, **more),
    "plain sgd": lambda p, **more: torch.optim.SGD(p, lr=0.1, **more),
    "adam": lambda p, **more: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True, **more),
    "adamw": lambda p, **more: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2, **more),
}


class InjectedError(Exception):
    """What an injected failure raises, unless it is an interrupt."""


# --- comparison -----------------------------------------------------------------------------------------------------


def differences(a, b, path=""):
    """Where two nested structures of dicts, lists, tensors and values differ; tensors are compared to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}.{i}")]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} and {b!r}"]


def copied(a):
    """A nested structure with copies of its tensors."""
    if isinstance(a, torch.Tensor):
        return a.detach().clone()
    if isinstance(a, dict):
        return {key: copied(value) for key, value in a.items()}
    if isinstance(a, (list, tuple)):
        return type(a)(map(copied, a))
    return a


# --- scenes ---------------------------------------------------------------------------------------------------------


class Normed(OwnHeads):
    """Encoders with a BatchNorm layer, heads of two projected layers."""

    def __init__(self, names=TWO):
        super().__init__(names)
        for encoder in self.encoders.values():
            encoder.insert(1, nn.BatchNorm1d(8))


class Scene:
    """A model under IGMOptimizer, driven in one of the forms of a step."""

    def __init__(self, case):
        torch.manual_seed(1)
        self.case = case
        self.model = Normed(case.names).to(case.dtype)
        self.opt = IGMOptimizer(case.base(self.model.parameters()), **self.model.options(), **case.options)
        self.scaler = case.scaler() if case.scaler is not None else None
        self.scaling = {} if self.scaler is None else {"scaler": self.scaler}
        self.disturb = None

    def turn(self, name="audio"):
        """The turn of `name`, or nothing where the case has no turns."""
        return self.opt.turn(name) if self.case.place != "outside" else contextlib.nullcontext()

    def loss(self, name, x, y):
        """Forward and backward, nothing cleared; `disturb` has the last word."""
        loss = cross_entropy(self.model(name, x), y)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss if self.disturb is None else self.disturb(self, loss)

    def closure(self, name, t):
        """The usual closure of batch `t`."""

        def closure():
            self.opt.zero_grad()
            return self.loss(name, *self.case.data[name][t])

        return closure

    def step(self, name, t, armed=contextlib.nullcontext):
        """One step in the form of the case; `armed` surrounds what is the optimizer's."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"step\(\) was called without a closure")
            getattr(self, f"_{self.case.form}")(name, t, armed)
        if self.scaler is not None:
            self.scaler.update()

    def _closure(self, name, t, armed):
        with armed():
            self.opt.step(self.closure(name, t), **self.scaling)

    def _list(self, name, t, armed):
        x, y = self.case.data[name][t]
        parts = [functools.partial(self.loss, name, u, v) for u, v in zip(x.chunk(3), y.chunk(3), strict=True)]
        with armed():
            self.opt.step(parts, **self.scaling)

    def _none(self, name, t, armed):
        self.closure(name, t)()
        with armed():
            self.opt.step(**self.scaling)

    def _two(self, name, t, armed):
        self.closure(name, t)()
        with armed():
            self.opt.first_step(zero_grad=True, **self.scaling)
        self.loss(name, *self.case.data[name][t])
        with armed():
            self.opt.second_step(zero_grad=True, **self.scaling)

    def _replay(self, name, t, armed):
        self.closure(name, t)()
        if self.scaler is not None:
            self.scaler.unscale_(self.opt)
        with armed():
            self.opt.replay(self.closure(name, t), **self.scaling)
            self.opt.step()

    def state(self):
        """Everything that a failed step must leave as it was."""
        opt = self.opt
        return copied(
            {
                "weights": dict(self.model.named_parameters()),
                "opt": opt.state_dict(),
                "covariances": opt.covariances,
                "projectors": opt.projectors,
                "counters": (opt.turns, opt.round, opt.skipped_steps, opt.unperturbed_steps),
                "scaler": {} if self.scaler is None else self.scaler.state_dict(),
                "recording": [m.track_running_stats for m in self.model.modules() if isinstance(m, nn.BatchNorm1d)],
                "training": [m.training for m in self.model.modules()],
                "gradients on": torch.is_grad_enabled(),
                "shared": (opt.state is opt.base.state, opt.param_groups is opt.base.param_groups),
            }
        )

    def memory(self):
        """Where the weights lie."""
        return [p.data_ptr() for p in self.model.parameters()]


class Case:
    """Settings of a scene, the state in which the step under test finds it, and what should come of it.

    `place` of the step under test: the ``first`` or a ``later`` one of a turn, or ``outside`` any turn, where it ends
    the other modality's turn, or drops it if it was `left` by an exception.
    """

    def __init__(
        self,
        base="sgd",
        form="closure",
        place="later",
        dtype=torch.float64,
        names=TWO,
        size=9,
        scaler=None,
        trained=True,
        left=False,
        **options,
    ):
        self.base = BASES[base] if isinstance(base, str) else base
        self.form, self.place, self.dtype, self.names = form, place, dtype, names
        self.trained, self.left = trained, left
        self.scaler = scaler
        self.options = {"rho": 0.05, "tau": 1.5} | options
        self.data = batches(names, 6, dtype, size)

    @functools.cached_property
    def start(self):
        """A checkpoint right before the step under test."""
        scene = Scene(self)
        if self.trained:
            for name in self.names:
                with scene.turn(name):
                    for t in range(2):
                        scene.step(name, t)
        if self.left:
            with contextlib.suppress(Left), scene.opt.turn("video"):
                scene.step("video", 2)
                raise Left
        if self.trained and self.place == "later":
            with scene.turn():
                scene.step("audio", 2)
                return self._saved(scene)
        return self._saved(scene)

    @staticmethod
    def _saved(scene):
        scaler = {} if scene.scaler is None else scene.scaler.state_dict()
        return copied((scene.model.state_dict(), scene.opt.state_dict(), scaler))

    def fresh(self):
        """A scene at the start."""
        scene = Scene(self)
        model, opt, scaler = copied(self.start)  # torch's optimizers go on with the tensors that they load
        scene.model.load_state_dict(model)
        scene.opt.load_state_dict(opt)
        if scene.scaler is not None:
            scene.scaler.load_state_dict(scaler)
            scene.scaler.scale(torch.zeros(()))  # it makes its tensors at its first call, and not in one piece
        return scene

    @functools.cached_property
    def expected(self):
        """The states of a twin that sees no fault: before, after one and two steps, and after the next turn."""
        scene = self.fresh()
        states = [scene.state()]
        with scene.turn():
            for t in (3, 4):
                scene.step("audio", t)
                states.append(scene.state())
        self.end(scene)
        states.append(scene.state() | {"stats": dict(scene.opt.last_stats)})
        for one, other in itertools.pairwise(states):
            assert differences(one["weights"], other["weights"]), "each step moves"
        return states

    @staticmethod
    def end(scene):
        """The next modality's turn, which uses the T that the turn of the step under test has made."""
        with scene.turn("video"):
            scene.step("video", 4)


def survive(case, fault, *, leave, whole=False, say=""):
    """Let the step under test fail; the state must be as before, and all that follows as if nothing had been.

    `leave`: the exception leaves the turn, which is entered again. `whole`: the step may also have been taken, wholly.
    """
    expected = case.expected
    scene = case.fresh()
    memory = scene.memory()
    fault.scene = scene

    def attempt():
        with fault, pytest.raises(fault.error):
            scene.step("audio", 3, fault.armed)
            raise NotFailed  # otherwise what is expected to be raised was not
        return scene.state()

    def check(found, wanted, what):
        differing = differences(found, wanted)
        assert not differing, f"{say}: {what}: {differing[:6]}"

    def go_on(found):
        assert scene.memory() == memory, say
        taken = whole and not differences(found["weights"], expected[1]["weights"])
        if taken and scene.scaler is not None:
            scene.scaler.update()
            found = scene.state()
        check(found, expected[int(taken)], "after the fault")
        if not taken:
            scene.step("audio", 3)
            check(scene.state(), expected[1], "the step again")
        scene.step("audio", 4)
        if taken:
            check(scene.state(), expected[2], "the step after it")

    if leave:
        try:
            with scene.turn():
                attempt()
                raise Left
        except Left:
            pass
        with scene.turn():
            go_on(scene.state())
    else:
        with scene.turn():
            go_on(attempt())
    case.end(scene)
    check(scene.state() | {"stats": dict(scene.opt.last_stats)}, expected[3], "the next turn")


class Left(BaseException):
    """Leaves a turn."""


class NotFailed(BaseException):
    """A step that should have failed did not."""


# --- faults at calls ------------------------------------------------------------------------------------------------


def _halved(args):
    """The arguments of a kernel for the first half of its tensors."""
    half = len(args[0]) // 2
    return [arg[:half] if isinstance(arg, (list, tuple)) else arg for arg in args]


KERNELS = [name for name, value in vars(igm_rs._igm_rs).items() if isinstance(value, types.BuiltinFunctionType)]
"""Everything that is computed in Rust."""

HALVES = ("perturb_", "restore_", "project_", "project_update_")
"""Kernels that change a list of tensors and are given a second list that fits it: they may have done half of it."""

STEPS = ("at_perturbed", "sgd_step_", "adam_step_")
"""Kernels that take the base's step themselves, in one piece: what is raised right after them finds it taken."""


class Calls:
    """Counts the calls into the compiled module, and of other functions, while armed; the one at index `at` fails.

    It fails before it has done anything, after it has done all, or after it has done half.
    """

    def __init__(self, at=None, when="before", error=InjectedError, others=()):
        self.at, self.when, self.error = at, when, error
        self.log = []
        self._armed = False
        self._watched = [(igm_rs._igm_rs, name) for name in KERNELS] + list(others)
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as patches:
            patch = patches.enter_context(pytest.MonkeyPatch.context())
            for owner, name in self._watched:
                patch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))
            self._patches = patches.pop_all()
        return self

    def __exit__(self, *_):
        self._patches.close()

    @contextlib.contextmanager
    def armed(self):
        """Surround what counts."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _wrapped(self, name, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if not self._armed:
                return function(*args, **kwargs)
            self.log.append(name)
            if len(self.log) - 1 != self.at:
                return function(*args, **kwargs)
            if self.when == "after":
                function(*args, **kwargs)
            elif self.when == "half":
                function(*_halved(args), **kwargs)
            raise self.error(f"{self.when} {name}")

        return wrapper


def calls_of(case, others=()):
    """The names of the calls that the step under test makes."""
    calls = Calls(others=others)
    scene = case.fresh()
    with scene.turn(), calls:
        scene.step("audio", 3, calls.armed)
    assert set(KERNELS) & set(calls.log)
    return calls.log


def fail_at_every_call(case, others=(), error=InjectedError):
    """Try every call of the step under test, before and after it and half way; return the names of the calls."""
    names = calls_of(case, others)
    for at, name in enumerate(names):
        for number, when in enumerate(("before", "after", "half") if name in HALVES else ("before", "after")):
            fault = Calls(at, when, error, others)
            survive(
                case,
                fault,
                leave=(at + number) % 2 == 1,
                whole=when == "after" and name in STEPS,
                say=f"{when} call {at} of {len(names)}, {name}",
            )
            assert fault.log[at] == name
    return names


# --- faults in the passes -------------------------------------------------------------------------------------------


class Disturbed:
    """The pass (of a list: the part of a pass) at index `at` does `act`, with the scene and the loss, when it is done.

    It returns what `act` returns.
    """

    def __init__(self, at, act, error):
        self.at, self.act, self.error = at, act, error
        self.count = 0
        self.scene = None

    def __enter__(self):
        self.scene.disturb = self._count
        return self

    def __exit__(self, *_):
        self.scene.disturb = None

    armed = staticmethod(contextlib.nullcontext)

    def _count(self, scene, loss):
        self.count += 1
        return self.act(scene, loss) if self.count == self.at + 1 else loss


# --- faults at lines ------------------------------------------------------------------------------------------------


@functools.cache
def _exempt(path):
    """Lines at which a ``with`` block is entered and left, and lines with which a ``finally`` block begins."""
    entries, finals = set(), set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            entries |= {node.lineno} | {item.context_expr.lineno for item in node.items}
        elif isinstance(node, ast.Try) and node.finalbody:
            finals.add(node.finalbody[0].lineno)
    return entries, finals


class Lines:
    """Counts the lines of Python that are run in some files while armed; at index `at` an interrupt arrives.

    Signals are looked at after each call and where a function begins or a loop turns, so before most lines. Not where a
    ``finally`` block begins and on the way out of a ``with`` block: what came before has looked, within the block, and
    nothing looks again before the first call there. That call may be to Python, so context managers are watched too.
    """

    error = KeyboardInterrupt

    def __init__(self, files, at=None):
        self.files = tuple(str(file) for file in files)
        self.at = at
        self.log = []
        self._seen = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._seen.clear()

    @contextlib.contextmanager
    def armed(self):
        """Surround what counts."""
        previous = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(previous)

    def _call(self, frame, _event, _argument):
        path = frame.f_code.co_filename
        if path.startswith(self.files):
            return self._line
        by_the_package = path in CONTEXTS and frame.f_back.f_code.co_filename.startswith(str(PACKAGE))
        return self._line if by_the_package else None

    def _line(self, frame, event, _argument):
        if event == "line":
            line = frame.f_lineno
            entries, finals = _exempt(frame.f_code.co_filename)
            if line in finals:
                return self._line
            if line in entries:
                seen = self._seen.setdefault(frame, set())
                if line in seen:
                    return self._line
                seen.add(line)
            self.log.append((frame.f_code.co_filename, line))
            if len(self.log) - 1 == self.at:
                raise KeyboardInterrupt(f"{Path(frame.f_code.co_filename).name}:{line}")
        return self._line


def lines_of(case, files):
    """The lines that the step under test runs, in order."""
    lines = Lines(files)
    scene = case.fresh()
    with scene.turn(), lines:
        scene.step("audio", 3, lines.armed)
    return lines.log


# --- faults at moments ----------------------------------------------------------------------------------------------


class Alarm:
    """A real signal, `after` some seconds from the arming on, that raises KeyboardInterrupt if still armed."""

    error = KeyboardInterrupt

    def __init__(self, after):
        self.after = max(after, 1e-6)
        self._live = False

    def __enter__(self):
        self._previous = signal.signal(signal.SIGALRM, self._handle)
        return self

    def __exit__(self, *_):
        self._live = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous)

    def _handle(self, *_):
        if self._live:
            self._live = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def armed(self):
        """Surround what may be interrupted."""
        self._live = True
        signal.setitimer(signal.ITIMER_REAL, self.after)
        try:
            yield
        finally:
            self._live = False


# --- bases that fail ------------------------------------------------------------------------------------------------


def failing(kind, act):
    """Make a subclass of a base whose step does `act` once `left` parameters are updated, where `left` is a number."""

    class Failing(kind):
        left = None

        def step(self, closure=None):
            if self.left is None:
                return super().step(closure)
            having = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            count = math.ceil(self.left * len(having))
            hidden = [(p, p.grad) for p in having[count:]]
            for p, _ in hidden:
                p.grad = None
            try:
                super().step(closure)
            finally:
                for p, gradient in hidden:
                    p.grad = gradient
            return act()

    Failing.__name__ = kind.__name__
    return Failing
