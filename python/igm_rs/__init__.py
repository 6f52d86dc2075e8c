"""IGM for PyTorch: modalities in turns, sharpness-aware steps, flat-projected gradients (IJCAI 2025)."""

from . import (
    _torch,  # noqa: F401  (imports torch, and refuses another one than this was built for, before anything else)
    fusion,
    released,
)
from ._igm_rs import __version__
from .optimizer import IGMOptimizer
from .released import Released
from .stats import StepStats

__all__ = ["IGMOptimizer", "Released", "StepStats", "__version__", "fusion", "released"]
