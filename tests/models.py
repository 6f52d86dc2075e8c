"""Small multimodal models, their batches, and a driver that runs IGMOptimizer beside the reference."""

import copy

import torch
from reference import Algorithm1, schedule
from torch import nn
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer

WIDTHS = {"audio": 5, "video": 7, "text": 4}
CLASSES = 3


class OwnHeads(nn.Module):
    """An encoder and a head of two Linear layers for each modality."""

    def __init__(self, names=("audio", "video"), width=8):
        super().__init__()
        self.encoders = nn.ModuleDict({n: nn.Sequential(nn.Linear(WIDTHS[n], width), nn.Tanh()) for n in names})
        self.heads = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, CLASSES)) for n in names}
        )

    def forward(self, name, x):
        return self.heads[name](self.encoders[name](x))

    def options(self):
        """What IGMOptimizer and the reference are told of this model."""
        names = list(self.encoders)
        return {
            "modalities": {n: [self.encoders[n], self.heads[n]] for n in names},
            "heads": {n: [self.heads[n][0], self.heads[n][2]] for n in names},
        }


class SharedHead(nn.Module):
    """An encoder for each modality, and one Linear head for all, as in MLA."""

    def __init__(self, names=("audio", "video"), width=8):
        super().__init__()
        self.encoders = nn.ModuleDict({n: nn.Sequential(nn.Linear(WIDTHS[n], width), nn.Tanh()) for n in names})
        self.head = nn.Linear(width, CLASSES)

    def forward(self, name, x):
        return self.head(self.encoders[name](x))

    def options(self):
        """What IGMOptimizer and the reference are told of this model."""
        names = list(self.encoders)
        return {"modalities": {n: [self.encoders[n]] for n in names}, "heads": {n: [self.head] for n in names}}


def batches(names, count, dtype=torch.float64, size=9, seed=0, device="cpu"):
    """Return `count` batches (x, y) for each name; the inputs have a mean, so that T has a direction."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: [
            (
                torch.randn(size, WIDTHS[n], generator=generator, dtype=torch.float64).to(device, dtype) + 0.5,
                torch.randint(CLASSES, (size,), generator=generator).to(device),
            )
            for _ in range(count)
        ]
        for n in names
    }


def closure_for(opt, model, name, batch):
    """Return the usual closure: clear, forward, backward, loss."""

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(name, batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def distance(model, other):
    """Return the greatest absolute difference between the parameters of two models."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return torch.stack([(p - q).abs().max().double() for p, q in pairs]).max().item()  # a NaN stays one


def same(a, b):
    """Whether two nested structures of dicts, lists, tensors and values are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def unchanged(model, before):
    """Whether the parameters of a model are what they were, to the bit."""
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Pair:
    """A model under IGMOptimizer and its twin under the reference, on the same batches."""

    def __init__(self, model, base, names=("audio", "video"), dtype=torch.float64, device="cpu", **options):
        self.model = model.to(device, dtype)
        self.twin = copy.deepcopy(self.model)
        mine = self.model.options()
        if isinstance(model, SharedHead):
            mine = {"modalities": mine["modalities"], "head": self.model.head}
        of_the_oracle = {key: value for key, value in options.items() if key != "route"}  # it has the printed SVD only
        self.opt = IGMOptimizer(base(self.model.parameters()), **mine, **options)
        self.oracle = Algorithm1(base=base(self.twin.parameters()), **self.twin.options(), **of_the_oracle)
        self.names = names
        self.dtype, self.device = dtype, device
        self.sam = options.get("rho", 0.05) != 0

    def step(self, name, batch):
        """One step of both; without SAM IGMOptimizer is called as a script without closure does."""
        closure = closure_for(self.opt, self.model, name, batch)
        if self.sam:
            loss = self.opt.step(closure)
        else:
            loss = closure()
            self.opt.step()
        expected = self.oracle.step(name, lambda: cross_entropy(self.twin(name, batch[0]), batch[1]))
        return loss.item(), expected

    def run(self, rounds=3, inner=4, alternate=False):
        """Run rounds of turns (or of batches in turn); yield the distance after every step."""
        data = batches(self.names, rounds * inner, self.dtype, device=self.device)
        turns = None
        for _, name, index, last in schedule(self.names, rounds, inner, alternate):
            if not alternate and turns is None:
                turns = self.opt.turn(name), self.oracle.turn(name)
                for turn in turns:
                    turn.__enter__()
            self.step(name, data[name][index])
            if last:
                for turn in turns:
                    turn.__exit__(None, None, None)
                turns = None
            yield distance(self.model, self.twin)
