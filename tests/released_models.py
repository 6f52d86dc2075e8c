"""Small networks of convolutions, normalisation and Linear layers for released steps, and their mixed batches."""

import copy
import functools

import torch
from released_reference import mixed_loss
from torch import nn
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer, Released

F32, F64 = torch.float32, torch.float64
CLASSES = 3
RHO, TAU = 0.05, 1.5

SHAPES = {"audio": (1, 9), "video": (1, 6, 6), "rgb": (1, 3, 4, 4), "of": (1, 4, 3, 4), "depth": (1, 4, 4, 3)}
"""Of one sample of each modality."""

CONVOLUTIONS = {2: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv2d, nn.BatchNorm2d), 4: (nn.Conv3d, nn.BatchNorm3d)}

TWO, THREE = ("audio", "video"), ("rgb", "of", "depth")

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)
ADAM = functools.partial(torch.optim.Adam, lr=2e-3, weight_decay=1e-2)

PAPER = Released(
    norm="all",
    restore=True,
    second_pass="whole",
    flat_ratio=1.0,
    gather="turn",
    layers="all",
    pairing="position",
    reset=(),
)


def encoder(name):
    """Convolution, normalisation, Linear: what autograd saves of each differs.

    The convolution has no bias: before a BatchNorm its gradient would be rounding noise, which ε of a tensor by itself
    stretches to the length ρ.
    """
    convolution, normalisation = CONVOLUTIONS[len(SHAPES[name])]
    return nn.Sequential(
        convolution(1, 4, 3, padding=1, bias=False),
        normalisation(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.Tanh(),
    )


class Net(nn.Module):
    """An encoder, and a head whose first two layers have one shape, for each modality; convolutions go before them."""

    def __init__(self, names=TWO, convolutions=False):
        super().__init__()
        before = [nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3, padding=1), nn.Tanh(), nn.Flatten()]
        self.encoders = nn.ModuleDict({name: encoder(name) for name in names})
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    *(copy.deepcopy(before) if convolutions else []),
                    nn.Linear(6, 6),
                    nn.Tanh(),
                    nn.Linear(6, 6),
                    nn.Tanh(),
                    nn.Linear(6, CLASSES),
                )
                for name in names
            }
        )
        for name in names:
            self.heads[name](self.encoders[name](torch.zeros(2, *SHAPES[name])))  # gives the lazy layers their sizes

    def optimizer(self, base=SGD, **options):
        """An optimizer in released mode around `base`."""
        told = {"modalities": dict(self.encoders), "heads": dict(self.heads), "rho": RHO, "tau": TAU}
        return IGMOptimizer(base(self.parameters()), **(told | {"mode": "released"} | options))


def net(names=TWO, dtype=F64, seed=0, **options):
    torch.manual_seed(seed)
    return Net(names, **options).to(dtype)


def batches(names, count, dtype=F64, size=8, seed=0):
    """By modality, mixed batches: x, mixed, labels y, a, b, and λ; the labels depend on x, which has a mean."""
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for name in names:
        data[name] = []
        for _ in range(count):
            y = torch.randint(CLASSES, (size,), generator=generator)
            noise = torch.randn(size, *SHAPES[name], generator=generator, dtype=F64)
            x = (noise + 0.5 + y.view(-1, *[1] * len(SHAPES[name]))).to(dtype)
            partners = torch.randperm(size, generator=generator)
            lam = torch.rand((), generator=generator).item()
            mixed = lam * x + (1 - lam) * x[partners]
            data[name].append({"x": x, "mixed": mixed, "y": y, "a": y, "b": y[partners], "lam": lam})
    return data


def closure_for(model, name, batch):
    """The closure of a released step."""

    def closure():
        features = model.encoders[name](batch["mixed"])
        head = model.heads[name]
        return mixed_loss(head(features), batch), lambda: cross_entropy(head(features), batch["y"])

    return closure


def copied(state):
    return {key: value.clone() for key, value in state.items()}
