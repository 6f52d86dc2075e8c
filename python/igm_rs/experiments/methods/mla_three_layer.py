"""MLA with the paper's three-layer head, one for all modalities, as Figure 5 (b) has it (its section 4.6)."""

from __future__ import annotations

from typing import ClassVar

from igm_rs.experiments.networks import Head

from .base import method
from .mla import Mla

__all__ = ["MlaThreeLayer"]


@method
class MlaThreeLayer(Mla):
    """MLA's training with one three-layer head for all modalities; the projection acts on all its layers."""

    key = "mla-three-layer"
    label = "MLA, three-layer head"
    head: ClassVar[Head] = "shared-three-layer"
