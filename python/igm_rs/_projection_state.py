"""Covariances and projectors in state dicts: what is saved, the check of what is given, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ._checks import is_number
from ._covariance import Covariance
from ._layers import Layer
from ._projection import Made, Projection, ProjectionOptions, Recursion

__all__ = ["check", "load", "state"]

_OPTIONS = ("projector", "features", "control", "combine", "augment_bias")
"""What a state must agree with; states of version 2 and older have the first two, and were made with no other."""

_SINCE_3 = frozenset({"control", "combine", "augment_bias", "gathered", "summed"})


def state(projection: Projection) -> dict[str, Any]:
    """Return tensors and plain values for a state dict."""
    return {option: getattr(projection.options, option) for option in _OPTIONS} | {
        "covariances": {
            name: {
                layer: {"past": turns.past.state(), "present": turns.present.state()} for layer, turns in mine.items()
            }
            for name, mine in projection.covariances.items()
        },
        "projectors": _states(projection.made),
        "gathered": _states(projection.gathered),
        "summed": _states(projection.summed),
        "recursions": {
            name: {"projector": one.projector, "updates": dict(one.updates), "restart": one.restart}
            for name, one in projection.recursions.items()
        },
        "failures": projection.failures,
    }


def check(projection: Projection, saved: Mapping[str, Any]) -> None:
    """Raise ValueError, naming both sides, unless `saved` is of the same options, modalities, layers, widths."""
    old = not _SINCE_3 & saved.keys()
    missing = [key for key in state(projection) if key not in saved and not (old and key in _SINCE_3)]
    if missing:
        raise ValueError(f"the state dict's projection has no {missing[0]!r}, expected what state_dict() returned")
    for option in _OPTIONS:
        found = saved.get(option, getattr(ProjectionOptions, option))
        if found != getattr(projection.options, option):
            raise ValueError(
                f"the state dict is of {option}={found!r}, expected {getattr(projection.options, option)!r}"
            )
    mine = {name: {layer.name: layer for layer in layers} for name, layers in projection.layers.items()}
    covariances = saved["covariances"]
    if not isinstance(covariances, Mapping) or list(covariances) != list(mine):
        raise ValueError(f"the state dict is of modalities {list(covariances)}, expected {list(mine)}")
    for name, layers in mine.items():
        if set(covariances[name]) != set(layers):
            raise ValueError(
                f"the state dict projects layers {sorted(covariances[name])} of {name!r}, expected {sorted(layers)}"
            )
        shapes = {label: (layer.groups, projection.width(layer)) for label, layer in layers.items()}
        for label, shape in shapes.items():
            where = f"layer {label!r} of {name!r}"
            halves = _parts(f"the covariance of {where}", covariances[name][label], {"past", "present"})
            for part in halves.values():
                _check_covariance(where, part, shape)
        for key in ("projectors", *(() if old else ("summed", "gathered"))):
            mine_of_it = saved[key].get(name) if isinstance(saved[key], Mapping) else None
            if not isinstance(mine_of_it, Mapping) or not set(mine_of_it) <= set(layers):
                raise ValueError(
                    f"the state dict's {key} of {name!r} are {_shown(mine_of_it)}, expected some of {sorted(layers)}"
                )
            for label, one in mine_of_it.items():
                where = f"layer {label!r} of {name!r}"
                (_check_covariance if key == "gathered" else _check_made)(where, one, shapes[label])
    widths = {layer.name: projection.width(layer) for layers in projection.layers.values() for layer in layers}
    recursions = _parts("the recursions", saved["recursions"], set(projection.recursions))
    for label, one in recursions.items():
        _parts(f"the recursion of layer {label!r}", one, {"projector", "updates", "restart"})
        if one["projector"] is not None:
            d = widths[label]
            _check_tensor(f"layer {label!r}", "projector", one["projector"], (d, d))
    if type(saved["failures"]) is not int or saved["failures"] < 0:
        raise ValueError(f"the state dict's failures are {saved['failures']!r}, expected an integer >= 0")


def load(projection: Projection, saved: Mapping[str, Any]) -> None:
    """Take over what :func:`state` gave; tensors keep their own precision and go to their layer's device."""
    layers: dict[str, Layer] = {layer.name: layer for mine in projection.layers.values() for layer in mine}
    devices = {label: layer.weight.device for label, layer in layers.items()}
    for name, mine in projection.covariances.items():
        for label, turns in mine.items():
            turns.past.load(saved["covariances"][name][label]["past"], devices[label])
            turns.present.load(saved["covariances"][name][label]["present"], devices[label])
        for key, into in (("projectors", projection.made), ("summed", projection.summed)):
            found = saved.get(key, {}).get(name, {})
            into[name] = {label: Made.of(one, devices[label]) for label, one in found.items()}
        projection.gathered[name] = {}
        for label, one in saved.get("gathered", {}).get(name, {}).items():
            covariance = projection.gathered[name][label] = mine[label].empty()
            covariance.load(one, devices[label])
    for label, one in saved["recursions"].items():
        projector = one["projector"]
        if projector is not None:
            projector = projector.detach().to(devices[label], copy=True)
        projection.recursions[label] = Recursion(projector, dict(one["updates"]), one["restart"])
    projection.failures = saved["failures"]
    projection.changed()


def _states(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {layer: one.state() for layer, one in mine.items()} for name, mine in entries.items()}


def _check_made(layer: str, one: Any, shape: tuple[int, int]) -> None:
    """Raise ValueError unless `one` is a T of this shape, (groups, d)."""
    groups, d = shape
    dense = (d, d) if groups == 1 else (groups, d, d)
    if isinstance(one, Mapping) and "projector" in one:  # of version 2 and older
        _parts(f"the projector of {layer}", one, {"projector", "singular_values"})
        _check_tensor(layer, "projector", one["projector"], dense)
    else:
        _parts(f"the projector of {layer}", one, {"factor", "singular_values", "report"})
        factor, report = one["factor"], one["report"]
        if not isinstance(factor, (list, tuple)) or len(factor) not in (1, 3):
            raise ValueError(f"the factor of {layer} in the state dict is {_shown(factor)}, expected (T,) or (R, M, c)")
        if len(factor) == 1:
            _check_tensor(layer, "projector", factor[0], dense)
        else:
            rows, core, scale = factor
            _check_tensor(layer, "rows", rows, (None, d))
            if core is not None:
                _check_tensor(layer, "core", core, (rows.shape[0], rows.shape[0]))
            if not is_number(scale):
                raise ValueError(f"the scale of {layer} in the state dict is {scale!r}, expected a finite number")
        if not isinstance(report, Mapping):
            raise ValueError(f"the report of {layer} in the state dict is {report!r}, expected a mapping")
    values = one["singular_values"]
    if values is not None:
        several = [(d,), (2,)] if groups == 1 else [(groups, d)]
        if not isinstance(values, torch.Tensor) or tuple(values.shape) not in several:
            raise ValueError(
                f"'singular_values' of {layer} in the state dict is {_shown(values)}, expected a tensor of shape "
                f"{several[0]}"
            )
        _check_tensor(layer, "singular_values", values, tuple(values.shape))


def _check_covariance(layer: str, part: Any, shape: tuple[int, int]) -> None:
    groups, d = shape
    keys = set(Covariance(d).state())
    if isinstance(part, Mapping) and "summed" not in part:  # of version 2 and older
        keys.remove("summed")
    _parts(f"the covariance of {layer}", part, keys)
    if part["rows"] is not None:
        _check_tensor(layer, "rows", part["rows"], (None, groups * d))
    if part["matrix"] is not None:
        _check_tensor(layer, "matrix", part["matrix"], (d, d) if groups == 1 else (groups, d, d))
    total = part["total"]
    if total is not None and not (
        isinstance(total, torch.Tensor) and total.shape == (groups * d,) and not total.is_meta
    ):
        raise ValueError(
            f"'total' of {layer} in the state dict is {_shown(total)}, expected a tensor of shape {(groups * d,)}"
        )
    most = 0 if part["rows"] is None else part["rows"].shape[0]
    summed = part.get("summed", 0)
    if not isinstance(summed, int) or not 0 <= summed <= most:
        raise ValueError(
            f"'summed' of {layer} in the state dict is {summed!r}, expected an integer from 0 to {most}, the rows"
        )
    for key in ("count", "left_out"):
        if not is_number(part[key]) or part[key] < 0:
            raise ValueError(f"{key!r} of {layer} in the state dict is {part[key]!r}, expected a number >= 0")


def _check_tensor(layer: str, key: str, tensor: Any, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless what a state dict holds of a layer has this shape (None: any size) and holds numbers."""
    where = f"{key!r} of {layer} in the state dict"
    if tensor is None:
        raise ValueError(f"the {key} of {layer} in the state dict is None, expected a tensor")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{where} is a {type(tensor).__name__}, expected a tensor")
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        width = tensor.shape[-1] if tensor.ndim else 0
        raise ValueError(f"the state dict has width {width} for {layer}, expected {shape[-1]}: {where}")
    if any(size not in (None, found) for size, found in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{where} has the shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{where} is {tensor.dtype}, expected a real floating dtype")
    if tensor.is_meta:
        raise ValueError(f"{where} is on meta, expected a tensor that holds numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where} holds a NaN or an infinity, expected finite numbers")


def _parts(what: str, found: Any, keys: set[str]) -> Mapping[str, Any]:
    """Return `found` if it is a mapping with these keys; ValueError otherwise."""
    if not isinstance(found, Mapping) or set(found) != keys:
        raise ValueError(f"{what} in the state dict is {_shown(found)}, expected a mapping with {sorted(keys)}")
    return found


def _shown(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a mapping with {sorted(map(str, found))}"
    if isinstance(found, torch.Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    return repr(found)
