"""State dicts: what the optimizer saves, and the check of what it is given, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from . import _checks, _projection_state
from ._core import Core
from ._turns import Counters

__all__ = ["STATE_KEY", "check", "load", "own", "state"]

STATE_KEY = "igm"
"""The key, of a state dict and of its first group, under which everything that is not the base optimizer's stands."""

STATE_VERSION = 3

_NEW_COUNTERS = frozenset({"taken", "inert"})
"""Counters that a state dict of version 1 or 2 has not; they begin at 0."""

_OF_ONE_SHAPE = frozenset(
    {
        "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta",
        "sum", "prev", "step_size", "ax",
    }
)  # fmt: skip
"""Entries of torch's optimizers that have the shape of their parameter."""


def state(core: Core) -> dict[str, Any]:
    """Return counters, covariances, projectors and settings: tensors and plain values only."""
    return {
        "version": STATE_VERSION,
        "rho": dict(core.rho),
        "tau": dict(core.tau),
        "initial_lr": list(core.initial_lr),
        "provisional": core.provisional,
        "counters": core.counters.state(),
        "projection": _projection_state.state(core.projection),
    }


def own(state_dict: Any) -> Any:
    """Return our part of a state dict; None of a bare base optimizer's.

    torch.distributed.checkpoint keeps nothing but ``state`` and ``param_groups``, so it stands in the first group too,
    and counts there if the parameters go by their names, as in its state dicts: a bare base that has loaded ours
    carries it along, and trains on without it.
    """
    if STATE_KEY in state_dict:
        return state_dict[STATE_KEY]
    for group in state_dict["param_groups"][:1]:
        if all(isinstance(key, str) for key in group["params"]):
            return group.get(STATE_KEY)
    return None


def check(core: Core, state_dict: Any) -> None:
    """Raise TypeError or ValueError unless `state_dict` is one of this optimizer, or of its bare base.

    ValueErrors name the part, what it is, and what was expected. Nothing is changed.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}, expected what state_dict() returned")
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"state_dict has the keys {sorted(map(str, state_dict))}, expected 'state' and 'param_groups': it is no "
            "optimizer's"
        )
    _check_groups(core, state_dict)
    mine = own(state_dict)
    if mine is None:
        return
    if not isinstance(mine, Mapping):
        raise ValueError(f"state_dict[{STATE_KEY!r}] is {mine!r}, expected the mapping that state_dict() returned")
    if type(mine.get("version")) is not int:
        raise ValueError(
            f"state_dict[{STATE_KEY!r}]['version'] is {mine.get('version')!r}, expected an integer <= {STATE_VERSION}"
        )
    if mine["version"] > STATE_VERSION:
        raise ValueError(
            f"the state dict has igm version {mine['version']}, expected at most {STATE_VERSION}: it was saved by a "
            "newer igm-rs"
        )
    wanted = state(core)
    missing = [key for key in wanted if key not in mine and key != "provisional"]  # which version 1 has not
    if missing:
        raise ValueError(f"state_dict[{STATE_KEY!r}] has no {missing[0]!r}, expected {', '.join(map(repr, wanted))}")
    for key in ("rho", "tau"):
        _checks.per_modality(f"state_dict[{STATE_KEY!r}][{key!r}]", _mapping(mine, key), core.modalities.names)
    _check_counters(core, _mapping(mine, "counters"), frozenset() if mine["version"] > 2 else _NEW_COUNTERS)
    groups = len(state_dict["param_groups"])
    lrs = mine["initial_lr"]
    if not isinstance(lrs, list) or len(lrs) != groups or not all(map(_checks.is_number, lrs)):
        raise ValueError(
            f"state_dict[{STATE_KEY!r}]['initial_lr'] is {lrs!r}, expected {groups} numbers, one for each group"
        )
    _projection_state.check(core.projection, _mapping(mine, "projection"))


def load(core: Core, mine: Mapping[str, Any]) -> None:
    """Take over our part of a state dict that :func:`check` has passed."""
    names = core.modalities.names
    core.rho.assign(mine["rho"])
    core.tau.assign(mine["tau"])
    core.provisional = mine.get("provisional", False)
    core.initial_lr = list(mine["initial_lr"])
    core.counters.put_back(Counters.of(names, mine["counters"]))
    _projection_state.load(core.projection, mine["projection"])


def _mapping(mine: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(mine[key], Mapping):
        raise ValueError(f"state_dict[{STATE_KEY!r}][{key!r}] is a {type(mine[key]).__name__}, expected a mapping")
    return mine[key]  # type: ignore[no-any-return]


def _check_groups(core: Core, state_dict: Mapping[str, Any]) -> None:
    """Groups and state are those of parameters like ours: as many, and tensors of their shapes."""
    groups, mine = state_dict["param_groups"], core.base.param_groups
    if not isinstance(groups, Iterable) or not all(
        isinstance(group, Mapping) and "params" in group for group in groups
    ):
        raise ValueError("state_dict['param_groups'] is no list of groups, expected mappings with 'params'")
    found = [len(group["params"]) for group in groups]
    wanted = [len(group["params"]) for group in mine]
    if found != wanted:
        raise ValueError(f"the state dict is of groups of {found} parameters, expected {wanted}")
    _check_options(core.base, groups)
    entries = state_dict["state"]
    if not isinstance(entries, Mapping):
        raise ValueError(f"state_dict['state'] is a {type(entries).__name__}, expected a mapping")
    of_torch = type(core.base).__module__.startswith("torch.optim.")
    saved = [key for group in groups for key in group["params"]]
    params = [p for group in mine for p in group["params"]]
    for key, p in zip(saved, params, strict=True):
        entry = entries.get(key)
        if not isinstance(entry, Mapping):
            continue
        for name, value in entry.items():
            if not isinstance(value, torch.Tensor):
                continue
            where = f"the state dict has {name!r}"
            if of_torch and name in _OF_ONE_SHAPE and value.shape != p.shape:
                raise ValueError(
                    f"{where} of shape {tuple(value.shape)} for parameter {key!r}, expected {tuple(p.shape)}: it is "
                    "of another model"
                )
            if of_torch and name in _OF_ONE_SHAPE and not value.is_floating_point():
                raise ValueError(f"{where} of {value.dtype} for parameter {key!r}, expected a real floating dtype")
            if value.is_meta and not p.is_meta:
                raise ValueError(f"{where} on meta for parameter {key!r}, expected a tensor that holds numbers")


def _check_options(base: torch.optim.Optimizer, groups: Iterable[Mapping[str, Any]]) -> None:
    """Groups have the options of `base`, but for those that its class fills in where a state dict is older."""
    kind = type(base)
    filled = kind.__new__(kind)
    plain = [{key: value for key, value in group.items() if key != "params"} | {"params": []} for group in groups]
    kind.__setstate__(filled, {"defaults": dict(base.defaults), "state": {}, "param_groups": plain})
    for number, (group, live) in enumerate(zip(plain, base.param_groups, strict=True)):
        missing = [key for key in base.defaults if key in live and key not in group]
        if missing:
            raise ValueError(
                f"group {number} of the state dict has no {missing[0]!r}, expected the options of {kind.__name__}: it "
                "is of another kind of optimizer"
            )


def _check_counters(core: Core, counters: Mapping[str, Any], absent: frozenset[str]) -> None:
    """Every counter is there, but for those that may be `absent`, and is of its kind."""
    fresh = Counters(core.modalities.names).state()
    for key, usual in fresh.items():
        label = f"state_dict[{STATE_KEY!r}]['counters'][{key!r}]"
        if key not in counters:
            if key in absent:
                continue
            raise ValueError(f"{label} is missing")
        value = counters[key]
        if isinstance(usual, dict):
            kinds = {type(one) for one in usual.values()}
            if (
                not isinstance(value, Mapping)
                or set(value) != set(usual)
                or {type(one) for one in value.values()} != kinds
                or any(one < 0 for one in value.values())
            ):
                raise ValueError(f"{label} is {value!r}, expected {_kind(kinds)} for each of {list(usual)}")
        elif key == "open":
            if value is not None:
                core.modalities.check(value, label)
        elif type(value) is not type(usual) or value < 0:
            raise ValueError(f"{label} is {value!r}, expected {_kind({type(usual)})}")


def _kind(kinds: set[type]) -> str:
    return "True or False" if kinds == {bool} else "an integer >= 0"
