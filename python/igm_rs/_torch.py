"""Imports torch, then the extension; says clearly when torch is missing, is another version, or the build is slow."""

from __future__ import annotations

import re
import warnings
from importlib import metadata

__all__: list[str] = []


def _wanted() -> str:
    """Return the torch version that this package was built for, as its metadata pins it."""
    try:
        requirements = metadata.requires("igm-rs") or []
    except metadata.PackageNotFoundError:  # on the path, but not installed
        requirements = []
    pins = (re.match(r"torch\s*==\s*([\w.]+)", requirement) for requirement in requirements)
    return next((f"torch=={pin.group(1)}" for pin in pins if pin), "torch")


try:
    import torch  # noqa: F401  (its libraries must be loaded before the extension, which has no path to them)
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(f"igm_rs needs {_wanted()}, and no torch is installed: pip install {_wanted()}") from None

from . import _igm_rs  # noqa: E402  (raises ImportError naming both versions for another torch)

if _igm_rs.DEBUG:
    warnings.warn(
        "igm_rs was built without optimisation and is many times slower: build it with `pip install .` or "
        "`maturin develop --release`",
        RuntimeWarning,
        stacklevel=2,
    )
