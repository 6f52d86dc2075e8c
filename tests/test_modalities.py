"""What belongs to whom: modules, lists, prefixes, shared parameters, heads, scope and the pairing of layers."""

import pytest
import torch
from models import OwnHeads, SharedHead, batches, closure_for
from torch import nn

from igm_rs import IGMOptimizer

TWO = ("audio", "video")


class Named(nn.Module):
    """Attributes as scripts have them, with a trunk that both modalities use."""

    def __init__(self):
        super().__init__()
        self.audio_encoder, self.video_encoder = nn.Linear(5, 8), nn.Linear(7, 8)
        self.trunk = nn.Linear(8, 8)
        self.cls_a, self.cls_v = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), nn.Linear(8, 3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def moved(opt, model, name):
    """Names of the parameters that a step in the turn of `name` moves when everything has a gradient."""
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with opt.turn(name):
        opt.step()
        opt._counters.open = None  # the step had no features: the turn is not to be finished
    return {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}


WAYS = {
    "modules": lambda m: {"audio": [m.audio_encoder, m.cls_a], "video": [m.video_encoder, m.cls_v]},
    "parameters": lambda m: {
        "audio": [*m.audio_encoder.parameters(), *m.cls_a.parameters()],
        "video": [*m.video_encoder.parameters(), *m.cls_v.parameters()],
    },
    "prefixes": lambda m: {"audio": ["audio_encoder", "cls_a."], "video": ["video_", "cls_v"]},
    "mixed": lambda m: {"audio": ["audio_encoder", m.cls_a], "video": [*m.video_encoder.parameters(), "cls_v"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_name_a_modality(way):
    model = Named()
    opt = IGMOptimizer(sgd(model), WAYS[way](model), model=model, rho=0.0)
    trunk = {"trunk.weight", "trunk.bias"}
    for name, own in (("audio", ("audio_encoder", "cls_a")), ("video", ("video_encoder", "cls_v"))):
        assert moved(opt, model, name) == trunk | {k for k, _ in model.named_parameters() if k.startswith(own)}


def test_prefixes_from_named_parameters_of_the_base():
    model = Named()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = IGMOptimizer(base, WAYS["prefixes"](model), rho=0.0)
    assert "trunk.weight" in moved(opt, model, "audio")
    assert "cls_v.weight" not in moved(opt, model, "audio")
    with pytest.raises(ValueError, match=r"the prefix 'sound', which fits no parameter name; names are audio_encoder"):
        IGMOptimizer(base, {"audio": "sound"})


def test_listed_under_several_moves_in_the_turn_of_each_that_lists_it():
    model = Named()
    spec = {
        "audio": [model.audio_encoder, model.trunk],
        "video": [model.video_encoder, model.trunk],
        "text": [model.cls_a],
    }
    opt = IGMOptimizer(sgd(model), spec, rho=0.0)
    assert {"trunk.weight", "trunk.bias"} <= moved(opt, model, "audio") & moved(opt, model, "video")
    assert moved(opt, model, "text") == {k for k, _ in model.named_parameters() if k.startswith(("cls_a", "cls_v"))}


def test_heads_belong_to_their_modality():
    model = Named()
    opt = IGMOptimizer(
        sgd(model),
        {"audio": model.audio_encoder, "video": model.video_encoder},
        heads={"audio": model.cls_a, "video": model.cls_v},
        rho=0.0,
    )
    assert not any(key.startswith("cls_v") for key in moved(opt, model, "audio"))


def test_heads_by_name_and_names_of_layers():
    model = Named()
    opt = IGMOptimizer(
        sgd(model), WAYS["modules"](model), heads={"audio": "cls_a", "video": [model.cls_v]}, model=model
    )
    # position from the output: cls_a.2 (d = 6) against cls_v (d = 8) does not fit, cls_a.0 has no partner
    assert opt.modalities == TWO
