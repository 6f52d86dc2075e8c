"""The oracle of ``mode="released"``: the steps of the released scripts in plain PyTorch, written from method.md §4.

Nothing here imports ``igm_rs``. A parameter's ``data`` is replaced, never changed in place, as the scripts do; so what
autograd has saved of a Linear layer, a view of the old weights, stays as it was, and what it has saved of a
convolution, the parameter itself, is perturbed in the backward pass.

==============================================  ===================================
method.md §4                                    here
==============================================  ===================================
1: ε for each tensor, ρ of encoder and head     :meth:`Scripts._climb`
2: never taken back                             `restore`
3: the head at θ + ε, stale features            `second_pass`
4: 0.7 L + 0.3 F                                `flat_ratio`
5: Ȳ of a pass in evaluation mode, by stage     :meth:`Scripts.stage`, :func:`projectors`
6: Linear layers of one shape                   :meth:`Scripts._project`
7: a new optimizer for each stage               :meth:`Scripts.stage`
==============================================  ===================================
"""

import contextlib

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def mixed_loss(logits, batch):
    """Cross-entropy with both labels of a mixed batch, weighted by λ."""
    lam = batch["lam"]
    return lam * cross_entropy(logits, batch["a"]) + (1 - lam) * cross_entropy(logits, batch["b"])


def linear_layers(module):
    """The Linear layers of a module, input to output."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@contextlib.contextmanager
def inputs_of(layers):
    """Gather the batch mean of what each layer is given (Eq. 2)."""
    rows = {layer: [] for layer in layers}

    def hear(layer, args):
        rows[layer].append(args[0].detach().double().mean(dim=0))

    handles = [layer.register_forward_pre_hook(hear) for layer in layers]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def flat_projector(rows, tau):
    """T of Eq. (4) from the batch means of a layer's inputs, float64."""
    covariance = sum(torch.outer(row, row) for row in rows)
    U, spectrum, _ = torch.linalg.svd(covariance)
    low, high = spectrum.min(), spectrum.max()
    return U @ torch.diag(torch.exp(-tau * (spectrum - low) / (high - low))) @ U.T


def projectors(rows, tau):
    """T of every layer that has been given something."""
    return {layer: flat_projector(mine, tau) for layer, mine in rows.items() if mine}


class Scripts:
    """Training in stages, one modality after the other; the switches are those of ``igm_rs.Released``.

    Parameters
    ----------
    encoders, heads : ModuleDict
        By modality.
    base : callable
        List of parameters → ``torch.optim`` optimizer.
    rho, rho_head : float
        Length of ε of each tensor of the encoder, and of the head.
    """

    def __init__(self, encoders, heads, base, *, rho, rho_head=None, tau, norm="tensor", restore=False,
                 second_pass="head", flat_ratio=0.3, gather="pass", pairing="shape",
                 reset=("momentum", "lr")):  # fmt: skip
        self.encoders, self.heads = encoders, heads
        self.make = base
        self.rho, self.rho_head, self.tau = rho, rho if rho_head is None else rho_head, tau
        self.norm, self.restore, self.second_pass, self.flat_ratio = norm, restore, second_pass, flat_ratio
        self.gather, self.pairing, self.reset = gather, pairing, reset
        self.base = self._new_base()
        self.lr = self.base.param_groups[0]["lr"]
        self.T = {}
        self.rows = {}

    def _new_base(self):
        return self.make([*self.encoders.parameters(), *self.heads.parameters()])

    def stage(self, name, before=None, loader=None):
        """Begin a stage of `name`: the base anew, as far as `reset` says, and T of the modality `before` it."""
        if before is None:
            return
        group = self.base.param_groups[0]
        state, lr = self.base.state, group["lr"]
        self.base = self._new_base()
        if "momentum" not in self.reset:
            self.base.state = state
        if "lr" not in self.reset:
            self.base.param_groups[0]["lr"] = lr
        if self.gather == "pass":
            modules = [self.encoders[before], self.heads[before]]
            for module in modules:
                module.eval()
            with inputs_of(linear_layers(self.heads[before])) as rows, torch.no_grad():
                for batch in loader:
                    self.heads[before](self.encoders[before](batch["x"]))
            for module in modules:
                module.train()
            self.rows = rows
        self.T = projectors(self.rows, self.tau)
        self.rows = {}

    def step(self, name, batch):
        """One step of modality `name`; returns L and F."""
        encoder, head = self.encoders[name], self.heads[name]
        radii = [(p, self.rho) for p in encoder.parameters()] + [(p, self.rho_head) for p in head.parameters()]
        with inputs_of(linear_layers(head)) as rows:
            features = encoder(batch["mixed"])
            loss = mixed_loss(head(features), batch)
        gradients = torch.autograd.grad(loss, [p for p, _ in radii], retain_graph=True)
        before = [p.data for p, _ in radii]
        self._climb(radii, gradients)
        if self.second_pass == "head":
            flat = cross_entropy(head(features), batch["y"])
        else:
            with statistics_held(encoder):
                flat = mixed_loss(head(encoder(batch["mixed"])), batch)
        total = (1 - self.flat_ratio) * loss + self.flat_ratio * flat
        self.base.zero_grad()
        total.backward()
        if self.restore:
            for (p, _), data in zip(radii, before, strict=True):
                p.data = data
        self._project(head)
        self.base.step()
        if self.gather == "turn":
            for layer, mine in rows.items():
                self.rows.setdefault(layer, []).extend(mine)
        return loss.item(), flat.item()

    def _climb(self, radii, gradients):
        """p ← p + ρ g/‖g‖, in new memory; a tensor with a gradient of zero stays."""
        together = torch.cat([g.flatten() for g in gradients]).norm()
        for (p, rho), g in zip(radii, gradients, strict=True):
            norm = g.norm() if self.norm == "tensor" else together
            if norm > 0:
                p.data = p.data + rho * g / norm

    def _project(self, head):
        """Multiply each layer's gradient by the T of every source layer of its shape, or of the one in its place."""
        for place, layer in enumerate(linear_layers(head)):
            for other_place, (other, T) in enumerate(self.T.items()):
                fits = other.weight.shape == layer.weight.shape
                if fits if self.pairing == "shape" else other_place == place:
                    layer.weight.grad = layer.weight.grad @ T.to(layer.weight.dtype)


@contextlib.contextmanager
def statistics_held(module):
    """Let BatchNorm layers record nothing: they do so once a step."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, usual, strict=True):
            layer.momentum = momentum
