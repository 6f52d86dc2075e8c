"""IGM without SAM: what of its effect is the flat modification's."""

from __future__ import annotations

from .base import method
from .turns import Turns

__all__ = ["IgmNoSam"]


@method
class IgmNoSam(Turns):
    """Alternating turns; the heads' gradients are modified by the T of the modality before (Eq. 9)."""

    key = "igm-no-sam"
    label = "IGM without SAM"
    modifies = True
