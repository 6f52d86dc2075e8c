"""Control of the shared trunk: the eigenvalues of T in a random basis."""

from __future__ import annotations

from .base import method
from .igm_shared import IgmShared

__all__ = ["SharedRandom"]


@method
class SharedRandom(IgmShared):
    """The shared trunk whose T has its eigenvalues in a random orthogonal basis."""

    key = "shared-random"
    label = "shared trunk, random basis for T"
    control = "random"
