"""Warnings that point at the user's own line, however deep in this package and in torch they come from."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

__all__ = ["warn"]

_OURS = (*(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)), contextlib.__file__)


def warn(message: str, category: type[Warning]) -> None:
    """Warn as if the innermost caller outside this package and torch had."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
