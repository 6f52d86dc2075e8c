"""Bad input: class and message of every refusal, and that nothing has changed before it."""

import copy
import math

import pytest
import torch
from models import OwnHeads, SharedHead, batches, closure_for
from torch import nn
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer

TWO = ("audio", "video")


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1} | kwargs))


def make(model=None, **options):
    model = OwnHeads() if model is None else model
    return IGMOptimizer(sgd(model), **(model.options() | options))


NUMBERS = [
    (-0.1, ValueError, "finite number >= 0"),
    (math.nan, ValueError, "finite number >= 0"),
    (math.inf, ValueError, "finite number >= 0"),
    ("0.1", TypeError, "expected a number"),
    (True, TypeError, "expected a number"),
]


@pytest.mark.parametrize(("value", "error", "expected"), NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["rho", "tau", "lr"])
def test_hyper_parameters(name, value, error, expected):
    with pytest.raises(error) as caught:
        if name == "lr":
            IGMOptimizer(OwnHeads().parameters(), lr=value)
        else:
            make(**{name: value})
    for part in (f"{name} is {value!r}", expected):
        assert part in str(caught.value)


@pytest.mark.parametrize(("value", "error", "expected"), NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["rho", "tau"])
@pytest.mark.parametrize("where", ["modality", "group", "added group"])
def test_hyper_parameters_by_modality_and_group(name, value, error, expected, where):
    model, extra = OwnHeads(), nn.Linear(2, 2)
    with pytest.raises(error, match=expected) as caught:
        if where == "modality":
            make(model, **{name: {"audio": 0.1, "video": value}})
        elif where == "group":
            base = torch.optim.SGD([{"params": model.parameters(), name: value}], lr=0.1)
            IGMOptimizer(base, **model.options())
        else:
            make(model).add_param_group({"params": extra.parameters(), name: value})
    assert f"{name}['video'] is" in str(caught.value) or f"{name} of a parameter group is" in str(caught.value)


OPTIONS = [
    ({"sources": "next"}, ValueError, ["sources", "next", "previous"]),
    ({"sources": {"audio": None}}, ValueError, ["sources", "video"]),
    ({"sources": {"audio": "text", "video": None}}, ValueError, ["text", "audio", "video"]),
    ({"projector": "ridge"}, ValueError, ["projector is 'ridge'", "'flat'", "'orthogonal'"]),
    ({"features": "max"}, ValueError, ["features is 'max'", "'mean'", "'samples'", "'centred'"]),
    ({"covariance": "old"}, ValueError, ["covariance is 'old'", "'fresh'", "'kept'"]),
    ({"covariance": 1.5}, ValueError, ["covariance is 1.5", "(0, 1)"]),
    ({"covariance": 0.0}, ValueError, ["covariance is 0.0", "> 0"]),
    ({"covariance": 0.5, "projector": "orthogonal"}, ValueError, ["covariance is 0.5", "'orthogonal'"]),
    ({"refresh": "epoch"}, ValueError, ["refresh is 'epoch'", "'turn'", "'manual'"]),
    ({"refresh": 0}, ValueError, ["refresh is 0", "integer >= 1"]),
    ({"refresh": 1.5}, TypeError, ["refresh is 1.5", "integer >= 1"]),
    ({"project": "weights"}, ValueError, ["project is 'weights'", "'gradient'", "'update'"]),
    ({"route": "qr"}, ValueError, ["route is 'qr'", "'auto'", "'eigh'", "'svd'"]),
    ({"reset": ("weights",)}, ValueError, ["reset is 'weights'", "'momentum'", "'lr'"]),
    ({"alpha": 0.0}, ValueError, ["alpha is 0.0", "> 0"]),
    ({"batches": 0}, ValueError, ["batches is 0", "integer >= 1"]),
    ({"batches": 2.0}, TypeError, ["batches is 2.0", "integer >= 1"]),
    ({"normalise": 1}, TypeError, ["normalise is 1", "True or False"]),
    ({"rho": {"audio": 0.1}}, ValueError, ["rho has no value for 'video'"]),
    ({"tau": {"audio": 0.1, "video": 0.1, "text": 1}}, ValueError, ["tau names 'text'", "'audio'", "'video'"]),
    ({"scope": 1.5, "heads": None}, ValueError, ["scope is 1.5", "[0, 1]"]),
    ({"scope": 0.5}, ValueError, ["heads, head and scope", "at most one"]),
    ({"lr": 0.1}, TypeError, ["lr given with a ready base optimizer"]),
    ({"base": torch.optim.Adam}, TypeError, ["base given with a ready base optimizer"]),
    ({"modalities": {}}, ValueError, ["modalities is empty"]),
    ({"modalities": ["audio"]}, TypeError, ["modalities is a list", "mapping"]),
    ({"modalities": {"": nn.Linear(1, 1)}}, ValueError, ["non-empty string"]),
    ({"modalities": {"audio": [], "video": []}}, ValueError, ["modalities['audio'] is empty"]),
    ({"modalities": {"audio": nn.Tanh()}}, ValueError, ["modalities['audio'] is empty", "trainable parameter"]),
    ({"modalities": {"audio": [3]}}, TypeError, ["modalities['audio'][0] is a int", "module"]),
    ({"modalities": {"audio": 3}}, TypeError, ["modalities['audio'] is a int", "module"]),
    ({"modalities": {"audio": "encoder"}}, ValueError, ["prefix 'encoder'", "model="]),
    ({"heads": [nn.Linear(1, 1)]}, TypeError, ["heads is a list", "head="]),
    ({"heads": {"audio": nn.Linear(1, 1)}}, ValueError, ["not held by the base"]),
    ({"heads": {"text": nn.Linear(1, 1)}}, ValueError, ["'text'", "'audio', 'video'"]),
    ({"heads": {"audio": 3, "video": 3}}, TypeError, ["heads['audio'] is a int", "module"]),
    ({"heads": {"audio": "cls", "video": "cls"}}, ValueError, ["heads['audio'] is the name 'cls'", "model="]),
    ({"heads": {"audio": nn.Tanh(), "video": nn.Tanh()}}, ValueError, ["'audio' (Tanh)", "no layer to project"]),
]


@pytest.mark.parametrize(("options", "error", "expected"), OPTIONS, ids=str)
def test_options(options, error, expected):
    with pytest.raises(error) as caught:
        make(**options)
    for part in expected:
        assert part in str(caught.value)


def test_base_that_is_no_base():
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"base is 'SGD', expected a class of torch\.optim\.Optimizer"):
        IGMOptimizer(layer.parameters(), base="SGD", lr=0.1)
    with pytest.raises(TypeError, match="the base optimizer is a LBFGS"):
        IGMOptimizer(torch.optim.LBFGS(layer.parameters()))
    with pytest.raises(TypeError, match="the base optimizer is a IGMOptimizer"):
        IGMOptimizer(IGMOptimizer(layer.parameters(), lr=0.1))


def test_parameter_that_the_base_does_not_hold():
    model, lost = OwnHeads(), nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"parameter modalities\['video'\]\[1\]\.weight of modality 'video', shape \(2, 2\)"
    ):
        IGMOptimizer(sgd(model), {"audio": model.encoders["audio"], "video": [model.encoders["video"], lost]})
    with pytest.raises(
        ValueError, match=r"parameter heads\['video'\]\.weight of modality 'video'.*not held by the base"
    ):
        make(model, heads={"audio": model.heads["audio"], "video": lost})
    shared = SharedHead()
    with pytest.raises(ValueError, match=r"the weight of projected layer 'head' \(d = 2\).*not held by the base"):
        IGMOptimizer(sgd(shared), shared.options()["modalities"], head=lost)


def test_frozen_parameters_need_not_be_held():
    model = OwnHeads()
    model.encoders["audio"].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert IGMOptimizer(torch.optim.SGD(trained, lr=0.1), **model.options()).modalities == TWO
    model.heads["audio"][0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer 'audio\.0' whose weight is frozen"):
        IGMOptimizer(sgd(model), **model.options())


def test_heads_with_no_layer_in_common():
    model = OwnHeads()
    model.heads["audio"] = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    model.heads["video"] = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="no layer in common") as caught:
        make(model)
    for part in ("'audio' and 'video' have no layer in common", "'audio.0' (d = 8)", "'video.1' (d = 6)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(8, 8, 3), nn.Embedding(8, 8), nn.LSTM(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("how", ["heads", "scope"])
def test_layers_that_cannot_be_projected_are_refused_by_name(layer, how):
    model = OwnHeads()
    for name in TWO:
        model.heads[name].insert(1, copy.deepcopy(layer))
    options = {"heads": dict(model.heads)} if how == "heads" else {"heads": None, "scope": 1.0}
    with pytest.raises(ValueError, match=r"layer .*\b1'"):
        make(model, **options)


def test_unknown_modality():
    opt = make()
    for call in (opt.turn, opt.collect):
        with pytest.raises(ValueError, match="modality is 'text', expected one of 'audio', 'video'"), call("text"):
            pass
    for call in (opt.refresh, opt.spectrum):
        with pytest.raises(ValueError, match="modality is 'text', expected one of 'audio', 'video'"):
            call("text")


def test_turn_inside_turn():
    opt = make()
    with opt.turn("audio"):
        with pytest.raises(RuntimeError, match=r"turn\('video'\) inside turn\('audio'\)"), opt.turn("video"):
            pass
        with pytest.raises(RuntimeError, match=r"collect\('video'\) inside turn\('audio'\)"), opt.collect("video"):
            pass
    with opt.collect("audio"):
        with pytest.raises(RuntimeError, match=r"collect\('video'\) inside another collect"), opt.collect("video"):
            pass


@pytest.mark.parametrize("with_closure", [False, True])
def test_step_outside_any_turn_when_ambiguous(with_closure):
    model = OwnHeads()
    opt = make(model)
    before = copy.deepcopy(model.state_dict())
    data = batches(TWO, 1, torch.float32)

    def closure():
        opt.zero_grad()
        loss = sum(cross_entropy(model(n, data[n][0][0]), data[n][0][1]) for n in TWO)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="'audio' and 'video' of 'audio', 'video' has gradients of its own"):
        if with_closure:
            opt.step(closure)
        else:
            closure()
            opt.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_shared_parameters_alone_tell_no_modality():
    model = SharedHead()
    opt = IGMOptimizer(sgd(model), model.options()["modalities"], head=model.head, rho=0.0)
    model.head(torch.ones(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="no modality of 'audio', 'video' has gradients of its own"):
        opt.step()
    with opt.turn("audio"):
        opt.step()
    assert opt.last_stats["active"] == "audio"


def test_zero_gradients_of_the_others_are_not_ambiguous():
    model = OwnHeads()
    opt = make(model, rho=0.0)
    closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0])()
    for p in model.encoders["video"].parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.last_stats["active"] == "audio"


def test_no_gradient_at_all_is_no_step():
    model = OwnHeads()
    opt = make(model)
    before = copy.deepcopy(model.state_dict())
    opt.step(lambda: torch.zeros(()))
    with opt.turn("audio"):
        opt.step(lambda: torch.zeros(()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (opt.turns, opt.skipped_steps) == (0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_features_are_left_out_counted_and_warned(value):
    """The loss does not depend on the poisoned sample, the features do."""
    model = OwnHeads()
    opt = make(model, tau=1.5, features="samples")
    x, y = batches(TWO, 1, torch.float32)["audio"][0]

    def closure(poison):
        opt.zero_grad()
        z = model.encoders["audio"](x)
        if poison:
            z = torch.cat([z, torch.full((1, 8), value)])
        loss = cross_entropy(model.heads["audio"](z)[: len(y)], y)
        loss.backward()
        for p in model.heads["audio"].parameters():
            p.grad.nan_to_num_(0, 0, 0)
        return loss

    with opt.turn("audio"):
        opt.step(lambda: closure(poison=False))
        with pytest.warns(RuntimeWarning, match="2 rows of features of 'audio' held a NaN or an infinity"):
            opt.step(lambda: closure(poison=True))
    covariances = opt.covariances["audio"]
    assert all(torch.isfinite(c).all() for c in covariances.values())
    assert all(torch.isfinite(t).all() for t in opt.projectors["audio"].values())
    assert opt.state_dict()["igm"]["projection"]["covariances"]["audio"]["audio.0"]["present"]["left_out"] == 1


def test_all_zero_features_give_the_identity():
    model = OwnHeads()
    opt = make(model, tau=1.5, heads={n: model.heads[n][0] for n in TWO})
    with torch.no_grad():
        model.encoders["audio"][0].weight.zero_()
        model.encoders["audio"][0].bias.zero_()
    model.encoders["audio"].requires_grad_(False)
    opt = IGMOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        {n: [model.encoders[n], model.heads[n]] for n in TWO},
        heads={n: model.heads[n][0] for n in TWO},
    )
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
    assert torch.equal(opt.projectors["audio"]["audio"], torch.eye(8))


@pytest.mark.cuda
def test_model_on_another_device_than_its_projectors():
    model = OwnHeads()
    opt = make(model, tau=1.5)
    data = batches(TWO, 2, torch.float32)
    for name in TWO:
        with opt.turn(name):
            opt.step(closure_for(opt, model, name, data[name][0]))
    model.cuda()
    x, y = (t.cuda() for t in data["audio"][0])
    with opt.turn("audio"), pytest.raises(ValueError, match=r"cuda.*cpu|cpu.*cuda"):
        opt.step(closure_for(opt, model, "audio", (x, y)))


def test_state_dict_of_another_model():
    model = OwnHeads()
    opt = make(model, tau=1.5)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
    before = copy.deepcopy(opt.state_dict())
    wide, three, plain = OwnHeads(width=9), OwnHeads(("audio", "video", "text")), nn.Linear(2, 2)
    wider = make(wide)
    with wider.turn("audio"):
        wider.step(closure_for(wider, wide, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
    others = [
        (wider, r"width 9 for layer 'audio\.0.*expected 8"),
        (make(three), r"modalities \['audio', 'video', 'text'\], expected \['audio', 'video'\]"),
        (make(OwnHeads(), heads=None), r"projects layers \[\] of 'audio', expected \['audio\.0"),
        (IGMOptimizer(plain.parameters(), lr=0.1), r"modalities \['all'\], expected \['audio', 'video'\]"),
    ]
    for other, message in others:
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(torch.optim.SGD(plain.parameters(), lr=0.1).state_dict())
    newer = copy.deepcopy(before)
    newer["igm"]["version"] = 99
    with pytest.raises(ValueError, match=r"igm version 99, expected at most 1: it was saved by a newer igm-rs"):
        opt.load_state_dict(newer)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["igm"]["counters"] == before["igm"]["counters"]


def test_load_inside_the_turn_of_another_modality():
    model = OwnHeads()
    opt = make(model)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
        saved = copy.deepcopy(opt.state_dict())
    with opt.turn("video"), pytest.raises(RuntimeError, match=r"load_state_dict inside turn\('video'\).*'audio'"):
        opt.load_state_dict(saved)


def test_steps_whose_features_were_never_seen_are_an_error_not_a_silence():
    """The head is bypassed: its weight is used without its forward."""
    model = SharedHead()
    opt = IGMOptimizer(sgd(model), model.options()["modalities"], head=model.head)
    x, y = batches(TWO, 1, torch.float32)["audio"][0]

    def closure():
        opt.zero_grad()
        z = model.encoders["audio"](x)
        loss = cross_entropy(nn.functional.linear(z, model.head.weight, model.head.bias), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"'audio' took 2 steps and its projected layer 'head' \(d = 8\) saw no"):
        with opt.turn("audio"):
            opt.step(closure)
            opt.step(closure)


def test_perturbation_below_the_resolution_is_warned_once_with_the_figure():
    model = OwnHeads()
    opt = make(model, rho=1e-9)
    data = batches(TWO, 3, torch.float32)["audio"]
    with opt.turn("audio"):
        with pytest.warns(
            UserWarning, match="rho = 1e-09 is below the resolution of the weights: the realised perturbation has"
        ):
            opt.step(closure_for(opt, model, "audio", data[0]))
        opt.step(closure_for(opt, model, "audio", data[1]))
    assert opt.last_stats["moved"] < 0.5
