"""Control of IGM: the eigenvalues of T in a random basis, which has strength and wrong directions."""

from __future__ import annotations

from .base import method
from .igm import Igm

__all__ = ["ControlRandom"]


@method
class ControlRandom(Igm):
    """IGM whose T has its eigenvalues in a random orthogonal basis."""

    key = "control-random"
    label = "IGM, random basis for T"
    control = "random"
