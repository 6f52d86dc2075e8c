"""Hugging Face's Trainer with IGMOptimizer: the second pass of a step recomputes the micro-batches of the first."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from igm_rs.optimizer import IGMOptimizer

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "igm_rs.integrations.transformers needs transformers and accelerate: pip install 'igm-rs[transformers]'"
    ) from error

__all__ = ["IGMTrainer", "IGMTrainerMixin"]

_Trainer: Any = object
"""What the mixin stands in front of: to a type checker a Trainer, of whichever class."""


class _Signals(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells a trainer when a training begins, when the gradients of a step are complete, and when the step is over."""

    def __init__(self, trainer: IGMTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._forget_micro_batches()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer._announce_second_pass()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer._abandon_skipped_step()


class IGMTrainerMixin(_Trainer):  # type: ignore[misc, unused-ignore]
    """Gives a ``transformers.Trainer`` sharpness-aware steps, and turns where its batches hold one modality each.

    The Trainer calls ``optimizer.step()`` without a closure, when the micro-batches of a step have been accumulated and
    their gradients clipped. The mixin keeps these micro-batches, and the optimizer computes them once more at the
    perturbed weights (Eq. 8), with the same loss, autocast, accumulation and clipping, which are the Trainer's own.
    The loss and the gradient norm that are logged are those of the first pass. Put it before the trainer's class:
    ``class MyTrainer(IGMTrainerMixin, Seq2SeqTrainer)``.

    Parameters
    ----------
    *args, **kwargs
        Of the Trainer.
    igm : mapping of str to object, optional
        Arguments of :class:`igm_rs.IGMOptimizer`, such as ``rho``, ``modalities``, ``heads`` and ``tau``. The optimizer
        is put around the one that the Trainer makes from its own arguments (``optim``, ``learning_rate``,
        ``weight_decay``, …) or was given. Modules may be named as in the model, which then need not exist yet. Left
        out where a ready IGMOptimizer is given in the Trainer's way: ``optimizers=(opt, None)`` or
        ``optimizer_cls_and_kwargs=(IGMOptimizer, {…})``.

    Raises
    ------
    TypeError
        `igm` is no mapping.
    ValueError
        `igm` is given with a ready IGMOptimizer; the arguments ask for FSDP or DeepSpeed, which leave a process a part
        of the gradient only.

    Notes
    -----
    *Clipping.* ``max_grad_norm`` of the Trainer's arguments clips the gradients of each pass, before the projection;
    that of the optimizer clips after it. What callbacks do to gradients in ``on_pre_optimizer_step`` is not repeated
    in the second pass.

    *Dropout.* With ``preserve_rng=True`` both passes draw the same masks.

    *Turns.* Where each batch holds one modality, its gradients tell which one steps, and consecutive steps of one
    modality are its turn: let the sampler yield the modalities in blocks (``train_sampling_strategy="sequential"``
    keeps the order of the data set).
    """

    def __init__(self, *args: Any, igm: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if igm is not None and not isinstance(igm, Mapping):
            raise TypeError(f"igm is a {type(igm).__name__}, expected a mapping of IGMOptimizer's arguments")
        self._igm = igm
        self._micro_batches: list[tuple[nn.Module, Any, Any, bool]] = []
        self._loss: torch.Tensor | float = 0.0
        super().__init__(*args, **kwargs)
        sharding = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else None
        if sharding is not None:
            raise ValueError(
                f"the arguments ask for {sharding}, expected whole gradients in each process, as one process or DDP has"
            )
        made_by = (self.optimizer_cls_and_kwargs or (None,))[0]
        ready = isinstance(self.optimizer, IGMOptimizer) or (
            isinstance(made_by, type) and issubclass(made_by, IGMOptimizer)
        )
        if ready and igm is not None:
            raise ValueError(
                f"igm is given with a ready IGMOptimizer, expected {', '.join(igm) or 'its arguments'} in the optimizer"
            )
        self.add_callback(_Signals(self))

    @property
    def igm_optimizer(self) -> IGMOptimizer:
        """The IGMOptimizer without Accelerate's wrapper, which hides ``last_stats``, ``turn`` and the rest.

        Raises
        ------
        RuntimeError
            Before the training, when there is none yet.
        """
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, IGMOptimizer):
            raise RuntimeError(
                f"the trainer's optimizer is a {type(optimizer).__name__}, expected an IGMOptimizer, which train() or "
                "create_optimizer() makes"
            )
        return optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Let the Trainer make its optimizer, and put an IGMOptimizer around it unless it is one.

        Parameters
        ----------
        model : torch.nn.Module, optional
            Whose parameters it takes; the Trainer's own model by default.

        Returns
        -------
        torch.optim.Optimizer
            What the Trainer keeps in ``optimizer``.
        """
        made: torch.optim.Optimizer = super().create_optimizer(model)
        if not isinstance(made, (IGMOptimizer, AcceleratedOptimizer)):
            options = {"model": self.model if model is None else model, **(self._igm or {})}
            self.optimizer = made = IGMOptimizer(made, **options)
        return made

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's own step on a micro-batch, which is kept for the second pass.

        Parameters
        ----------
        model, inputs, num_items_in_batch
            As for the Trainer.

        Returns
        -------
        torch.Tensor
            The loss at θ, without a graph.
        """
        if not self._micro_batches and self.igm_optimizer.preserve_rng:
            self.igm_optimizer.remember_rng()
        synchronised = getattr(model, "require_backward_grad_sync", True)  # False where DDP only accumulates
        self._micro_batches.append((model, inputs, num_items_in_batch, synchronised))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._loss = self._loss + loss
        return loss

    def _forget_micro_batches(self) -> None:
        """Drop what a training that stopped within an accumulation has left: its gradients are cleared too."""
        self._micro_batches, self._loss = [], 0.0

    def _announce_second_pass(self) -> None:
        """Tell the optimizer how to compute the gradients of the coming step again."""
        micro_batches, loss = self._micro_batches, self._loss
        self._forget_micro_batches()
        if micro_batches:
            scaler = self.accelerator.scaler
            self.igm_optimizer.replay(lambda: self._second_pass(micro_batches, scaler), scaler=scaler, loss=loss)

    def _abandon_skipped_step(self) -> None:
        """Drop second pass and features of a step that the scaler has not let through to the optimizer."""
        if self.igm_optimizer._core.replay is not None:
            self.igm_optimizer.forget_step()

    def _second_pass(
        self, micro_batches: list[tuple[nn.Module, Any, Any, bool]], scaler: GradScaler | None
    ) -> torch.Tensor | float:
        """Forward and backward of the same micro-batches, clipped as the Trainer clips; returns their loss."""
        model = micro_batches[0][0]
        model.zero_grad()
        total: torch.Tensor | float = 0.0
        for own_model, inputs, items, synchronised in micro_batches:
            with contextlib.nullcontext() if synchronised else self.accelerator.no_sync(own_model):
                total = total + super().training_step(own_model, inputs, items)
        if self.args.max_grad_norm > 0:
            if scaler is None:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            else:  # the optimizer unscales later, so the bound is scaled instead
                bound = self.args.max_grad_norm * scaler.get_scale()
                torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        return total


class IGMTrainer(IGMTrainerMixin, Trainer):  # type: ignore[misc, unused-ignore]
    """``transformers.Trainer`` with :class:`IGMTrainerMixin`, where the arguments are explained.

    Examples
    --------
    For a model and a data set as the Trainer takes them, AdamW with SAM::

        from transformers import TrainingArguments
        from igm_rs.integrations.transformers import IGMTrainer

        args = TrainingArguments("out", learning_rate=5e-5)
        trainer = IGMTrainer(model, args, train_dataset=data, igm={"rho": 0.05, "preserve_rng": True})
        trainer.train()
    """
