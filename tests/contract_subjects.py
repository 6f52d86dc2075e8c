"""The optimizers of the contract table, each behind the same few calls, used as its own documentation says."""

import importlib.metadata
from contextlib import nullcontext
from pathlib import Path

import torch

import igm_rs


class Subject:
    """How one kind of optimizer is built and driven. Options that a kind has no name for are left at what it does.

    The properties say what a row may ask of it: `sam` (it perturbs, in two passes), `wraps` (it stands around a base
    optimizer), `modal` (it knows modalities), `projects` (it keeps projectors).
    """

    title: str
    package: str
    sam = wraps = modal = projects = aged = False
    bases = ("SGD",)

    @property
    def heading(self):
        """Title with the version of the package that it comes from."""
        return f"{self.title} {importlib.metadata.version(self.package).split('+')[0]}"

    def has(self, properties):
        """Whether this subject has all of these properties."""
        return all(getattr(self, name) for name in properties)

    def recipe(self, base="SGD", rho=0.05):
        """Return the class and the options that a trainer would be given to build it from parameters."""
        raise NotImplementedError

    def make(self, model, groups=None, *, base="SGD", rho=0.05, spec=None, **options):
        """Build it for `model`. `groups` are its parameters if not given; `spec` are its modalities and heads.

        `options` are the base optimizer's, or tau, preserve_rng and max_grad_norm, which only some have.
        """
        kind, own = self.recipe(base, rho)
        for name in ("tau", "preserve_rng", "max_grad_norm"):
            options.pop(name, None)
        return kind(list(model.parameters()) if groups is None else groups, **own, **options)

    def around(self, base, rho=0.05):
        """Build it from a ready base optimizer."""
        raise NotImplementedError

    def counters(self, opt):
        """What it counts, as plain values; empty where it counts nothing."""
        return {}

    def turn(self, opt, name):
        """Return a context in which the modality `name` trains."""
        return nullcontext()

    def step(self, opt, closure):
        """One step of a training script; return the loss of the first pass."""
        return opt.step(closure)

    def two_calls(self, opt, closure):
        """One step in the form first_step, second_step."""
        closure()
        opt.first_step(zero_grad=True)
        closure()
        opt.second_step()

    def without_gradients(self, opt):
        """One step when nothing has a gradient."""
        opt.step()

    def accumulate(self, opt, closures):
        """One step over micro-batches, each of whose closures adds to the gradients."""
        opt.zero_grad()
        for closure in closures:
            closure()
        opt.step()

    def scaled_step(self, opt, scaler, loss_of):
        """One step with gradients that a GradScaler scales; `loss_of` does the forward pass."""
        opt.zero_grad()
        scaler.scale(loss_of()).backward()
        scaler.step(opt)
        scaler.update()

    def trainer(self, kind):
        """Return the class of the Hugging Face Trainer with which a user trains with this optimizer."""
        return kind

    def lightning_module(self, kind):
        """Return the class of the LightningModule with which a user trains with this optimizer."""
        return kind


class TorchSGD(Subject):
    """The optimizer everyone knows, as the measure of what is usual."""

    title = "torch.optim.SGD"
    package = "torch"

    def recipe(self, base="SGD", rho=0.05):
        return getattr(torch.optim, base), {}


class PublicSAM(Subject):
    """The closure-style SAM of pytorch-optimizer: its `step(closure)` asks for gradients computed beforehand."""

    title = "pytorch-optimizer SAM"
    package = "pytorch-optimizer"
    sam = wraps = True
    bases = ("SGD", "Adam", "AdamW")

    def recipe(self, base="SGD", rho=0.05):
        from pytorch_optimizer import SAM

        return SAM, {"base_optimizer": getattr(torch.optim, base), "rho": rho}

    def around(self, base, rho=0.05):
        from pytorch_optimizer import SAM

        return SAM(base.param_groups, base, rho=rho)

    def step(self, opt, closure):
        loss = closure()
        opt.step(closure)
        return loss

    def without_gradients(self, opt):
        opt.step(lambda: None)

    def accumulate(self, opt, closures):
        def closure():
            opt.zero_grad()
            for micro in closures:
                micro()

        self.step(opt, closure)

    def scaled_step(self, opt, scaler, loss_of):
        # scaler.step takes no closure: the two-call form, in which ε* does not depend on the scale
        opt.zero_grad()
        scaler.scale(loss_of()).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(loss_of()).backward()
        scaler.unscale_(opt)
        opt.second_step()
        scaler.update()


class IGM(Subject):
    """IGMOptimizer, with SAM and, where a check gives heads and tau, projection."""

    title = "IGMOptimizer"
    package = "igm-rs"
    sam = wraps = modal = projects = aged = True
    bases = ("SGD", "Adam", "AdamW")
    Kind = igm_rs.IGMOptimizer

    @property
    def heading(self):
        return self.title

    def recipe(self, base="SGD", rho=0.05):
        return self.Kind, {"base": getattr(torch.optim, base), "rho": rho}

    def make(self, model, groups=None, *, base="SGD", rho=0.05, spec=None, **options):
        kind, own = self.recipe(base, rho)
        where = {"model": model} if spec is None else spec
        groups = list(model.parameters()) if groups is None else groups
        return kind(groups, **own, **where, **options)

    def around(self, base, rho=0.05):
        return self.Kind(base, rho=rho)

    def turn(self, opt, name):
        return opt.turn(name)

    def accumulate(self, opt, closures):
        opt.step(list(closures))

    def scaled_step(self, opt, scaler, loss_of):
        def closure():
            opt.zero_grad()
            loss = loss_of()
            scaler.scale(loss).backward()
            return loss.detach()

        opt.step(closure, scaler=scaler)
        scaler.update()

    def counters(self, opt):
        return {
            "turns": opt.turns,
            "round": opt.round,
            "skipped": opt.skipped_steps,
            "unperturbed": opt.unperturbed_steps,
            "rho": dict(opt.rho),
            "tau": dict(opt.tau),
        }

    def memory(self, opt):
        """What it keeps of the features: covariances and projectors by modality and layer."""
        return {
            (kind, name, layer): value
            for kind, kept in (("covariance", opt.covariances), ("projector", opt.projectors))
            for name, mine in kept.items()
            for layer, value in mine.items()
        }

    def trainer(self, kind):
        from igm_rs.integrations.transformers import IGMTrainerMixin

        return type("Trainer", (IGMTrainerMixin, kind), {})

    def lightning_module(self, kind):
        from igm_rs.integrations.lightning import IGMMixin

        return type("Module", (IGMMixin, kind), {})

    def older_checkpoints(self):
        """Return checkpoints that an older version wrote, with the options of the optimizer that wrote them."""
        folder = Path(__file__).parent / "checkpoints"
        saved = torch.load(folder / "flat-version-1.pt", weights_only=True)
        return [(saved["checkpoint"], {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "tau": 1.5})]


SUBJECTS = (TorchSGD(), PublicSAM(), IGM())
PEERS = SUBJECTS[:2]
OURS = SUBJECTS[2]
