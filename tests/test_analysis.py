"""igm_rs.analysis: each figure's numbers by hand, nothing of the model or the training changed, pictures saved."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

import igm_rs
from igm_rs import analysis
from igm_rs.analysis import drawing, sweeps

TAU = 0.4


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    yield
    plt.close("all")


def identity(d=2):
    layer = nn.Linear(d, d, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(d))
    return layer


class Plane(nn.Module):
    """Two encoders that hand on what they are given, and a head: its gradient is the sum of its inputs."""

    def __init__(self, shared):
        super().__init__()
        self.encoders = nn.ModuleDict({"audio": identity(), "video": identity()})
        one = nn.Linear(2, 1, bias=False)
        self.heads = nn.ModuleDict({"audio": one, "video": one if shared else nn.Linear(2, 1, bias=False)})

    def loss(self, name):
        x = {"audio": [[1.0, 0.0]], "video": [[1.0, 1.0]]}[name]
        return self.heads[name](self.encoders[name](torch.tensor(x))).sum()

    def losses(self):
        return {name: lambda name=name: self.loss(name) for name in self.encoders}


def plane(*, shared, **options):
    model = Plane(shared)
    heads = {"head": model.heads["audio"]} if shared else {"heads": dict(model.heads)}
    settings = {"lr": 0.0, "rho": 0, "tau": TAU, **heads, **options}
    return model, igm_rs.IGMOptimizer(model.parameters(), dict(model.encoders), **settings)


def watched_steps(model, optimizer, watch, names=("audio", "video"), steps=1):
    for name in names:

        def closure(name=name):
            optimizer.zero_grad()
            loss = model.loss(name)
            loss.backward()
            return loss

        with optimizer.turn(name):
            for _ in range(steps):
                with watch.step(model.losses()):
                    optimizer.step(closure)


# ----------------------------------------------------------------------------------------------------------------------
# Figure 1


@pytest.mark.parametrize("shared", [True, False])
def test_cosines_of_a_plane_by_hand(shared):
    # g_audio = (1, 0), g_video = (1, 1); after audio's turn Ȳ = (1, 0)(1, 0)ᵀ, so T = diag(e^−τ, 1)
    model, optimizer = plane(shared=shared)
    watch = analysis.CosineWatch(model, optimizer)
    watched_steps(model, optimizer, watch)
    seen = watch.cosines
    damped = math.exp(-TAU)
    length = math.hypot(damped, 1)
    assert (seen.step, seen.active, seen.source) == ([1, 2], ["audio", "video"], ["video", "audio"])
    assert seen.projected == [False, True]
    assert seen.before == pytest.approx([math.sqrt(0.5)] * 2)
    assert seen.after == pytest.approx([math.sqrt(0.5), damped / length])
    assert seen.change == pytest.approx([1, (damped + 1) / (math.sqrt(2) * length)])
    result = analysis.gradient_cosines({"IGM": watch})
    assert result.median("IGM", "after") == pytest.approx(damped / length)  # of the projected step alone


def test_an_orthogonal_projection_leaves_nothing_of_the_old_direction():
    model, optimizer = plane(shared=True, projector="orthogonal", covariance="kept", alpha=1e-6)
    watch = analysis.CosineWatch(model, optimizer)
    watched_steps(model, optimizer, watch)
    assert watch.cosines.after[-1] == pytest.approx(0, abs=1e-5)
    assert watch.cosines.change[-1] == pytest.approx(math.sqrt(0.5), abs=1e-5)


def test_every_and_skipped_steps():
    model, optimizer = plane(shared=True)
    watch = analysis.CosineWatch(model, optimizer, every=2)
    watched_steps(model, optimizer, watch, names=("audio",), steps=5)
    assert watch.cosines.step == [1, 3, 5]

    def unusable():
        optimizer.zero_grad()
        loss = model.loss("audio") * float("nan")
        loss.backward()
        return loss

    model, optimizer = plane(shared=True)
    watch = analysis.CosineWatch(model, optimizer)
    with optimizer.turn("audio"), watch.step(model.losses()):
        optimizer.step(unusable)
    assert len(watch.cosines) == 0


def test_layers_of_other_shapes_are_not_compared_but_their_change_is():
    model, optimizer = plane(shared=False)
    model.heads["video"] = nn.Linear(2, 3, bias=False)
    optimizer = igm_rs.IGMOptimizer(model.parameters(), dict(model.encoders), heads=dict(model.heads), lr=0.0, rho=0)
    watch = analysis.CosineWatch(model, optimizer)
    watched_steps(model, optimizer, watch)
    assert all(map(math.isnan, watch.cosines.before + watch.cosines.after))
    assert watch.cosines.change[0] == pytest.approx(1)
    result = analysis.gradient_cosines(watch)
    assert result.median("training") is None
    assert "no layers of one shape" in result.draw().texts[0].get_text()


class Noisy(nn.Module):
    """With BatchNorm and dropout, which a second look could disturb."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({name: self._encoder() for name in ("audio", "video")})
        self.head = nn.Linear(6, 3)
        self.x = {name: torch.randn(12, 5) for name in self.encoders}
        self.y = torch.arange(12) % 3

    def _encoder(self):
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))

    def loss(self, name):
        return cross_entropy(self.head(self.encoders[name](self.x[name])), self.y)

    losses = Plane.losses


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_watching_changes_nothing_of_the_training():
    ends = []
    for looks in (True, False):
        torch.manual_seed(3)
        model = Noisy()
        optimizer = igm_rs.IGMOptimizer(model.parameters(), dict(model.encoders), head=model.head, lr=0.1)
        watch = analysis.CosineWatch(model, optimizer)
        if looks:
            watched_steps(model, optimizer, watch, names=("audio", "video") * 2, steps=2)
            assert len(watch.cosines) == 8
        else:
            steps(model, optimizer, ("audio", "video") * 2, 2)
        ends.append((model.state_dict(), optimizer.state_dict(), torch.get_rng_state(), model.training))
    assert same(*ends)


def steps(model, optimizer, names, count):
    for name in names:
        with optimizer.turn(name):
            for _ in range(count):
                optimizer.step(lambda name=name: backward(model, optimizer, name))


def backward(model, optimizer, name):
    optimizer.zero_grad()
    loss = model.loss(name)
    loss.backward()
    return loss


def test_watch_refuses():
    model, optimizer = plane(shared=True)
    with pytest.raises(TypeError, match=r"^optimizer is a SGD, expected an IGMOptimizer$"):
        analysis.CosineWatch(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"^every is 0, expected an integer"):
        analysis.CosineWatch(model, optimizer, every=0)
    bare = igm_rs.IGMOptimizer(model.parameters(), dict(model.encoders), lr=0.1)
    with pytest.raises(ValueError, match=r"^optimizer projects no layer, expected one with heads, head or scope"):
        analysis.CosineWatch(model, bare)
    update = plane(shared=True, project="update")
    with pytest.raises(ValueError, match=r"^optimizer has project='update', expected 'gradient'"):
        analysis.CosineWatch(*update)
    watch = analysis.CosineWatch(model, optimizer)
    with pytest.raises(ValueError, match=r"^losses has no 'video', expected one for each of audio, video$"):
        with optimizer.turn("audio"), watch.step({"audio": lambda: model.loss("audio")}):
            pass
    with pytest.raises(RuntimeError, match=r"^2 steps were taken inside CosineWatch.step, expected one$"):
        with optimizer.turn("audio"), watch.step(model.losses()):
            for _ in range(2):
                optimizer.step(lambda: backward(model, optimizer, "audio"))
    with pytest.raises(RuntimeError, match=r"is gone after the step, expected no zero_grad\(\) before the end of"):
        with optimizer.turn("audio"), watch.step(model.losses()):
            optimizer.step(lambda: backward(model, optimizer, "audio"))
            optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"^watches is empty, expected one entry or more$"):
        analysis.gradient_cosines({})
    with pytest.raises(ValueError, match=r"^watches: 'IGM' has seen no step with a source, expected one or more$"):
        analysis.gradient_cosines({"IGM": analysis.CosineWatch(model, optimizer)})
    with pytest.raises(ValueError, match=r"^which is 'both', expected one of 'before', 'after', 'change'$"):
        analysis.Cosines().of("both")


def test_steps_without_a_projector_have_no_modified_gradient():
    seen = analysis.Cosines([1, 2], ["b", "b"], ["a", "a"], [0.5, 0.4], [0.5, 0.4], [1.0, 1.0], [False, False])
    found = analysis.GradientCosines({"early": seen})
    assert (found.median("early", "before"), found.median("early", "after")) == (0.45, None)
    assert "no T acted in these steps" in [text.get_text() for text in found.draw(which="after").texts]
    assert "no layers of one shape to compare" not in [text.get_text() for text in found.draw(which="before").texts]


# ----------------------------------------------------------------------------------------------------------------------
# Figure 4


def test_surface_of_a_square_by_hand():
    # one weight, 2: its filter is itself, so both directions are +2 or -2, and the bias stays
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(7.0)
    surface = analysis.loss_surface(
        model, lambda: model.weight.square().sum() + model.bias.sum(), span=0.5, points=5, progress=False
    )
    offsets = np.array([-0.5, -0.25, 0.0, 0.25, 0.5])
    assert surface.offsets == pytest.approx(offsets)
    candidates = [4 * (1 + s * offsets[:, None] + t * offsets[None, :]) ** 2 + 7 for s in (1, -1) for t in (1, -1)]
    assert any(np.allclose(surface.losses, each, rtol=1e-6) for each in candidates)
    assert surface.centre == 11
    distance, mean, low, high = surface.profile()
    assert distance == pytest.approx([0, 0.25, 0.5])
    assert mean[0] == low[0] == high[0] == 0
    # at 0.25: 4(1 ± 0.25)² − 4 twice each, and the four corners of that ring: 4(1 + 0.5)² − 4, 4(0.5)² − 4, 0, 0
    assert mean[1] == pytest.approx(np.mean([2.25, 2.25, -1.75, -1.75, 5, -3, 0, 0]))
    assert (low[1], high[1]) == pytest.approx((-3, 5))


def test_each_filter_moves_by_its_own_length():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    before = copy.deepcopy(model.state_dict())
    seen = []
    analysis.loss_surface(
        model, lambda: seen.append(copy.deepcopy(model.state_dict())) or 0.0, points=3, span=1, progress=False
    )
    moved = seen[1]  # -1 along the first direction, 0 along the second
    for name in ("0.weight", "3.weight"):
        length = (moved[name] - before[name]).flatten(1).norm(dim=1)
        assert torch.allclose(length, before[name].flatten(1).norm(dim=1), rtol=1e-5)
    for name in set(before) - {"0.weight", "3.weight"}:
        assert torch.equal(moved[name], before[name])


def test_surface_does_not_depend_on_how_scale_is_spread_over_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    surfaces = []
    for factor in (1.0, 16.0):
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[2].weight.div_(factor)
        surfaces.append(analysis.loss_surface(model, lambda: cross_entropy(model(x), y), points=3, progress=False))
    assert surfaces[0].losses == pytest.approx(surfaces[1].losses, rel=1e-9)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [None, RuntimeError, KeyboardInterrupt])
def test_model_is_as_before_to_the_bit(mode, fails):
    torch.manual_seed(1)
    model = Noisy()
    model.encoders["audio"].eval()
    optimizer = igm_rs.IGMOptimizer(model.parameters(), dict(model.encoders), head=model.head, lr=0.1)
    watched_steps(model, optimizer, analysis.CosineWatch(model, optimizer))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    places = [each.data_ptr() for each in model.state_dict().values()]
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    calls = []

    def loss():
        calls.append([module.training for module in model.modules()])
        if fails and len(calls) == 5:
            raise fails
        if len(calls) == 4:  # a careless loss
            model.encoders["audio"][1].running_mean = torch.ones(6)
        return model.loss("audio") + model.loss("video")

    if fails:
        with pytest.raises(fails):
            analysis.loss_surface(model, loss, points=3, mode=mode, progress=False)
    else:
        analysis.loss_surface(model, loss, points=3, mode=mode, progress=False)
        assert len(calls) == 9
    assert all(each == [mode == "train"] * len(modes) for each in calls)
    assert same(model.state_dict(), before)
    assert [each.data_ptr() for each in model.state_dict().values()] == places
    assert same(optimizer.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes


def test_dropout_draws_the_same_mask_at_every_point():
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
    draws = []
    analysis.loss_surface(
        model, lambda: draws.append(model[1](torch.ones(40))) or 0.0, points=3, mode="train", progress=False
    )
    assert all(torch.equal(each, draws[0]) for each in draws)


def test_surface_refuses():
    model = nn.Linear(2, 2)
    loss = lambda: model(torch.ones(1, 2)).sum()  # noqa: E731
    for arguments, message in (
        ({"points": 4}, r"^points is 4, expected an odd number from 3: the weights themselves are in the middle$"),
        ({"points": 1}, r"^points is 1, expected an odd number from 3"),
        ({"span": 0}, r"^span is 0, expected a finite number > 0$"),
        ({"mode": "test"}, r"^mode is 'test', expected one of 'eval', 'train'$"),
    ):
        with pytest.raises(ValueError, match=message):
            analysis.loss_surface(model, loss, progress=False, **arguments)
    with pytest.raises(ValueError, match=r"^model has no weight of two or more dimensions, expected one or more"):
        analysis.loss_surface(nn.BatchNorm1d(3), loss, progress=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^loss gave a tensor of shape \(1, 2\), expected one number$"):
        analysis.loss_surface(model, lambda: model(torch.ones(1, 2)), points=3, progress=False)
    assert same(model.state_dict(), before)
    with pytest.raises(ValueError, match=r"^surfaces is empty, expected one entry or more$"):
        analysis.compare_surfaces({})


def test_several_runs_are_summed_up_by_distance():
    offsets = np.array([-1.0, 0.0, 1.0])
    flat, steep = (height * (offsets[:, None] ** 2 + offsets[None, :] ** 2) for height in (1, 3))
    runs = [analysis.LossSurface(offsets, losses, 0) for losses in (flat, steep)]
    found = analysis.compare_surfaces({"IGM": runs, "MLA": runs[1]})
    # the ring at 1 holds the four sides (height) and, as √2 rounds to 1, the four corners (twice the height)
    assert found.rise("IGM") == [1.5, 4.5]
    assert found.numbers()["IGM"]["mean_rise"] == pytest.approx([0, 3])
    assert found.levels()[0] == 0
    other = analysis.LossSurface(2 * offsets, flat, 0)
    with pytest.raises(ValueError, match=r"^surfaces differ in their offsets, expected the same span and points for"):
        analysis.compare_surfaces({"IGM": runs, "MLA": other})
    with pytest.raises(ValueError, match=r"^surfaces\['IGM'\] is empty, expected one entry or more$"):
        analysis.compare_surfaces({"IGM": []})


def test_contours_of_a_rise_begin_at_the_weights_and_are_no_finer_than_the_grid():
    offsets = np.linspace(-1, 1, 21)
    bowl = offsets[:, None] ** 2 + offsets[None, :] ** 2 + 0.3 * offsets[:, None]  # lowest beside the weights
    surface = analysis.LossSurface(offsets, bowl, 0)
    levels = analysis.compare_surfaces({"IGM": surface}).levels()
    highest = np.quantile(bowl, 0.98)
    assert levels[0] == 0
    assert levels[[1, -1]] == pytest.approx([highest / 40, highest])
    assert np.diff(np.log(levels[1:])) == pytest.approx(np.diff(np.log(levels[1:3]))[0])
    ax = surface.draw(rise=True)
    (filled, _) = ax.collections
    assert filled.levels == pytest.approx(levels)
    assert filled.extend == "both"  # lower than at the weights has a colour of its own
    own = surface.draw().collections[0]
    assert own.levels[0] == pytest.approx(bowl.min())
    assert own.extend == "max"


def test_a_surface_that_is_flat_or_runs_to_infinity_can_be_drawn(tmp_path):
    offsets = np.linspace(-1, 1, 3)
    for losses in (np.ones((3, 3)), np.full((3, 3), np.nan), np.array([[np.inf, 1, 2], [3, 1, 2], [np.nan, 4, 5]])):
        picture, text = analysis.LossSurface(offsets, losses, 0).save(tmp_path / "odd")
        assert picture.stat().st_size > 5_000
        assert "NaN" not in text.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3


def run_of(rho=0.05, tau=TAU):
    torch.manual_seed(0)
    model = Noisy().eval()
    optimizer = igm_rs.IGMOptimizer(model.parameters(), dict(model.encoders), head=model.head, lr=0.1, rho=rho, tau=tau)
    model.train()
    steps(model, optimizer, ("audio", "video", "audio"), 1)
    return optimizer


def test_an_inert_rho_is_seen():
    made = []

    def train(rho, repeat):
        made.append((rho, repeat))
        return {"accuracy": 0.5 + 0.1 * repeat, "MAP": 0.25}, run_of(rho=rho)

    found = analysis.sweep("rho", train, [0.05, 1e-15], repeats=2, progress=False)
    assert made == [(1e-15, 0), (1e-15, 1), (0.05, 0), (0.05, 1)]
    assert found.scores == {"accuracy": [[0.5, 0.6]] * 2, "MAP": [[0.25, 0.25]] * 2}
    inert, usable = found.effects["effective_perturbation"]
    assert inert == [0.0, 0.0]
    assert usable == pytest.approx([1, 1], abs=1e-4)
    assert found.effects["moved"][0] == [0.0, 0.0]
    assert found.inert() == [1e-15]
    numbers = found.numbers()
    assert numbers["mean_scores"]["accuracy"] == pytest.approx([0.55, 0.55])
    assert numbers["mean_effects"]["effective_perturbation"] == pytest.approx([0, 1], abs=1e-4)
    texts = [each.get_text() for each in found.draw().texts]
    assert texts == ["ρ is mostly lost in rounding here"]


def test_a_weak_tau_is_seen():
    found = analysis.sweep("tau", lambda tau, repeat: ({"accuracy": 0.5}, run_of(tau=tau)), [1e-3, 100], progress=False)
    weak, strong = (each[0] for each in found.effects["cosine"])
    assert weak == pytest.approx(1, abs=1e-6)
    assert strong < 0.995
    assert found.inert() == []
    assert not list(found.draw().texts)


def test_sweep_refuses():
    train = lambda value, repeat: ({"accuracy" if value < 1 else "MAP": 0.5}, run_of())  # noqa: E731
    for arguments, message in (
        (("lr", train), r"^parameter is 'lr', expected one of 'rho', 'tau'$"),
        (("rho", train, [0.0]), r"^values is 0.0, expected a finite number > 0$"),
        (("rho", train, []), r"^values is empty, expected one number or more$"),
        (("tau", train, [0.5, 2.0]), r"^train\(2, 0\) gave MAP, expected accuracy$"),
    ):
        with pytest.raises(ValueError, match=message):
            analysis.sweep(*arguments, progress=False)
    with pytest.raises(ValueError, match=r"^repeats is 0, expected an integer"):
        analysis.sweep("rho", train, repeats=0, progress=False)


def test_the_default_grids_hold_the_papers_range():
    assert (min(analysis.TAUS), max(analysis.TAUS), min(analysis.RHOS), max(analysis.RHOS)) == (1e-3, 100, 1e-15, 0.1)


def test_a_run_without_figures_has_a_picture_without_a_second_curve(tmp_path):
    none = {name: [[None], [None]] for name in ("effective_perturbation", "moved", "cosine")}
    found = analysis.Sweep("rho", [0.01, 0.1], {"accuracy": [[0.5], [0.6]]}, none)
    assert found.inert() == []
    assert found.save(tmp_path / "none")[0].exists()


# ----------------------------------------------------------------------------------------------------------------------
# Figure 5


def test_spectra_of_a_plane_by_hand():
    # the head sees (1, 0) in audio's turn, (1, 1) in video's: Ȳ has λ = (n, 0) and (2n, 0) after n steps
    model, optimizer = plane(shared=False)
    watched_steps(model, optimizer, analysis.CosineWatch(model, optimizer), steps=3)
    found = analysis.layer_spectra({"IGM": [optimizer, optimizer]})
    (audio,), (video,) = (found.mean["IGM"][name].values() for name in ("audio", "video"))
    assert audio == pytest.approx([1.5, 1.5])
    assert video == pytest.approx([3, 3])
    assert [each for layers in found.top_share["IGM"].values() for each in layers.values()] == [
        pytest.approx([1, 1])
    ] * 2


def test_spectra_of_layers_that_are_not_projected():
    model, _ = plane(shared=False)
    parts = {name: [model.encoders[name], model.heads[name]] for name in model.encoders}
    optimizer = igm_rs.IGMOptimizer(model.parameters(), parts, scope=1.0, lr=0.1)
    for name in parts:
        with optimizer.collect(name), torch.no_grad():
            model.loss(name)
    found = analysis.layer_spectra(optimizer)
    assert [len(layers) for layers in found.mean["training"].values()] == [2, 2]


def test_spectra_refuse():
    with pytest.raises(ValueError, match=r"^optimizers is empty, expected one entry or more$"):
        analysis.layer_spectra({})
    with pytest.raises(ValueError, match=r"^optimizers: 'IGM' has gathered no features, expected a turn or "):
        analysis.layer_spectra({"IGM": plane(shared=True)[1]})


def test_time_by_hand():
    found = analysis.TrainingTime({"SGD": [1.0, 2.0, 3.0], "IGM": [4.0, 5.0, 4.5]}, calls=10)
    assert found.median("SGD") == 20
    assert found.ratio("IGM") == 2.25
    assert found.numbers()["IGM"] == {
        "seconds": 45.0,
        "quartiles": [42.5, 47.5],
        "ratio": 2.25,
        "measured_calls": 3,
        "calls": 10,
    }


def test_methods_are_timed_in_turn(monkeypatch):
    clock, order = [0.0], []

    def step(label, seconds):
        order.append(label)
        clock[0] += seconds

    monkeypatch.setattr("igm_rs.analysis.timing.time.perf_counter", lambda: clock[0])
    found = analysis.training_time(
        {"SGD": lambda: step("SGD", 0.5), "IGM": lambda: step("IGM", 1.0)}, seconds=10, progress=False
    )
    assert found.seconds == {"SGD": [0.5] * 20, "IGM": [1.0] * 10}
    assert order[:2] == ["SGD", "IGM"]  # unmeasured
    assert order[2:8] == ["IGM", "SGD", "SGD", "SGD", "SGD", "IGM"]


def test_timing_refuses():
    with pytest.raises(ValueError, match=r"^steps is empty, expected one entry or more$"):
        analysis.training_time({})
    with pytest.raises(ValueError, match=r"^seconds is 0, expected a finite number > 0$"):
        analysis.training_time({"SGD": lambda: None}, seconds=0)
    with pytest.raises(ValueError, match=r"^calls is 0, expected a finite number > 0$"):
        analysis.training_time({"SGD": lambda: None}, calls=0)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def everything():
    model, optimizer = plane(shared=False)
    watch = analysis.CosineWatch(model, optimizer)
    watched_steps(model, optimizer, watch)
    surface = analysis.loss_surface(model, lambda: model.loss("audio").square(), points=5, progress=False)
    effects = {name: [[0.0], [1.0]] for name in ("effective_perturbation", "moved", "cosine")}
    return [
        analysis.gradient_cosines({"IGM": watch, "MLA": watch}),
        surface,
        analysis.compare_surfaces({"IGM": surface}),
        analysis.Sweep("rho", [1e-15, 0.1], {"accuracy": [[0.5], [0.6]]}, effects),
        analysis.layer_spectra({"IGM": optimizer, "IGM without SAM": optimizer}),
        analysis.TrainingTime({"SGD": [0.1], "IGM": [0.2]}),
    ]


@pytest.mark.parametrize("place", range(6))
def test_every_picture_is_drawn_labelled_and_saved_with_its_numbers(tmp_path, place):
    result = everything()[place]
    ax = Figure().subplots()
    assert result.draw(ax) is ax
    assert ax.get_xlabel()
    assert result.draw().figure.get_axes()[0].get_xlabel()
    picture, text = result.save(tmp_path / "new" / "figure-1.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 8_000
    assert (picture.name, text.name) == ("figure-1.png", "figure-1.json")
    assert json.loads(text.read_text(encoding="utf-8")) == drawing.plain(result.numbers())
    assert result.save(tmp_path / "figure-2")[1].name == "figure-2.json"


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pdf', expected one that ends in .png or has no ending$"):
        analysis.TrainingTime({"SGD": [0.1]}).save(tmp_path / "figure.pdf")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_has_no_word_for():
    assert drawing.plain({"a": np.array([1.0, np.nan]), 2: (np.inf, None, True, np.int64(3), "x")}) == {
        "a": [1.0, None],
        "2": [None, None, True, 3, "x"],
    }
    with pytest.raises(TypeError, match=r"^Tensor cannot be written as JSON, expected numbers, text, mappings or seq"):
        drawing.plain(torch.ones(2))


def test_looks_differ_in_colour_marker_and_line():
    looks = [drawing.look(place) for place in range(7)]
    assert all(len(set(map(str, each))) == 7 for each in zip(*looks, strict=True))
    assert drawing.look(7) == looks[0]


def test_importing_it_imports_neither_the_experiments_nor_matplotlib():
    code = (
        "import sys, igm_rs.analysis; print(sorted({'matplotlib', 'igm_rs.experiments', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("package", "act", "what"),
    [
        ("matplotlib.figure", lambda: analysis.TrainingTime({"SGD": [0.1]}).draw(), "drawing needs matplotlib"),
        ("matplotlib.figure", lambda: analysis.TrainingTime({"SGD": [0.1]}).save("x"), "drawing needs matplotlib"),
        ("tqdm", lambda: analysis.training_time({"SGD": int}), "progress=True needs tqdm"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package, act, what):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"^{what}: pip install 'igm-rs\[experiments\]'$"):
        act()


def test_progress_is_shown(capfd):
    model = nn.Linear(2, 1)
    analysis.loss_surface(model, lambda: 0.0, points=3)
    analysis.sweep("tau", lambda value, repeat: ({"accuracy": 0.5}, run_of(tau=value)), [0.1])
    analysis.training_time({"SGD": lambda: None}, seconds=0.01)
    err = capfd.readouterr().err
    assert all(words in err for words in ("loss surface: 100%", "trainings by tau: 100%", "timing: 100%"))
    assert sweeps.effects_of(run_of().last_stats)["moved"] > 0.9
