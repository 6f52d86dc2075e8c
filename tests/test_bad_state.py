"""State dicts that someone has damaged: each part is checked, told by name, and nothing has changed."""

import copy

import pytest
import torch
from models import batches, same, unchanged
from test_contract import TWO, build, snapshot, train, weights


def put(*path):
    """Return a function that sets the entry of a state dict's "igm" at `path[:-1]` to `path[-1]`."""
    *keys, last, value = path

    def damage(mine):
        for key in keys:
            mine = mine[key]
        mine[last] = value

    return damage


def drop(*path):
    *keys, last = path

    def damage(mine):
        for key in keys:
            mine = mine[key]
        del mine[last]

    return damage


COVARIANCE = "projection", "covariances", "audio", "audio.0", "present"
MADE = "projection", "projectors", "audio"
NAN = torch.eye(8, dtype=torch.float64) * float("nan")

TABLE = {
    "total of another width": (put(*COVARIANCE, "total", torch.zeros(9)), ("'total'", "audio.0", "(9,)", "(8,)")),
    "no total": (drop(*COVARIANCE, "total"), ("covariance of layer 'audio.0'", "'total'")),
    "count is text": (put(*COVARIANCE, "count", "x"), ("'count'", "'x'", "number >= 0")),
    "more summed than there is": (put(*COVARIANCE, "summed", 10**6), ("'summed'", "1000000", "from 0 to")),
    "summed is text": (put(*COVARIANCE, "summed", "x"), ("'summed'", "'x'", "integer")),
    "count below zero": (put(*COVARIANCE, "count", -1.0), ("'count'", "-1.0", "number >= 0")),
    "rows of another width": (put(*COVARIANCE, "rows", torch.zeros(2, 3)), ("width 3", "audio.0", "expected 8")),
    "matrix with a NaN": (put(*COVARIANCE, "matrix", NAN), ("'matrix'", "NaN", "finite")),
    "present is None": (put(*COVARIANCE[:-1], "present", None), ("covariance", "None", "mapping")),
    "covariances are a list": (put("projection", "covariances", [1]), ("modalities", "expected ['audio', 'video']")),
    "no singular values": (drop(*MADE, "audio.0", "singular_values"), ("projector of layer 'audio.0'", "'singular_v")),
    "fewer singular values": (
        put(*MADE, "audio.0", "singular_values", torch.zeros(3)),
        ("'singular_values'", "(3,)", "(8,)"),
    ),
    "a projector is None": (put(*MADE, "audio.0", "factor", [None]), ("projector of layer 'audio.0'", "None")),
    "no factor": (drop(*MADE, "audio.0", "factor"), ("projector of layer 'audio.0'", "'factor'")),
    "a factor of two": (put(*MADE, "audio.0", "factor", [1, 2]), ("factor of layer 'audio.0'", "[1, 2]", "(R, M, c)")),
    "rows of a factor of another width": (
        put(*MADE, "audio.0", "factor", [torch.zeros(2, 7), None, 1.0]),
        ("width 7 for layer 'audio.0'", "expected 8"),
    ),
    "a core that does not fit": (
        put(*MADE, "audio.0", "factor", [torch.zeros(2, 8), torch.zeros(3, 3), 1.0]),
        ("'core' of layer 'audio.0'", "width 3", "expected 2"),
    ),
    "a scale that is infinite": (
        put(*MADE, "audio.0", "factor", [torch.zeros(2, 8), None, float("inf")]),
        ("scale of layer 'audio.0'", "inf", "finite number"),
    ),
    "a report is None": (put(*MADE, "audio.0", "report", None), ("report of layer 'audio.0'", "None", "mapping")),
    "gathered is None": (put("projection", "gathered", "audio", None), ("gathered of 'audio'", "None")),
    "summed of an unknown layer": (put("projection", "summed", "audio", {"x": 1}), ("summed of 'audio'", "['x']")),
    "another control": (put("projection", "control", "random"), ("control='random'", "expected None")),
    "another combine": (put("projection", "combine", "sum"), ("combine='sum'", "expected 'product'")),
    "with biases": (put("projection", "augment_bias", True), ("augment_bias=True", "expected False")),
    "no control": (drop("projection", "control"), ("projection has no 'control'",)),
    "an entry is None": (put(*MADE, "audio.0", None), ("projector of layer 'audio.0'", "None", "mapping")),
    "an unknown layer": (put(*MADE, "zzz", {}), ("projectors of 'audio'", "zzz", "expected some of")),
    "projectors are None": (put(*MADE, None), ("projectors of 'audio'", "None")),
    "an unknown recursion": (put("projection", "recursions", "zzz", {}), ("recursions", "zzz")),
    "failures are None": (put("projection", "failures", None), ("failures", "None", "integer >= 0")),
    "turns below zero": (put("counters", "turns", -3), ("['turns']", "-3", "integer >= 0")),
    "turns are text": (put("counters", "turns", "3"), ("['turns']", "'3'", "integer >= 0")),
    "no steps": (drop("counters", "steps"), ("['steps']", "missing")),
    "since is text": (put("counters", "since", "audio", "x"), ("['since']", "'x'", "integer >= 0")),
    "started is a number": (put("counters", "started", "audio", 1), ("['started']", "1", "True or False")),
    "an unknown open turn": (put("counters", "open", "smell"), ("['open']", "'smell'", "'audio'")),
    "initial lr is text": (put("initial_lr", ["x"]), ("['initial_lr']", "['x']", "1 numbers")),
    "rho below zero": (put("rho", "audio", -1.0), ("['rho']", "-1.0", ">= 0")),
    "no counters": (drop("counters"), ("'counters'", "expected")),
    "counters are a list": (put("counters", []), ("['counters']", "list", "mapping")),
    "a newer version": (put("version", 99), ("version 99", "at most")),
}


@pytest.mark.parametrize("case", TABLE)
def test_damaged_state_is_refused_before_anything_changed(case):
    damage, words = TABLE[case]
    model, opt = build(tau=1.5)
    data = batches(TWO, 3)
    train(model, opt, data, 2)
    bad = copy.deepcopy(opt.state_dict())
    bad["param_groups"][0]["lr"] = 0.77
    for entry in bad["state"].values():
        entry["momentum_buffer"].fill_(7.0)
    damage(bad["igm"])
    before, state = weights(model), snapshot(opt)
    with pytest.raises(ValueError, match=r"\S+") as caught:
        opt.load_state_dict(bad)
    for word in words:
        assert word in str(caught.value)
    assert unchanged(model, before)
    assert same(state, opt.state_dict())
    train(model, opt, data, 1, start=2)
    assert not unchanged(model, before)
