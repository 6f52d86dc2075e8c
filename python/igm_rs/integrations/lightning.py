"""Lightning with IGMOptimizer: one mixin that makes the second pass of a step silent, in every precision."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from igm_rs.optimizer import IGMOptimizer

if not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))):
    raise ImportError("igm_rs.integrations.lightning needs Lightning: pip install 'igm-rs[lightning]'")
from torchmetrics import Metric  # comes with Lightning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Module
else:
    _Module = object

__all__ = ["IGMMixin"]

Closure = Callable[[], Any]


class IGMMixin(_Module):
    r"""Let a LightningModule train with :class:`igm_rs.IGMOptimizer`; to be put before ``LightningModule``.

    Automatic optimization needs nothing else: return the optimizer from ``configure_optimizers``. Manual optimization
    calls :meth:`igm_step` where it would call ``step``. Both do the same in ``32-true``, ``bf16-true``, ``bf16-mixed``
    and ``16-mixed``, where Lightning's own order of calls leaves no second pass; and with ``lightning`` and
    ``pytorch_lightning`` alike.

    Of the two passes of a step (Eqs. 7 and 8) only the first is seen from outside: what ``training_step`` logs and
    returns is from θ, not from θ + ε*; torchmetrics that are submodules are updated once; ``on_before_zero_grad`` is
    called once, and ``global_step`` counts once. The hooks that may change gradients (``on_before_backward``,
    ``on_after_backward``, ``on_before_optimizer_step``, ``configure_gradient_clipping``) run in both passes, so
    that both gradients are treated alike; ``Trainer(gradient_clip_val=…)`` therefore clips before projection, and
    ``IGMOptimizer(max_grad_norm=…)`` after it.

    Attributes
    ----------
    second_pass : bool
        Whether the gradient at θ + ε* is being computed. Ask it in ``training_step`` around whatever else must happen
        once for each batch.

    Notes
    -----
    *Turns.* Let a batch, or an epoch, forward one modality: its gradients tell which modality steps, and consecutive
    steps of one modality are its turn. The open turn is in Lightning's checkpoint, also in the middle of an epoch.
    ``with opt.turn(name):`` works on what ``self.optimizers()`` returns. One that spans several batches begins and
    ends best in ``training_step``: a checkpoint may be made before ``on_train_batch_end`` and ``on_train_epoch_end``
    are called, and a run that goes on in the middle of an epoch does not call ``on_train_epoch_start``.

    A ``training_step`` that returns None skips the batch. ``Trainer(accumulate_grad_batches=…)`` hands the optimizer
    the last micro-batch only and is refused unless ρ = τ = 0: use manual optimization and give :meth:`igm_step` a list.

    Raises
    ------
    TypeError
        Where a class is defined in which another ``optimizer_step`` goes before the mixin's.

    Examples
    --------
    >>> import torch
    >>> from lightning.pytorch import LightningModule, Trainer
    >>> from igm_rs import IGMOptimizer
    >>> from igm_rs.integrations.lightning import IGMMixin
    >>> class Model(IGMMixin, LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 2)
    ...     def training_step(self, batch, batch_idx):
    ...         return self.layer(batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return IGMOptimizer(self.parameters(), lr=0.1, rho=0.05)
    >>> data = torch.utils.data.DataLoader(torch.ones(6, 4), batch_size=3)
    >>> quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    >>> trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet)
    >>> trainer.fit(Model(), data)
    >>> trainer.global_step, trainer.optimizers[0].unperturbed_steps
    (2, 0)

    The same in manual optimization:

    >>> class Manual(Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.automatic_optimization = False
    ...     def training_step(self, batch, batch_idx):
    ...         def closure():
    ...             self.optimizers().zero_grad()
    ...             loss = self.layer(batch).square().mean()
    ...             self.manual_backward(loss)
    ...             return loss
    ...         self.igm_step(closure)
    >>> trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet)
    >>> trainer.fit(Manual(), data)
    >>> trainer.global_step, trainer.optimizers[0].unperturbed_steps
    (2, 0)
    """

    second_pass: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(IGMMixin)]
        other = next((c for c in before if "optimizer_step" in vars(c) and not issubclass(c, IGMMixin)), None)
        if other is not None:
            raise TypeError(
                f"{cls.__name__} takes optimizer_step from {other.__name__}, expected IGMMixin before it: "
                f"class {cls.__name__}(IGMMixin, {other.__name__})"
            )

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as LightningModule does, in the first pass; nothing in the second."""
        if not self.second_pass:
            super().log(name, value, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Closure | None = None
    ) -> None:
        """Step as LightningModule does, with the two passes told apart; called by the trainer."""
        igm = _unwrapped(optimizer)
        if not isinstance(igm, IGMOptimizer) or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        self._refuse_accumulation(igm)
        second = copy.copy(optimizer_closure)  # it keeps its own result: Lightning takes that of the first
        if getattr(second, "_zero_grad_fn", None) is not None:  # without on_before_zero_grad
            second._zero_grad_fn = partial(self.optimizer_zero_grad, epoch, batch_idx, optimizer)  # type: ignore[attr-defined]

        def first() -> Any:
            loss = optimizer_closure()
            if loss is None:
                raise _NoLoss
            return loss

        def step(closure: Closure) -> None:
            super(IGMMixin, self).optimizer_step(epoch, batch_idx, optimizer, closure)

        with suppress(_NoLoss):
            self._take_step(igm, step, first, second)

    def igm_step(self, closure: Closure | Sequence[Closure], optimizer: Any = None) -> Any:
        """Take one step in manual optimization, in any precision.

        Parameters
        ----------
        closure : callable or list of callable
            Clears the gradients, computes the loss, calls ``self.manual_backward(loss)`` and returns the loss. Of a
            list each computes the loss of one micro-batch, calls ``manual_backward`` and clears nothing; their
            gradients add up in each pass.
        optimizer : optional
            Which one of ``self.optimizers()``, where there are several.

        Returns
        -------
        Tensor
            The loss of the first pass; the sum of the losses of a list.

        Raises
        ------
        RuntimeError
            In automatic optimization.
        TypeError
            A closure that returns None; an optimizer that is none of igm-rs.
        ValueError
            Several optimizers and none named, or one that ``configure_optimizers`` did not return.
        """
        if self.automatic_optimization:
            raise RuntimeError("igm_step in automatic optimization, expected self.automatic_optimization = False")
        wrapper = self._lightning_optimizer(optimizer)
        igm = _unwrapped(wrapper)
        if not isinstance(igm, IGMOptimizer):
            raise TypeError(f"the optimizer of igm_step is a {type(igm).__name__}, expected an IGMOptimizer")
        whole = closure if callable(closure) else partial(_accumulate, igm, list(closure))
        losses: list[Any] = []

        def first() -> Any:
            losses.append(_checked(whole()))
            return losses[0]

        self._take_step(igm, wrapper.step, first, whole)
        return losses[0]

    def _take_step(self, igm: IGMOptimizer, step: Callable[[Closure], Any], first: Closure, second: Closure) -> None:
        """Step in Lightning's way, which ends in ``igm.step(closure)`` but for a scaler, where it has none."""
        precision: Any = self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)
        with self._passes(first, second) as closure:
            if scaler is None:
                step(closure)
                return
            passes: list[Any] = []  # the scaler unscales once for each optimizer between two updates, and hears of both

            def unscaled() -> Any:
                precision.scaler = scaler
                loss = closure()
                passes.append(_Gradients(igm))
                scaler.unscale_(passes[-1])
                return loss

            precision.scaler = None  # until Lightning has chosen its way
            try:
                step(unscaled)
                scaler.update()
            except BaseException:
                if passes:
                    scaler.update(scaler.get_scale())  # it forgets what it has heard, and scales as before
                raise
            finally:
                precision.scaler = scaler

    @contextmanager
    def _passes(self, first: Closure, second: Closure) -> Iterator[Closure]:
        """`first` and then `second` as one closure; from the second call to the end of the block nothing is logged."""
        calls = 0
        kept: list[tuple[nn.Module, dict[str, Any]]] = []

        def closure() -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return first()
            self.second_pass = True
            kept.extend(_lend_copies(self))
            return second()

        try:
            yield closure
        finally:
            self.second_pass = False
            for metric, state in kept:
                vars(metric).update(state)

    def _lightning_optimizer(self, optimizer: Any) -> Any:
        """The trainer's wrapper of `optimizer`, or of the only one."""
        there = self.optimizers()
        wrappers = there if isinstance(there, list) else [there]
        if optimizer is None and len(wrappers) == 1:
            return wrappers[0]
        for wrapper in wrappers:
            if optimizer is not None and _unwrapped(wrapper) is _unwrapped(optimizer):
                return wrapper
        found = "None" if optimizer is None else f"a {type(_unwrapped(optimizer)).__name__} of its own"
        raise ValueError(
            f"optimizer is {found}, expected one of the {len(wrappers)} that configure_optimizers returned"
        )

    def _refuse_accumulation(self, igm: IGMOptimizer) -> None:
        count = self.trainer.accumulate_grad_batches
        if count == 1:
            return
        groups = igm.param_groups
        rho = max([*igm.rho.values(), *(group.get("rho", 0) for group in groups)])
        projected = any(any(sources.values()) for sources in igm.pairs.values())
        tau = max([*igm.tau.values(), *(group.get("tau", 0) for group in groups)]) if projected else 0
        if rho > 0 or tau > 0:
            raise ValueError(
                f"accumulate_grad_batches is {count} with rho = {rho:g} and tau = {tau:g}, expected 1, since Lightning "
                "hands the optimizer the last micro-batch only; with manual optimization give self.igm_step a list of "
                "closures, one for each micro-batch"
            )


class _NoLoss(Exception):  # noqa: N818
    """``training_step`` returned None: the batch is skipped."""


class _Gradients:
    """The gradients of an optimizer under another identity."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups


def _unwrapped(optimizer: Any) -> Any:
    """What a LightningOptimizer is around; anything else itself."""
    return getattr(optimizer, "_optimizer", optimizer)


def _checked(loss: Any) -> Any:
    if loss is None:
        raise TypeError("closure returned None, expected the loss")
    return loss


def _accumulate(optimizer: IGMOptimizer, closures: list[Closure]) -> Any:
    """Gradients of all micro-batches, and the sum of their losses."""
    optimizer.zero_grad()
    return sum(loss.detach() if isinstance(loss := _checked(closure()), torch.Tensor) else loss for closure in closures)


def _lend_copies(module: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Give the metrics in `module` copies of their states to spoil; yield each with what it held."""
    for metric in module.modules():
        if isinstance(metric, Metric):
            held = dict(vars(metric))
            for name, value in held.items():
                if isinstance(value, (torch.Tensor, list)):
                    vars(metric)[name] = value.clone() if isinstance(value, torch.Tensor) else list(value)
            yield metric, held
