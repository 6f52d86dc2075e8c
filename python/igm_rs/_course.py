"""The course of training: when a turn begins and ends, and when T is made (Algorithm 1, lines 1-3 and 11-13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ._core import Core
from ._covariance import Covariance
from ._perturbation import judge

__all__ = ["Course"]


class Course:
    """Begins and ends the turns of an optimizer whose parts are `core`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def open(self, modality: str) -> bool:
        """Enter a ``turn()`` block; return whether a new turn begins there, rather than the open one going on."""
        core = self._core
        if core.counters.open == modality and core.counters.explicit:
            return False
        self.leave()
        core.counters.started[modality] = False
        return True

    def enter(self, active: str) -> None:
        """Note that a step (or a collecting pass) of `active` succeeds; the first of a turn begins its Ȳ."""
        core = self._core
        counters = core.counters
        implicit = core.turn is None
        if implicit and (counters.explicit or (core.refresh == "turn" and counters.open not in (None, active))):
            self.leave()
        alone = len(core.modalities.names) == 1
        if implicit and core.refresh == "turn" and alone and core.gathers and core.projects(active):
            core.warn_once(
                "one modality",
                f"{active!r} is the only modality and refresh is 'turn', so outside turn() its projector is never "
                "made; open turns, or give refresh=n",
            )
        if not counters.started[active]:
            core.projection.begin(active)
            counters.started[active] = True
            counters.since[active] = 0
            self._miss_passes(active)
            self._start_anew(active, implicit=implicit)
        if not implicit or core.refresh == "turn":
            counters.open, counters.explicit = active, not implicit

    def _miss_passes(self, active: str) -> None:
        """Warn where a pass of its own should have given another modality's T, and there was none."""
        core = self._core
        if core.gathers or not core.projects(active):
            return
        projection = core.projection
        for source, pairs in zip(projection.sources[active], projection.pairs[active], strict=True):
            acts = any(core.tau_of(theirs, source) > 0 for _, theirs in pairs)
            if acts and core.counters.taken[source] and not projection.made[source]:
                core.warn_once(
                    "pass",
                    f"the turn of {active!r} begins and {source!r} has no T to act on it: the mode's gather is 'pass', "
                    "expected a pass over the training data between the two turns, with "
                    f"opt.collect({source!r}), torch.no_grad(): and the model in eval(); or gather='turn'",
                )

    def leave(self) -> None:
        """End the turn that steps outside any turn have formed; drop one that an exception has left."""
        counters = self._core.counters
        if counters.open is None:
            return
        if counters.explicit:
            self._core.projection.discard(counters.open)
            counters.close()
        else:
            self.end(counters.open)

    def end(self, modality: str) -> None:
        """End the turn of `modality` with a new T of it, where T is made at the end of turns."""
        self._core.counters.settle()
        _raise(self.wholly(self._end, modality))
        self.judge()

    def _end(self, modality: str) -> str | None:
        core = self._core
        counters = core.counters
        unseen = None
        if core.refresh != "manual" and ((counters.since[modality] and core.gathers) or counters.replaced):
            unseen = self._make_projector(modality)
        counters.turns += 1
        counters.close()
        return unseen

    def judge(self) -> None:
        """Judge the perturbation of a step that has left that for later, as it waits for the device."""
        core = self._core
        if core.unjudged is not None:
            figures, core.unjudged = core.unjudged, None
            judge(core, figures)

    def count(self, active: str, usable: torch.Tensor | None = None) -> None:
        """Count a step of `active`, and make T where n steps have been taken.

        `usable`: what only the device knows, whether the step was one.
        """
        core = self._core
        counters = core.counters
        counters.steps += 1
        counters.since[active] += 1
        counters.taken[active] += 1
        if usable is not None:
            counters.doubt(active, usable)
        if isinstance(core.refresh, int) and counters.since[active] >= core.refresh:
            counters.settle()
        if isinstance(core.refresh, int) and counters.since[active] >= core.refresh:
            self.make_projector(active)
            if core.turn is None:  # n steps outside any turn were one
                counters.started[active] = False
                counters.turns += 1

    def wholly(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do `work`; what leaves it by an exception leaves Ȳ, every T and the counters as they were."""
        core = self._core
        put_back, counters = core.projection.checkpoint(), core.counters.copy()
        try:
            return work(*arguments)
        except BaseException:
            put_back()
            core.counters.put_back(counters)
            raise

    def collected(self, modality: str, gathered: Mapping[str, Covariance]) -> None:
        """Let what a pass has `gathered` be the Ȳ of `modality`; outside any turn its T is made."""
        core = self._core
        if core.turn is None:
            self.leave()
            core.projection.begin(modality)
            core.projection.put(modality, gathered)
            self.make_projector(modality)
            core.counters.started[modality] = False
        else:
            self.enter(modality)
            core.projection.put(modality, gathered)
            core.counters.replaced = True

    def make_projector(self, modality: str) -> None:
        """T of `modality` from its Ȳ (Eq. 4); RuntimeError where steps were taken and a layer saw no features."""
        self._core.counters.settle()
        _raise(self.wholly(self._make_projector, modality))

    def _make_projector(self, modality: str) -> str | None:
        """Make T of `modality`; return what there is to complain of, a layer that should have seen features."""
        core = self._core
        counters = core.counters
        stepped = counters.since[modality] > 0 and core.gathers and not counters.replaced
        unseen = core.projection.unseen(modality) if stepped else []
        needed = any(modality in listed for listed in core.projection.sources.values())
        core.projection.refresh(modality, core.tau_of)
        steps, counters.since[modality] = counters.since[modality], 0
        if needed and any(core.tau_of(layer, modality) > 0 for layer in unseen):
            return (
                f"{modality!r} took {steps} steps and its projected layer {unseen[0]} saw no features, so its "
                "projector cannot be made: expected the layer's own forward to be called, in training mode, in each "
                "first pass"
            )
        return None

    def _start_anew(self, active: str, *, implicit: bool) -> None:
        """The options of ``reset``, at the first step of a turn; the lr of a ``turn()`` block is so from its beginning.

        So a scheduler that is stepped before the first step of the block counts.
        """
        core = self._core
        if "momentum" in core.reset:
            for _, members in core.modalities.active[active]:
                for p in members:
                    core.base.state.pop(p, None)
        if implicit:
            self.first_lr()

    def first_lr(self) -> None:
        """Let every group have the lr of construction, where that is reset."""
        core = self._core
        if "lr" in core.reset:
            for group, lr in zip(core.base.param_groups, core.initial_lr, strict=False):  # steps tell of one too many
                _set_lr(group, lr)

    def way_back_of_lr(self) -> Callable[[], None]:
        """Return what gives every group that has the lr of construction the one that it has now."""
        core = self._core
        if "lr" not in core.reset:
            return _nothing
        groups = core.base.param_groups
        before = [lr.clone() if isinstance(lr := group.get("lr"), torch.Tensor) else lr for group in groups]

        def undo() -> None:
            for group, lr, first in zip(core.base.param_groups, before, core.initial_lr, strict=False):
                if lr is not None and bool(group["lr"] == first):
                    _set_lr(group, lr)

        return undo


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group.get("lr"), torch.Tensor):
        group["lr"].fill_(lr)
    elif "lr" in group:
        group["lr"] = lr


def _nothing() -> None:
    """Take nothing back."""


def _raise(complaint: str | None) -> None:
    if complaint is not None:
        raise RuntimeError(complaint)
