"""IGM, the paper's Algorithm 1: turns, SAM, flat modification of the heads."""

from __future__ import annotations

from .base import method
from .igm_no_sam import IgmNoSam

__all__ = ["Igm"]


@method
class Igm(IgmNoSam):
    """Alternating turns with SAM; gradients at the perturbed weights are modified by T (Eqs. 7 to 9)."""

    key = "igm"
    label = "IGM"
    sam = True
