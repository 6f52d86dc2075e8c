"""Turns with SAM: what of IGM's effect is SAM's."""

from __future__ import annotations

from .base import method
from .turns import Turns

__all__ = ["TurnsSam"]


@method
class TurnsSam(Turns):
    """Alternating turns; each step with SAM (Eqs. 7 and 8)."""

    key = "turns-sam"
    label = "turns + SAM"
    sam = True
