"""Optimizers with one deliberate fault each: a check that none of them (and no peer) fails would check nothing."""

import contextlib

import torch
from contract_subjects import IGM
from torch import nn

from igm_rs import IGMOptimizer


def _parameters(opt):
    return [p for group in opt.param_groups for p in group["params"]]


class NoOptimizer(IGM):
    """Stands around an optimizer and is none."""

    def make(self, *args, **kwargs):
        class Around:
            def __init__(self, opt):
                self.opt = opt

            def __getattr__(self, name):
                return getattr(self.opt, name)

        return Around(super().make(*args, **kwargs))


class OneCallMore(IGM):
    """Calls the closure once more than it should."""

    class Kind(IGMOptimizer):
        def step(self, closure=None, **kwargs):
            if closure is not None:
                closure()
            return super().step(closure, **kwargs)


class TwiceTheLength(IGM):
    """Perturbs by 2ρ."""

    def recipe(self, base="SGD", rho=0.05):
        return super().recipe(base, 2 * rho)


class TwiceTheLr(IGM):
    """Steps twice as far as told, whatever the parameters are."""

    def make(self, model, groups=None, *, lr=1e-3, momentum=0.0, **_):
        return torch.optim.SGD(model.parameters() if groups is None else groups, lr=2 * lr, momentum=momentum)


class MovesFirst(IGM):
    """Moves a weight before it has a gradient."""

    class Kind(IGMOptimizer):
        def step(self, closure=None, **kwargs):
            with torch.no_grad():
                _parameters(self)[0].add_(1e-3)
            return super().step(closure, **kwargs)


class MissingIsZero(IGM):
    """Takes a gradient that is missing in one pass only for zero in the other."""

    class Kind(IGMOptimizer):
        def step(self, closure=None, **kwargs):
            had = []

            def filled():
                loss = closure()
                if not had:
                    had.extend(p for p in _parameters(self) if p.grad is not None)
                    return loss
                for p in _parameters(self):
                    if p.grad is None or not any(p is q for q in had):
                        p.grad = torch.zeros_like(p)
                return loss

            return super().step(filled, **kwargs)


class NewStorage(IGM):
    """Puts the new weights into new memory."""

    class Kind(IGMOptimizer):
        def step(self, closure=None, **kwargs):
            loss = super().step(closure, **kwargs)
            for p in _parameters(self):
                p.data = p.data.clone()
            return loss


class MovesAll(IGM):
    """Decays the weights of every modality."""

    class Kind(IGMOptimizer):
        def step(self, closure=None, **kwargs):
            loss = super().step(closure, **kwargs)
            with torch.no_grad():
                for p in _parameters(self):
                    p.mul_(0.999)
            return loss


class _KnowsTheModel(IGM):
    def make(self, model, *args, **kwargs):
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
        return super().make(model, *args, **kwargs)


class Thaws(_KnowsTheModel):
    """Leaves every BatchNorm layer in training, recording."""

    def step(self, opt, closure):
        for norm in self.norms:
            norm.train()
            norm.track_running_stats = True
        return super().step(opt, closure)


class StaysHeld(_KnowsTheModel):
    """Does not let BatchNorm record again after an exception."""

    def step(self, opt, closure):
        try:
            return super().step(opt, closure)
        except BaseException:
            for norm in self.norms:
                norm.track_running_stats = False
                norm.num_batches_tracked = norm.num_batches_tracked.clone()
            raise


class LastMicroBatch(IGM):
    """Sees the last micro-batch only in the second pass."""

    def accumulate(self, opt, closures):
        calls = []

        def closure():
            calls.append(None)
            opt.zero_grad()
            for micro in closures if len(calls) == 1 else closures[-1:]:
                micro()
            return torch.zeros(())

        opt.step(closure)


class ForgetsMomentum(IGM):
    """Loads everything but the base's state."""

    class Kind(IGMOptimizer):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.state.clear()


class Unsafe(IGM):
    """Saves an object of its own class."""

    class Kind(IGMOptimizer):
        def state_dict(self):
            return super().state_dict() | {"extra": Nameless()}


class LooksTwice(IGM):
    """Asks for its state twice when it saves."""

    class Kind(IGMOptimizer):
        def state_dict(self):
            super().state_dict()
            return super().state_dict()


class HalfPrecision(IGM):
    """Keeps what it knows of the features in the parameters' precision."""

    def memory(self, opt):
        return {key: value.to(_parameters(opt)[0].dtype) for key, value in super().memory(opt).items()}


class ForgetsItsOwn(IGM):
    """Loads the base's state only."""

    class Kind(IGMOptimizer):
        def load_state_dict(self, state_dict):
            groups = [{k: v for k, v in group.items() if k != "igm"} for group in state_dict["param_groups"]]
            super().load_state_dict({"state": state_dict["state"], "param_groups": groups})


class LeavesAHook(IGM):
    """Registers a hook that stays."""

    def make(self, model, *args, **kwargs):
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: None)
        return super().make(model, *args, **kwargs)


class TakesTwice(IGM):
    """Adds groups without a look at what it holds."""

    class Kind(IGMOptimizer):
        def add_param_group(self, param_group):
            try:
                super().add_param_group(param_group)
            except ValueError:
                self.param_groups.append(self.param_groups[0] | param_group)


class DropsNames(IGM):
    """Keeps no names of parameters."""

    def make(self, model, groups=None, **kwargs):
        if groups is not None and isinstance(groups[0], tuple):
            groups = [p for _, p in groups]
        return super().make(model, groups, **kwargs)


class OwnGroups(IGM):
    """Shows groups that the base does not step with."""

    class Kind(IGMOptimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.param_groups = [dict(group) for group in self.param_groups]


class NoClipping(IGM):
    """Takes `max_grad_norm` and does nothing with it."""

    def make(self, *args, max_grad_norm=None, **kwargs):
        return super().make(*args, **kwargs)


class ForeachIsAnother(IGM):
    """Steps otherwise with ``foreach=True``."""

    def make(self, model, groups=None, *, lr=1e-3, foreach=None, **options):
        return super().make(model, groups, lr=2 * lr if foreach else lr, foreach=foreach, **options)


class StateOfItsOwn(IGM):
    """Keeps the turn in an attribute, where a copy of its ``__dict__`` does not see it."""

    class Kind(IGMOptimizer):
        decay = 1.0

        @contextlib.contextmanager
        def turn(self, modality):
            self.decay = 0.9
            yield self

        def step(self, closure=None, **kwargs):
            loss = super().step(closure, **kwargs)
            with torch.no_grad():
                for p in _parameters(self):
                    p.mul_(self.decay)
            return loss


class Nameless(IGM):
    """Says nothing of itself."""

    class Kind(IGMOptimizer):
        def __repr__(self):
            return "optimizer"


FAULTS = {
    "a1_is_an_optimizer": NoOptimizer,
    "a2_calls_of_the_closure": OneCallMore,
    "a4_two_calls": TwiceTheLength,
    "a5_exception_in_pass_1": MovesFirst,
    "a7_in_pass_1_only": MissingIsZero,
    "a7_in_pass_2_only": MissingIsZero,
    "a8_storage": NewStorage,
    "a9_inactive_does_not_move": MovesAll,
    "a10_frozen_layers": Thaws,
    "a10_after_an_exception": StaysHeld,
    "a13_accumulation": LastMicroBatch,
    "a14_sparse": TwiceTheLr,
    "a14_complex": TwiceTheLr,
    "a14_integer": TwiceTheLr,
    "b1_new_process": ForgetsMomentum,
    "b2_weights_only": Unsafe,
    "b3_precision": HalfPrecision,
    "b4_counters": ForgetsItsOwn,
    "b5_of_an_older_version": ForgetsItsOwn,
    "b6_hooks_go": LeavesAHook,
    "b7_duplicates": TakesTwice,
    "b7_names": DropsNames,
    "c_schedulers": OwnGroups,
    "c_schedulers_after_load": ForgetsMomentum,
    "c_scaled_run": TwiceTheLength,
    "c_autocast": TwiceTheLr,
    "c_clip_in_the_closure": TwiceTheLength,
    "c_max_grad_norm": NoClipping,
    "c_compiled_model": TwiceTheLength,
    "c_cuda_graph": TwiceTheLength,
    "c_lightning_manual": StateOfItsOwn,
    "c_accelerate": TwiceTheLength,
    "c_noop": MovesFirst,
    "c_state_dict_determinism": ForgetsMomentum,
    "c_state_hooks": LooksTwice,
    "c_options_of_groups": TwiceTheLength,
    "c_implementations_agree": ForeachIsAnother,
    "c_repr": Nameless,
}
"""Name of a check to the faulty optimizer that it must catch; every other check is failed by a peer."""
