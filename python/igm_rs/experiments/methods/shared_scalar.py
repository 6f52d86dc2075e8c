"""Control of the shared trunk: T replaced by its mean eigenvalue."""

from __future__ import annotations

from .base import method
from .igm_shared import IgmShared

__all__ = ["SharedScalar"]


@method
class SharedScalar(IgmShared):
    """The shared trunk whose T is the mean of its eigenvalues times I."""

    key = "shared-scalar"
    label = "shared trunk, mean eigenvalue for T"
    control = "scalar"
