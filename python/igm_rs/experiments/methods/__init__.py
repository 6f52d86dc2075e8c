"""The methods that are compared, one file with one class each; a user's own joins them by ``@method``."""

from . import (
    control_random,
    control_scalar,
    igm,
    igm_no_sam,
    igm_one_sided,
    igm_shared,
    joint_concat,
    joint_sum,
    mla,
    mla_three_layer,
    released,
    sam,
    shared_frozen,
    shared_plain,
    shared_random,
    shared_scalar,
    single,
    turns,
    turns_sam,
)
from .base import METHODS, Method, Row, Schedule, base_optimizer, control_options, keyed, method

__all__ = ["METHODS", "Method", "Row", "Schedule", "base_optimizer", "control_options", "keyed", "method"]

_ORDER = (
    *(single, joint_concat, joint_sum, sam, turns, turns_sam, mla, igm_no_sam, igm),
    *(igm_shared, shared_plain, shared_frozen, control_scalar, control_random, shared_scalar, shared_random),
    *(igm_one_sided, released, mla_three_layer),
)
"""The files in the order of the tables, whatever order they were imported in."""

for _file in _ORDER:
    for _key in [key for key, known in METHODS.items() if type(known).__module__ == _file.__name__]:
        METHODS[_key] = METHODS.pop(_key)
