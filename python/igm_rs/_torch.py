"""Imports torch, then the extension; says clearly when torch is missing, is another version, or the build is slow."""

from __future__ import annotations

import re
import warnings
from importlib import metadata

__all__: list[str] = []


def _wanted() -> str:
    """Return the torch version that this package was built for, as its metadata pins it."""
    for requirement in metadata.requires("igm-rs") or []:
        found = re.match(r"torch\s*==\s*([\w.]+)", requirement)
        if found:
            return found.group(1)
    return "unknown"


try:
    import torch  # noqa: F401  (its libraries must be loaded before the extension, which has no path to them)
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        f"igm_rs needs torch {_wanted()}, and no torch is installed: pip install torch=={_wanted()}"
    ) from None

from . import _igm_rs  # noqa: E402  (raises ImportError naming both versions for another torch)

if _igm_rs.DEBUG:
    warnings.warn(
        "igm_rs was built without optimisation and is many times slower: build it with `pip install .` or "
        "`maturin develop --release`",
        RuntimeWarning,
        stacklevel=2,
    )
