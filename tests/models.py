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


class _Convolutions(nn.Module):
    """Two convolutions of 1, 2 or 3 dimensions and a Linear layer; the input is multiplied with itself to fill them."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.last = first, second, nn.Linear(4, CLASSES)

    def forward(self, x):
        z = x[:, None]
        for size in (3, 2)[: len(self.first.kernel_size) - 1]:
            z = z[..., None] * x[:, :size].reshape(len(x), *[1] * (z.dim() - 1), size)
        return self.last(self.second(self.first(z).tanh()).tanh().flatten(2).mean(dim=2))


class _Attention(nn.Module):
    """Every feature of the input is a token; self-attention, or attention to other tokens of other widths."""

    def __init__(self, other=False, **options):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, **({"kdim": 3, "vdim": 5} if other else {}), **options)
        self.last = nn.Linear(4, CLASSES)
        self.other = other

    def forward(self, x):
        tokens = self.embed(torch.stack([x, x.cos()], dim=2))
        key, value = tokens, tokens
        if self.other:
            key = torch.stack([x, x**2, x.sin()], dim=2)
            value = torch.stack([x, x.sin(), x.cos(), 1 + x, x**2], dim=2)
        inputs = [tokens, key, value]
        if self.attention.batch_first:
            return self.last(self.attention(*inputs)[0].mean(dim=1))
        query, key, value = (z.transpose(0, 1) for z in inputs)
        return self.last(self.attention(query, key=key, value=value, need_weights=False)[0].mean(dim=0))


class _Tokens(nn.Module):
    """Linear layers on tokens: every feature of the input is one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(self.first(torch.stack([x, x.cos()], dim=2)).tanh()).mean(dim=1)


class _Chain(nn.Module):
    """Three layers of width 4 after the first four features; `tied` has the first two share their weight."""

    def __init__(self, kind=nn.Linear, tied=False):
        super().__init__()
        self.first, self.second, self.last = kind(4, 4), kind(4, 4), nn.Linear(4, CLASSES)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x[:, :4]).tanh()).tanh())


def _transformers_conv1d(out, d):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, d)


LAYERS = {
    "conv1d": lambda: _Convolutions(
        nn.Conv1d(1, 4, 3, padding="same", padding_mode="circular"), nn.Conv1d(4, 4, 2, stride=2, groups=2)
    ),
    "conv2d": lambda: _Convolutions(
        nn.Conv2d(1, 4, (3, 2), padding=(2, 1), dilation=(2, 1), bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate", groups=4),
    ),
    "conv3d": lambda: _Convolutions(
        nn.Conv3d(1, 4, (2, 2, 1)), nn.Conv3d(4, 4, (1, 2, 2), padding=(1, 0, 0), groups=2)
    ),
    "self-attention": lambda: _Attention(batch_first=True),
    "attention": lambda: _Attention(other=True),
    "attention without bias": lambda: _Attention(bias=False),
    "tokens": _Tokens,
    "weight norm": lambda: _Chain(lambda d, out: nn.utils.parametrizations.weight_norm(nn.Linear(d, out))),
    "tied": lambda: _Chain(tied=True),
    "Conv1D": lambda: _Chain(_transformers_conv1d),
}


class OfLayers(nn.Module):
    """For each modality a network of one of LAYERS, all of whose layers are projected."""

    def __init__(self, kind, names=("audio", "video")):
        super().__init__()
        self.nets = nn.ModuleDict({n: LAYERS[kind]() for n in names})

    def forward(self, name, x):
        return self.nets[name](x)

    def options(self):
        """What IGMOptimizer and the reference are told of this model."""
        return {
            "modalities": {n: [net] for n, net in self.nets.items()},
            "heads": {n: [*net.children()] for n, net in self.nets.items()},
        }


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
    """A model under IGMOptimizer and its twin under the reference, on the same batches.

    Options that are not the same for both: `of_the_optimizer` makes them of the model, `of_the_oracle` of the twin.
    """

    def __init__(
        self,
        model,
        base,
        names=("audio", "video"),
        dtype=torch.float64,
        device="cpu",
        of_the_optimizer=None,
        of_the_oracle=None,
        **options,
    ):
        self.model = model.to(device, dtype)
        self.twin = copy.deepcopy(self.model)
        mine = self.model.options()
        if isinstance(model, SharedHead):
            mine = {"modalities": mine["modalities"], "head": self.model.head}
        # The oracle has the printed SVD only, and makes every second pass.
        both = {key: value for key, value in options.items() if key not in ("route", "skip_inert")}
        self.opt = IGMOptimizer(
            base(self.model.parameters()),
            **{**mine, **options, **(of_the_optimizer(self.model) if of_the_optimizer else {})},
        )
        told = {**self.twin.options(), **both, **(of_the_oracle(self.twin) if of_the_oracle else {})}
        self.oracle = Algorithm1(base=base(self.twin.parameters()), **told)
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
