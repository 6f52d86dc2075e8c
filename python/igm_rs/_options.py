"""The options of projection, checked together: which values each has, and which fit one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _checks
from ._projection import ProjectionOptions

__all__ = ["projection_options"]

_ALPHA = {"orthogonal": 0.1, "ridge": 30.0, "null_space": 10.0}
"""α where none is given: of MLA; of the middle of the range that keeps shared parameters; of Adam-NSCL."""


def projection_options(
    *, covariance: Any, alpha: Any, batches: Any, pairing: Any, seed: Any, **given: Any
) -> ProjectionOptions:
    """Return the options, checked; the names are those of :class:`igm_rs.IGMOptimizer`.

    Raises
    ------
    ValueError, TypeError
        An option out of its range, or one that the chosen projector has no use for.
    """
    projector = _checks.choice(
        "projector", given["projector"], ("flat", "ridge", "null_space", "orthogonal", "identity")
    )
    control = given["control"]
    if control is not None:
        _checks.choice("control", control, ("random", "scalar"))
    if not isinstance(pairing, Mapping):
        _checks.choice("pairing", pairing, ("position", "name", "shape"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r} ({type(seed).__name__}), expected an integer")
    options = ProjectionOptions(
        projector=projector,
        control=control,
        seed=seed,
        features=_checks.choice("features", given["features"], ("mean", "samples", "centred")),
        life=_checks.life(covariance, projector),
        route=_checks.choice("route", given["route"], ("auto", "svd", "eigh", "gram", "polynomial")),
        alpha=_ALPHA.get(projector, 0.0) if alpha is None else _checks.positive("alpha", alpha),
        batches=None if batches is None else _checks.positive_integer("batches", batches),
        normalise=_checks.flag("normalise", given["normalise"]),
        pairing=pairing,
        combine=_checks.choice("combine", given["combine"], ("product", "sum")),
        augment_bias=_checks.flag("augment_bias", given["augment_bias"]),
    )
    if projector == "null_space" and options.alpha < 1:
        raise ValueError(f"alpha is {alpha!r} with projector='null_space', expected a finite number >= 1")
    unused = {
        "alpha": alpha is not None and projector not in _ALPHA,
        "batches": batches is not None and projector != "orthogonal",
        "normalise": options.normalise and projector != "orthogonal",
        "control": control is not None and projector in ("orthogonal", "identity"),
        "seed": seed != 0 and control != "random",
        "route": options.route != "auto" and projector in ("orthogonal", "identity"),
        "features": options.features == "centred" and projector == "orthogonal",
        "combine": options.combine == "sum" and projector in ("orthogonal", "identity"),
    }
    values = {"alpha": alpha, "control": control, "seed": seed}
    for name, wasted in unused.items():
        if wasted:
            raise ValueError(
                f"{name} is {values.get(name, getattr(options, name))!r} with projector={projector!r}"
                f"{', control=' + repr(control) if name == 'seed' else ''}, which has no use for it"
            )
    if options.route == "polynomial" and (projector != "flat" or control is not None):
        raise ValueError(
            f"route is 'polynomial' with projector={projector!r}, control={control!r}, expected 'auto', 'gram', 'eigh' "
            "or 'svd': these need the eigenvalues"
        )
    return options
