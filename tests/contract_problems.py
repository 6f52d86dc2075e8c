"""What the checks of the contract train: small problems, their twins in plain PyTorch, and how two are compared."""

import copy
import itertools

import torch
from contract import expect
from models import OwnHeads, batches, distance
from torch import nn
from torch.nn.functional import cross_entropy

TWO = ("audio", "video")
CLOSE = 1e-7  # of weights in float64; some compute the norm of the gradients in float32
LR, MOMENTUM, DECAY, RHO = 0.1, 0.9, 1e-2, 0.05


class Loss:
    """A small network and its batches; calling it is the forward pass, with a count of how often it was done."""

    def __init__(self, dtype=torch.float64, model=None, device="cpu", size=9):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)) if model is None else model
        self.model = model.to(device, dtype)
        self.batches = batches(("audio",), 12, dtype, size=size, device=device)["audio"]
        self.passes = 0

    def __call__(self, t=0):
        """Loss of batch `t`."""
        self.passes += 1
        x, y = self.batches[t]
        return cross_entropy(self.model(x), y)

    def closure(self, opt, t=0):
        """Return the usual closure: clear, forward, backward, loss."""

        def closure():
            opt.zero_grad()
            loss = self(t)
            loss.backward()
            return loss

        return closure

    def backward(self, t=0):
        """Compute gradients for a step without a closure."""
        self.model.zero_grad()
        self(t).backward()


def oracle(problem, subject, rho=RHO, **options):
    """Return a twin of `problem` and a function that does on it what a step of `subject` should do, in plain PyTorch.

    The function takes the forward pass; it perturbs by ρ g/‖g‖ if the subject is a SAM, and steps with SGD.
    """
    twin = copy.deepcopy(problem)
    base = torch.optim.SGD(twin.model.parameters(), **({"lr": LR, "momentum": MOMENTUM} | options))

    def step(forward):
        base.zero_grad()
        forward().backward()
        if subject.sam and rho:
            moved = [p for p in twin.model.parameters() if p.grad is not None]
            before = [p.detach().clone() for p in moved]
            norm = torch.stack([torch.linalg.vector_norm(p.grad) for p in moved]).norm()
            with torch.no_grad():
                for p in moved:
                    p.add_(rho / norm * p.grad)
            base.zero_grad()
            forward().backward()
            with torch.no_grad():
                for p, q in zip(moved, before, strict=True):
                    p.copy_(q)
        base.step()

    return twin, base, step


def usual(subject, problem, **options):
    """Build the subject for the problem's model with the options that the oracle takes."""
    return subject.make(problem.model, **({"lr": LR, "momentum": MOMENTUM} | options))


def weights(model):
    """Copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def unmoved(model, before, message):
    """Fail unless the weights are `before`, to the bit."""
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    expect(same, message)


def close(problem, twin, tolerance, message):
    """Fail unless two models have the same weights within `tolerance`."""
    gap = distance(problem.model, twin.model)
    expect(gap <= tolerance, message)  # NaN is not <=


def alike(a, b):
    """Whether two nested structures of dicts, lists, tensors and values are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(alike, a, b))
    return a == b


def momentum(opt):
    """Copy of the base's state."""
    return copy.deepcopy(opt.state_dict()["state"])


def two_modalities(subject, dtype=torch.float64, **options):
    """Return a model of two modalities and an optimizer that knows them, if it can, and projects, if it can."""
    torch.manual_seed(1)
    model = OwnHeads(TWO).to(dtype)
    settings = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "tau": 1.5}
    return model, subject.make(model, spec=model.options(), **(settings | options))


def modal_closure(opt, model, name, batch):
    """Return the usual closure for one modality."""

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(name, batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def in_turns(subject, model, opt, data, start, stop, length=3):
    """Steps [start, stop) of a run whose modality changes every `length` steps."""
    for turn, steps in itertools.groupby(range(start, stop), key=lambda t: t // length):
        name = TWO[turn % 2]
        with subject.turn(opt, name):
            for t in steps:
                subject.step(opt, modal_closure(opt, model, name, data[name][t]))
