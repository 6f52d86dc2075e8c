"""Cases that went wrong once: interrupts at bad moments, one module under two names, conversions, foreign states."""

import copy
import threading
import time
import warnings

import pytest
import torch
from models import OwnHeads, SharedHead, batches, closure_for, unchanged
from torch import nn
from torch.nn.functional import cross_entropy

import igm_rs
from igm_rs import IGMOptimizer

TWO = ("audio", "video")
DATA = batches(TWO, 6)


def make(kind=OwnHeads, base=None, **options):
    torch.manual_seed(0)
    model = kind().double()
    mine = model.options()
    if kind is SharedHead:
        mine = {"modalities": mine["modalities"], "head": model.head}
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if base is None else base(model.parameters())
    return model, IGMOptimizer(base, **(mine | options))


def step(model, opt, name, t):
    return opt.step(closure_for(opt, model, name, DATA[name][t]))


@pytest.mark.parametrize("kernel", ["perturb_", "restore_"])
def test_interrupt_right_after_the_kernel_of_first_step(monkeypatch, kernel):
    """The signal arrives when the kernel has returned and Python has noted nothing yet."""
    model, opt = make()
    before = [p.detach().clone() for p in model.parameters()]
    cross_entropy(model("audio", DATA["audio"][0][0]), DATA["audio"][0][1]).backward()
    usual = getattr(igm_rs._igm_rs, kernel)

    def interrupted(*args, **kwargs):
        usual(*args, **kwargs)
        monkeypatch.setattr(igm_rs._igm_rs, kernel, usual)
        raise KeyboardInterrupt

    monkeypatch.setattr(igm_rs._igm_rs, kernel, interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.first_step()
    assert unchanged(model, before)
    opt.first_step()
    opt.second_step()
    assert not unchanged(model, before)


def test_a_failing_update_projection_takes_the_whole_step_back(monkeypatch):
    model, opt = make(project="update", tau=1.5)
    for name in TWO:
        with opt.turn(name):
            step(model, opt, name, 0)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def broken(*_args):
        calls.append(1)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(igm_rs._igm_rs, "project_update_", broken)
    with opt.turn("audio"), pytest.raises(RuntimeError, match="no such kernel"):
        step(model, opt, "audio", 1)
    assert calls
    assert unchanged(model, before)


def test_what_fails_after_a_fused_step_does_not_take_the_weights_back_alone():
    """A warning that is an error, about features left out: no step is taken, in weights and momentum alike."""
    model, opt = make(tau=1.5, features="samples", base=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    x, y = DATA["audio"][0]

    def closure():
        opt.zero_grad()
        z = torch.cat([model.encoders["audio"](x), torch.full((1, 8), float("nan"), dtype=torch.float64)])
        loss = cross_entropy(model.heads["audio"](z)[: len(y)], y)
        loss.backward()
        for p in model.heads["audio"].parameters():
            p.grad.nan_to_num_(0, 0, 0)
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with opt.turn("audio"), pytest.raises(RuntimeWarning, match="were left out"):
        opt.step(closure)
    assert unchanged(model, before)
    assert not opt.state
    assert opt.state_dict()["igm"]["counters"]["steps"] == 0


def test_interrupt_while_batchnorm_is_being_held(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {"a": model})
    usual = opt._core.statistics.hold

    def interrupted():
        usual()
        raise KeyboardInterrupt

    monkeypatch.setattr(opt._core.statistics, "hold", interrupted)
    x = torch.randn(5, 3)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert model[1].track_running_stats
    assert model[2].track_running_stats
    assert not opt._core.tap.muted


@pytest.mark.parametrize("how", ["heads", "heads twice", "scope"])
def test_one_module_under_two_modalities_is_one_layer(how):
    model = SharedHead().double()
    if how == "scope":
        spec = {n: [model.encoders[n], model.head] for n in TWO}
        options = {"modalities": spec, "scope": 0.1}
    else:
        head = [model.head, model.head] if how == "heads twice" else model.head
        options = {"modalities": model.options()["modalities"], "heads": dict.fromkeys(TWO, head)}
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), tau=1.5, **options)
    for name in TWO:
        with opt.turn(name):
            step(model, opt, name, 0)
    (audio,), (video,) = (opt.projectors[n].items() for n in TWO)
    assert audio[0] == video[0]
    assert not torch.equal(audio[1], video[1])
    assert opt.last_stats["projected"][audio[0]]["cosine"] < 1


def test_autocast_around_turn_and_step_changes_nothing_of_the_arithmetic():
    made = []
    for autocast in (False, True):
        model, opt = make(tau=1.5)
        model.float()
        opt.state.clear()
        data = batches(TWO, 1, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for name in TWO:
                with opt.turn(name):
                    usual = closure_for(opt, model, name, data[name][0])
                    opt.step(torch.autocast("cpu", enabled=False)(usual))
            assert torch.is_autocast_enabled("cpu") == autocast
        made.append((model, opt))
    (model, opt), (twin, other) = made
    assert unchanged(model, list(twin.parameters()))
    for name in TWO:
        for layer, projector in opt.projectors[name].items():
            assert torch.equal(projector, other.projectors[name][layer])


def test_autocast_in_the_closure_trains():
    model, opt = make(tau=1.5)
    model.float()
    data = batches(TWO, 1, torch.float32)
    for name in TWO:
        with opt.turn(name):

            def closure(name=name):
                opt.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = cross_entropy(model(name, data[name][0][0]), data[name][0][1])
                loss.backward()
                return loss

            opt.step(closure)
    assert opt.last_stats["projected"]["video.0"]["cosine"] < 1
    assert opt.projectors["audio"]["audio.0"].dtype == torch.float32


def test_a_float32_state_of_another_device_goes_on_here():
    model, opt = make(tau=1.5, features="samples")
    for t in range(2):
        with opt.turn("audio"):
            step(model, opt, "audio", t)
    saved = copy.deepcopy(opt.state_dict())
    for parts in saved["igm"]["projection"]["covariances"].values():
        for layer in parts.values():
            for part in layer.values():
                for key in ("rows", "matrix", "total"):
                    part[key] = None if part[key] is None else part[key].float()
    twin, other = make(tau=1.5, features="samples")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    for m, o in ((model, opt), (twin, other)):
        with o.turn("audio"):
            step(m, o, "audio", 2)
    covariance = other.covariances["audio"]["audio.0"]
    assert covariance.dtype == torch.float64
    torch.testing.assert_close(covariance, opt.covariances["audio"]["audio.0"], rtol=1e-5, atol=1e-5)


def test_a_model_whose_memory_format_changes_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    opt = IGMOptimizer(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 4, 4)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    model.to(memory_format=torch.channels_last)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        opt.step(closure)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("projector", ["flat", "orthogonal"])
def test_tau_zero_is_no_projection(projector):
    model, opt = make(SharedHead, projector=projector, tau=0.0, rho=0.0)
    for t in range(3):
        for name in TWO:
            step(model, opt, name, t)
    assert opt.last_stats["projected"] == {}
    assert opt.projectors == {"audio": {}, "video": {}}


@pytest.mark.parametrize("option", [{"projector": "orthogonal"}, {"features": "samples"}], ids=str)
def test_state_of_other_options_is_refused(option):
    _, opt = make()
    _, other = make(**option)
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"the state dict is of {name}='{value}', expected"):
        opt.load_state_dict(other.state_dict())


def test_collect_with_refresh_every_n_steps_and_the_orthogonal_projector():
    model, opt = make(projector="orthogonal", refresh=2, covariance="kept")
    with opt.turn("audio"):
        with opt.collect("audio"):
            model("audio", DATA["audio"][0][0])
        for t in range(5):
            step(model, opt, "audio", t)
    assert set(opt.projectors["audio"]) == {"audio.0", "audio.1"}


@pytest.mark.parametrize("refresh", ["turn", 1])
def test_own_heads_forwarded_together_and_stepped_one_after_the_other(refresh):
    model, opt = make(tau=1.5, rho=0.0, refresh=refresh)
    for t in range(3):
        losses = {n: cross_entropy(model(n, DATA[n][t][0]), DATA[n][t][1]) for n in TWO}
        for name in TWO:
            opt.zero_grad()
            losses[name].backward()
            opt.step()
    assert set(opt.projectors["audio"]) == {"audio.0", "audio.1"}
    assert opt.last_stats["projected"]["video.0"]["cosine"] < 1


def test_one_modality_outside_any_turn_is_told_that_its_projector_is_never_made():
    layer = nn.Linear(4, 2)
    opt = IGMOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), {"a": layer}, heads={"a": layer}, rho=0.0)
    layer(torch.ones(3, 4)).sum().backward()
    with pytest.warns(UserWarning, match="'a' is the only modality and refresh is 'turn'"):
        opt.step()
    opt.step()
    assert opt.projectors == {"a": {}}


def test_one_modality_is_its_own_source():
    """Line 9 of Algorithm 1 with m = 1 gives k = j."""
    layer = nn.Linear(4, 2)
    opt = IGMOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.1), {"a": layer}, heads={"a": layer}, rho=0.0, refresh=1
    )
    for _ in range(2):
        opt.zero_grad()
        layer(torch.ones(3, 4)).sum().backward()
        opt.step()
    assert opt.last_stats["projected"]["a"]["norm_after"] < opt.last_stats["projected"]["a"]["norm_before"]


def test_spectra_of_several_sources_are_told_apart():
    torch.manual_seed(0)
    model = SharedHead(("audio", "video", "text")).double()
    spec = model.options()["modalities"]
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), spec, head=model.head, sources="others")
    data = batches(("audio", "video", "text"), 1)
    for name in ("audio", "video", "text", "audio"):
        with opt.turn(name):
            opt.step(closure_for(opt, model, name, data[name][0]))
    assert set(opt.last_stats["lambda_max"]) == {"video: head", "text: head"}


def test_a_sample_without_a_batch_dimension():
    model, opt = make(rho=0.0)
    with opt.turn("audio"):
        model("audio", DATA["audio"][0][0][0]).square().sum().backward()
        opt.step()
    assert torch.linalg.matrix_rank(opt.covariances["audio"]["audio.0"]) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 0.5}, "alpha is 0.5 with projector='flat'"),
        ({"batches": 3}, "batches is 3 with projector='flat'"),
        ({"normalise": True}, "normalise is True with projector='flat'"),
        ({"projector": "orthogonal", "route": "svd"}, "route is 'svd' with projector='orthogonal'"),
        ({"projector": "orthogonal", "features": "centred"}, "features is 'centred' with projector='orthogonal'"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        make(**options)


def test_reset_that_is_no_name():
    with pytest.raises(TypeError, match="reset is None, expected names among 'momentum', 'lr'"):
        make(reset=None)


def test_a_decomposition_that_fails_leaves_the_projector_counts_and_warns(monkeypatch):
    model, opt = make(tau=1.5)
    with opt.turn("audio"):
        step(model, opt, "audio", 0)
    made = opt.projectors["audio"]["audio.0"]

    def failing(*_args, **_kwargs):
        raise ArithmeticError("did not converge")

    monkeypatch.setattr(igm_rs._igm_rs, "make_projector_from_rows", failing)
    with pytest.warns(RuntimeWarning, match="was left as it was: did not converge"), opt.turn("audio"):
        step(model, opt, "audio", 1)
    assert torch.equal(opt.projectors["audio"]["audio.0"], made)
    assert opt.state_dict()["igm"]["projection"]["failures"] == 2


@pytest.mark.parametrize(
    "work",
    [
        lambda c: igm_rs._igm_rs.make_projector(c, "flat", 3.0, route="eigh"),
        lambda c: igm_rs._igm_rs.make_projector(c, "flat", 3.0, route="svd"),
        lambda c: igm_rs._igm_rs.make_projector(c, "flat", 3.0, route="polynomial"),
        lambda c: igm_rs._igm_rs.make_projector_from_rows(c[:-1], "flat", 3.0),
        igm_rs._igm_rs.singular_values,
    ],
    ids=["eigh", "svd", "polynomial", "rows", "singular values"],
)
def test_other_threads_run_while_a_spectrum_is_computed(work):
    """With the GIL held, another Python thread would stand still from the beginning of the call to its end."""
    rows = torch.randn(700, 600, dtype=torch.float64)
    covariance = rows.T @ rows
    stamps, stop = [], threading.Event()

    def other():
        while not stop.wait(0.001):
            stamps.append(time.perf_counter())

    thread = threading.Thread(target=other)
    thread.start()
    begin = time.perf_counter()
    work(covariance)
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(begin < stamp < end for stamp in stamps) >= 3  # one could slip in at the beginning


def test_warnings_point_at_the_line_that_called():
    """However deep in the package and in torch they come from; also through a hook, out of a forward pass or a turn."""
    weight = nn.Parameter(torch.ones(4))
    opt = IGMOptimizer([weight], lr=0.1, rho=1e-12)

    def closure():
        weight.grad = torch.ones(4)
        return 1.0

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        closure()
        opt.step()
        opt.step(closure)
        layer = nn.Linear(2, 2)
        other = IGMOptimizer(layer.parameters(), {"a": layer}, head=layer, features="samples", lr=0.1, rho=0.0)
        layer(torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])).nan_to_num().sum().backward()
        layer.weight.grad.nan_to_num_()
        other.step()
    said = ["without a closure", "below the resolution", "only modality", "were left out"]
    assert all(words in str(one.message) for words, one in zip(said, caught, strict=True)), [*map(str, caught)]
    assert {one.filename for one in caught} == {__file__}
