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
        opt._core.counters.open = None  # the step had no features: the turn is not to be finished
    return {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}


WAYS = {
    "modules": lambda m: {"audio": [m.audio_encoder, m.cls_a], "video": [m.video_encoder, m.cls_v]},
    "parameters": lambda m: {
        "audio": [*m.audio_encoder.parameters(), *m.cls_a.parameters()],
        "video": [*m.video_encoder.parameters(), *m.cls_v.parameters()],
    },
    "ModuleDict": lambda m: nn.ModuleDict(
        {"audio": nn.ModuleList([m.audio_encoder, m.cls_a]), "video": nn.ModuleList([m.video_encoder, m.cls_v])}
    ),
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
        sources={"audio": None, "video": None},
        rho=0.0,
    )
    assert not any(key.startswith("cls_v") for key in moved(opt, model, "audio"))


def test_heads_in_a_module_dict():
    model = OwnHeads()
    opt = IGMOptimizer(sgd(model), model.encoders, heads=model.heads)
    assert opt.pairs["audio"] == {"video": [("audio.0", "video.0"), ("audio.2", "video.2")]}


def test_heads_by_name_and_names_of_layers():
    model = Named()
    opt = IGMOptimizer(
        sgd(model), WAYS["modules"](model), heads={"audio": "cls_a", "video": [model.trunk, "cls_v"]}, model=model
    )
    # counted from the output: cls_a.2 (d = 6) and cls_v (d = 8) do not fit, cls_a.0 and the trunk do
    assert opt.pairs == {"audio": {"video": [("cls_a.0", "trunk")]}, "video": {"audio": [("trunk", "cls_a.0")]}}


def test_unlike_heads_share_their_deep_layers():
    """An image head with one more Linear in front, as for text and image in the paper."""
    model = OwnHeads()
    model.heads["video"].insert(0, nn.Linear(8, 8))
    opt = IGMOptimizer(sgd(model), **model.options() | {"heads": dict(model.heads)})
    assert opt.pairs["video"] == {"audio": [("video.1", "audio.0"), ("video.3", "audio.2")]}
    assert opt.pairs["audio"] == {"video": [("audio.0", "video.1"), ("audio.2", "video.3")]}


@pytest.mark.parametrize(
    ("scope", "layers"),
    [
        (0.0, []),
        (0.1, ["audio.1.2"]),
        (0.2, ["audio.1.2"]),  # 6·3 + 3 = 21 of 123 parameters
        (0.3, ["audio.1.0", "audio.1.2"]),  # + 8·6 + 6 = 75 of 123
        (0.62, ["audio.0.0", "audio.1.0", "audio.1.2"]),
        (1.0, ["audio.0.0", "audio.1.0", "audio.1.2"]),
    ],
)
def test_scope_takes_layers_from_the_output_backwards(scope, layers):
    model = OwnHeads(("audio",))
    spec = {"audio": [model.encoders["audio"], model.heads["audio"]]}
    assert sum(p.numel() for p in model.parameters()) == 123
    share = 21 / 123 if scope == 0.2 else scope
    opt = IGMOptimizer(sgd(model), spec, scope=share)
    assert [layer.name for layer in opt._core.projection.layers["audio"]] == layers


def test_scope_passes_over_norm_layers_and_stops_before_what_it_cannot_project():
    model = OwnHeads(("audio",))
    model.encoders["audio"] = nn.Sequential(nn.ConvTranspose1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 8))
    model.heads["audio"].insert(1, nn.LayerNorm(6))
    spec = {"audio": [model.encoders["audio"], model.heads["audio"]]}
    opt = IGMOptimizer(sgd(model), spec, scope=0.85, model=model)
    assert [layer.name for layer in opt._core.projection.layers["audio"]] == [
        "encoders.audio.2",
        "heads.audio.0",
        "heads.audio.3",
    ]
    with pytest.raises(
        ValueError,
        match=r"scope=1.0 takes in layer 'encoders\.audio\.0', a ConvTranspose1d, which cannot be projected: expected "
        "Linear, Conv1d",
    ):
        IGMOptimizer(sgd(model), spec, scope=1.0, model=model)


def test_scope_needs_modules():
    model = OwnHeads()
    spec = {name: list(model.encoders[name].parameters()) for name in TWO}
    with pytest.raises(ValueError, match=r"scope needs the modules of 'audio'"):
        IGMOptimizer(sgd(model), spec, scope=0.5)


def test_sources_are_told_by_name():
    names = ("audio", "video", "text")
    model = OwnHeads(names)
    assert IGMOptimizer(sgd(model), **model.options()).sources == {
        "audio": ["text"],
        "video": ["audio"],
        "text": ["video"],
    }
    assert IGMOptimizer(sgd(model), **model.options(), sources="others").sources["video"] == ["text", "audio"]
    one_sided = {"audio": None, "video": "audio", "text": ["audio", "video"]}
    assert IGMOptimizer(sgd(model), **model.options(), sources=one_sided).sources == {
        "audio": [],
        "video": ["audio"],
        "text": ["audio", "video"],
    }


def test_rho_and_tau_of_a_group_win():
    """The first layer's group has its own: its T is made with its tau, its share of ε* with its rho."""
    model = OwnHeads().double()
    first = [model.heads[n][0].weight for n in TWO]
    rest = [p for p in model.parameters() if all(p is not q for q in first)]
    base = torch.optim.SGD([{"params": first, "tau": 5.0, "rho": 0.1}, {"params": rest}], lr=0.1)
    opt = IGMOptimizer(base, **model.options(), tau=1.0, rho=0.01)
    data = batches(TWO, 2)
    before = {}

    def closure():
        loss = closure_for(opt, model, "audio", data["audio"][0])()
        if before:
            length = {
                key: ((p - before[key]).norm() / before[key + "/grad"].norm()).item()
                for key, p in model.named_parameters()
                if p.grad is not None
            }
            ratios.update(length)
        else:
            for key, p in model.named_parameters():
                if p.grad is not None:
                    before[key], before[key + "/grad"] = p.detach().clone(), p.grad.clone()
        return loss

    ratios = {}
    with opt.turn("audio"):
        opt.step(closure)
    assert ratios["heads.audio.0.weight"] == pytest.approx(10 * ratios["heads.audio.2.weight"], rel=1e-6)
    lowest = {key: torch.linalg.eigvalsh(t).min().item() for key, t in opt.projectors["audio"].items()}
    assert lowest["audio.0"] == pytest.approx(torch.tensor(-5.0).exp().item(), rel=1e-6)
    assert lowest["audio.1"] == pytest.approx(torch.tensor(-1.0).exp().item(), rel=1e-6)


def test_added_group_is_shared_and_trained():
    model, extra = OwnHeads(), nn.Linear(2, 2)
    opt = IGMOptimizer(sgd(model), **model.options(), rho=0.0)
    opt.add_param_group({"params": extra.parameters(), "lr": 0.5})
    assert opt.base.param_groups is opt.param_groups
    before = extra.weight.detach().clone()
    extra(torch.ones(1, 2)).sum().backward()
    with opt.turn("video"):
        opt.step()
        opt._core.counters.open = None  # no features were seen: the turn is not to be finished
    torch.testing.assert_close(extra.weight, before - 0.5)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        opt.add_param_group({"params": extra.parameters()})


def test_shared_head_parameters_belong_to_every_turn():
    model = SharedHead()
    opt = IGMOptimizer(sgd(model), model.options()["modalities"], head=model.head, rho=0.0)
    assert {"head.weight", "head.bias"} <= moved(opt, model, "audio") & moved(opt, model, "video")
