"""The packages of the extra ``igm-rs[experiments]``, and what is said where one is missing."""

from __future__ import annotations

__all__ = ["PACKAGES", "what_to_install"]

PACKAGES = ("matplotlib", "tensorboard", "tomli", "torchmetrics", "tqdm")


def what_to_install(missing: ModuleNotFoundError) -> str:
    """Return one line that says what to install; an error about any other package is raised again."""
    package = str(missing.name).split(".")[0]
    if package not in PACKAGES:
        raise missing
    return f"error: the experiments need {package}: pip install 'igm-rs[experiments]'"
