"""Section C of the optimizer contract: GradScaler and autocast, torch.compile, CUDA graphs. Trainers have own files."""

import copy

import pytest
import torch
from models import OwnHeads, batches, closure_for, distance, same, unchanged
from test_contract import BASES, TWO, build, every_base, snapshot, weights
from torch import nn
from torch.nn.functional import cross_entropy

import igm_rs
from igm_rs import IGMOptimizer

SCALE = 2.0**10

PRECISIONS = {
    "float32": (torch.float32, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float16),
}


def scaled(opt, model, name, batch, scaler, autocast=None, spoil=None, calls=None):
    """The usual closure with a GradScaler: the scaled loss goes backward, the loss itself is returned."""
    calls = [] if calls is None else calls

    def closure():
        calls.append(1)
        opt.zero_grad()
        with torch.autocast(batch[0].device.type, dtype=autocast, enabled=autocast is not None):
            loss = cross_entropy(model(name, batch[0]), batch[1])
        scaler.scale(loss).backward()
        if spoil is not None and len(calls) == spoil[0]:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = spoil[1]
        return loss

    return closure


# --- GradScaler and autocast ----------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("form", ["step", "first_step", "replay"])
def test_c_scaler_scaled_run_equals_the_unscaled(device, base, precision, rho, form):
    """The scale is a power of two, so that in float32 and bf16 nothing is lost."""
    dtype, autocast = PRECISIONS[precision]
    (model, opt), (twin, other) = (build(base, dtype=dtype, rho=rho, tau=1.5) for _ in range(2))
    model.to(device)
    twin.to(device)
    opt, other = (IGMOptimizer(base(m.parameters()), **m.options(), rho=rho, tau=1.5) for m in (model, twin))
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    unscaled = torch.amp.GradScaler(device.type, enabled=False)
    data = batches(TWO, 3, dtype, device=device)
    for name in TWO:
        with opt.turn(name), other.turn(name):
            for batch in data[name]:
                closure = scaled(opt, model, name, batch, scaler, autocast)
                if form == "step" or rho == 0:
                    loss = opt.step(closure, scaler=scaler)
                elif form == "first_step":
                    loss = closure()
                    opt.first_step(scaler=scaler)
                    closure()
                    opt.second_step(scaler=scaler)
                else:
                    loss = closure()
                    scaler.unscale_(opt)
                    opt.replay(closure, scaler=scaler)
                    scaler.step(opt)
                scaler.update()
                expected = other.step(scaled(other, twin, name, batch, unscaled, autocast))
                assert loss.item() == pytest.approx(expected.item(), abs=0 if autocast != torch.float16 else 5e-3)
    tolerance = 0 if autocast != torch.float16 else 5e-2 * max(group["lr"] for group in opt.param_groups) / 1e-2
    assert distance(model, twin) <= tolerance
    assert scaler.get_scale() == SCALE
    assert opt.last_stats["step"] == 6
    assert opt.last_stats["grad_norm"] == pytest.approx(
        other.last_stats["grad_norm"], rel=1e-6 if not tolerance else 0.1
    )


@every_base
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("form", ["step", "first_step", "replay"])
def test_c_scaler_infinity_in_either_pass_skips_and_halves_once(device, base, which, poison, form):
    torch.manual_seed(1)
    model = OwnHeads().to(device)
    opt = IGMOptimizer(base(model.parameters()), **model.options(), tau=1.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    data = batches(TWO, 3, torch.float32, device=device)
    for name in TWO:
        with opt.turn(name):
            opt.step(scaled(opt, model, name, data[name][0], scaler), scaler=scaler)
            scaler.update()
    before, state = weights(model), snapshot(opt)
    closure = scaled(opt, model, "audio", data["audio"][1], scaler, spoil=(which, poison))
    with opt.turn("audio"):
        if form == "step":
            opt.step(closure, scaler=scaler)
        elif form == "first_step":
            closure()
            opt.first_step(scaler=scaler)
            closure()
            opt.second_step(scaler=scaler)
        else:
            closure()
            scaler.unscale_(opt)
            opt.replay(closure, scaler=scaler)
            scaler.step(opt)
            if which == 1:  # the scaler does not call step at all
                opt.forget_step()
        scaler.update()
        assert unchanged(model, before)
        assert scaler.get_scale() == SCALE / 2
        after = snapshot(opt)
        assert opt.skipped_steps == (0 if form == "replay" and which == 1 else 1)
        after["igm"]["counters"]["skipped"] = 0
        assert same(state["state"], after["state"])
        assert same(state["igm"]["projection"], after["igm"]["projection"])
        opt.step(scaled(opt, model, "audio", data["audio"][2], scaler), scaler=scaler)
        scaler.update()
    assert not unchanged(model, before)
    assert scaler.get_scale() == SCALE / 2


@every_base
def test_c_scaler_torchs_own_way_with_unscale_and_clipping(base):
    """No closure: unscale_, clip_grad_norm_, scaler.step(opt), and an infinity that skips."""
    torch.manual_seed(1)
    model = OwnHeads()
    twin = copy.deepcopy(model)
    opt, other = IGMOptimizer(base(model.parameters()), **model.options(), rho=0.0, tau=0.0), base(twin.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with opt.turn("audio"):
        for t, (x, y) in enumerate(batches(TWO, 4, torch.float32)["audio"]):
            opt.zero_grad()
            other.zero_grad()
            scaler.scale(cross_entropy(model("audio", x), y)).backward()
            cross_entropy(twin("audio", x), y).backward()
            if t == 2:
                model.heads["audio"][0].bias.grad[0] = float("inf")
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            if t != 2:
                other.step()
            assert distance(model, twin) == 0
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("which", [1, 2])
def test_c_scaler_exception_in_a_pass_leaves_a_scaler_that_goes_on(which):
    torch.manual_seed(1)
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    calls, before = [], weights(model)
    usual = scaled(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0], scaler, calls=calls)

    def failing():
        loss = usual()
        if len(calls) == which:
            raise ValueError("in a pass")
        return loss

    with pytest.raises(ValueError, match="in a pass"):
        opt.step(failing, scaler=scaler)
    assert unchanged(model, before)
    opt.step(usual, scaler=scaler)
    scaler.update()
    assert not unchanged(model, before)
    assert scaler.get_scale() == SCALE


def test_c_scaler_update_that_is_forgotten_is_told():
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    closure = scaled(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0], scaler)
    opt.step(closure, scaler=scaler)
    before = weights(model)
    with pytest.raises(RuntimeError, match="already been called on this optimizer since the last update"):
        opt.step(closure, scaler=scaler)
    assert unchanged(model, before)


def test_c_scaler_list_of_closures():
    """Both halves of a batch, scaled: the step of the whole, unscaled."""
    (model, opt), (twin, other) = (build(dtype=torch.float32, tau=0.0) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    x, y = batches(TWO, 1, torch.float32, size=8)["audio"][0]

    def half(x, y):
        def closure():
            loss = cross_entropy(model("audio", x), y) / 2
            scaler.scale(loss).backward()
            return loss

        return closure

    opt.step([half(x[:4], y[:4]), half(x[4:], y[4:])], scaler=scaler)
    scaler.update()
    other.step(closure_for(other, twin, "audio", (x, y)))
    assert distance(model, twin) < 1e-7


def test_c_scaler_a_step_that_the_scaler_keeps_back_is_forgotten():
    """Neither its features nor its second pass count with the next."""
    (model, opt), (twin, other) = (build(dtype=torch.float32, tau=1.5) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    data = batches(TWO, 3, torch.float32)["audio"]
    with opt.turn("audio"), other.turn("audio"):
        for t, batch in enumerate(data):
            closure = scaled(opt, model, "audio", batch, scaler, spoil=(1, float("inf")) if t == 1 else None)
            closure()
            opt.replay(closure, scaler=scaler)
            scaler.unscale_(opt)
            scaler.step(opt)
            if t == 1:
                opt.forget_step()
            else:
                other.step(closure_for(other, twin, "audio", batch))
            scaler.update()
    assert same(opt.state_dict(), other.state_dict())
    assert distance(model, twin) == 0


def test_c_scaler_without_a_closure_is_refused_as_it_would_unscale_twice():
    _, opt = build(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"scaler is given to step\(\) without a closure, expected scaler.unscale_"):
        opt.step(scaler=torch.amp.GradScaler("cpu"))


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_c_compile_of_the_model(backend, rho):
    (model, opt), (twin, other) = (build(rho=rho, tau=1.5) for _ in range(2))
    compiled = torch.compile(model, backend=backend)
    data = batches(TWO, 3)
    for name in TWO:
        with opt.turn(name), other.turn(name):
            for batch in data[name]:
                opt.step(closure_for(opt, compiled, name, batch))
                other.step(closure_for(other, twin, name, batch))
    assert distance(model, twin) < 1e-12
    assert opt.projectors["audio"].keys() == {"audio.0", "audio.1"}
    for name in TWO:
        for layer, T in other.projectors[name].items():
            torch.testing.assert_close(opt.projectors[name][layer], T, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("form", ["the method", "a function around it"])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_c_compile_of_a_step_without_closure(form, base):
    (model, opt), (twin, other) = (build(base, rho=0.0, tau=1.5) for _ in range(2))

    def around():
        opt.step()

    step = torch.compile(opt.step if form == "the method" else around, backend="aot_eager")
    data = batches(TWO, 3)
    for name in TWO:
        with opt.turn(name), other.turn(name):
            for batch in data[name]:
                for m, o, s in ((model, opt, step), (twin, other, other.step)):
                    o.zero_grad()
                    cross_entropy(m(name, batch[0]), batch[1]).backward()
                    s()
                assert distance(model, twin) == 0
    assert same(opt.state_dict(), other.state_dict())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor imports it
def test_c_compile_with_the_default_backend():
    """Inductor compiles C++; the numbers are those of another order of sums."""
    (model, opt), (twin, other) = (build(tau=1.5) for _ in range(2))
    compiled = torch.compile(model)
    batch = batches(TWO, 1)["audio"][0]
    with opt.turn("audio"), other.turn("audio"):
        opt.step(closure_for(opt, compiled, "audio", batch))
        other.step(closure_for(other, twin, "audio", batch))
    assert distance(model, twin) < 1e-12


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_c_graphs_forward_backward_and_step_between_two_refreshes(rho, base, spoilt):
    """Warm up, capture, replay: the weights of as many steps without a graph; a NaN in a replay moves nothing."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        "adam": lambda p: torch.optim.Adam(p, lr=1e-2, capturable=True),
    }[base]
    torch.manual_seed(1)
    model = OwnHeads().cuda()
    twin = copy.deepcopy(model)
    opt, other = (IGMOptimizer(make(m.parameters()), **m.options(), rho=rho, tau=1.5) for m in (model, twin))
    data = batches(TWO, 9, torch.float32, device="cuda")
    x, y = (part.clone() for part in data["audio"][0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for m, o in ((model, opt), (twin, other)):
            for name in ("video", "audio"):
                with o.turn(name):
                    for t in range(3):
                        o.step(closure_for(o, m, name, data[name][t]))
    torch.cuda.current_stream().wait_stream(stream)
    assert distance(model, twin) == 0
    graph = torch.cuda.CUDAGraph()
    counters = snapshot(opt)["igm"]
    with opt.turn("audio"), torch.cuda.graph(graph):
        opt.step(closure_for(opt, model, "audio", (x, y)))
    assert distance(model, twin) == 0, "nothing is computed while a graph is recorded"
    assert same(counters, snapshot(opt)["igm"])
    with other.turn("audio"):
        for t in range(3, 9):
            x.copy_(data["audio"][t][0])
            y.copy_(data["audio"][t][1])
            if spoilt and t == 5:
                before = weights(model)
                x[0, 0] = float("nan")
                graph.replay()
                assert unchanged(model, before)
                continue
            graph.replay()
            other.step(closure_for(other, twin, "audio", data["audio"][t]))
    assert distance(model, twin) < 1e-5


@every_base
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("project", ["gradient", "update"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_c_graphs_what_is_recorded_is_the_step(monkeypatch, base, rho, project, spoilt):
    """The recorded form, which looks at no number, run on the CPU: the same weights, and a NaN moves nothing."""
    (model, opt), (twin, other) = (build(base, rho=rho, tau=1.5, project=project) for _ in range(2))
    data = batches(TWO, 6)
    for m, o in ((model, opt), (twin, other)):
        for name in ("video", "audio"):
            with o.turn(name):
                for t in range(2):
                    o.step(closure_for(o, m, name, data[name][t]))
    counters = snapshot(opt)["igm"]["counters"]
    usual = closure_for(opt, model, "audio", data["audio"][2])
    calls = []

    def closure():
        calls.append(1)
        loss = usual()
        if spoilt and len(calls) == (2 if rho else 1):
            model.heads["audio"][0].bias.grad[0] = float("nan")
        return loss

    before, state = weights(model), copy.deepcopy(opt.base.state_dict())
    with monkeypatch.context() as patch, opt.turn("audio"):
        patch.setattr(igm_rs._step, "capturing", lambda params: True)
        opt.step(closure)
    assert len(calls) == (2 if rho else 1)
    assert same(counters, snapshot(opt)["igm"]["counters"])
    if spoilt:
        assert unchanged(model, before)
        assert same(state, opt.base.state_dict())
    else:
        with other.turn("audio"):
            other.step(closure_for(other, twin, "audio", data["audio"][2]))
        assert distance(model, twin) == 0
        assert same(opt.base.state_dict(), other.base.state_dict())


def test_c_graphs_preserve_rng_is_refused(monkeypatch):
    model, opt = build(preserve_rng=True)
    before = weights(model)
    monkeypatch.setattr(igm_rs._step, "capturing", lambda params: True)
    with pytest.raises(RuntimeError, match="preserve_rng=True while a CUDA graph is recorded"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0]))
    assert unchanged(model, before)
