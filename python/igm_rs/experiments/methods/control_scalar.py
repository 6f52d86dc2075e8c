"""Control of IGM: T replaced by its mean eigenvalue, which has strength and no direction."""

from __future__ import annotations

from .base import method
from .igm import Igm

__all__ = ["ControlScalar"]


@method
class ControlScalar(Igm):
    """IGM whose T is the mean of its eigenvalues times I."""

    key = "control-scalar"
    label = "IGM, mean eigenvalue for T"
    control = "scalar"
