"""Rows A10-A14 of the optimizer contract and clipping: what else a step of other people's scripts expects."""

import copy

import pytest
import torch
from models import batches, closure_for, distance, same, unchanged
from test_contract import BASES, TWO, build, every_base, snapshot, weights
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from igm_rs import IGMOptimizer


def plain_closure(opt, model, x, calls=None):
    def closure():
        if calls is not None:
            calls.append(1)
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return closure


# --- A10 ------------------------------------------------------------------------------------------------------------


class OwnNorm(nn.BatchNorm1d):
    """A subclass of `_BatchNorm`, as users write them."""


NORMS = {
    "1d": (nn.BatchNorm1d, (6, 3)),
    "2d": (nn.BatchNorm2d, (6, 3, 2, 2)),
    "3d": (nn.BatchNorm3d, (4, 3, 2, 2, 2)),
    "sync": (nn.SyncBatchNorm, (6, 3)),
    "own": (OwnNorm, (6, 3)),
}


@pytest.mark.parametrize("kind", [kind for kind in NORMS if kind != "sync"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("raises", [False, True])
def test_a10_batchnorm_statistics_advance_once(kind, momentum, raises):
    make, shape = NORMS[kind]
    model = nn.Sequential(make(3, momentum=momentum))
    twin = copy.deepcopy(model)
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {"a": model})
    x = torch.randn(shape) + 1
    calls = []
    usual = plain_closure(opt, model, x, calls)

    def closure():
        loss = usual()
        if raises and len(calls) == 2:
            raise ValueError("in the second pass")
        return loss

    if raises:
        with pytest.raises(ValueError, match="in the second pass"):
            opt.step(closure)
    else:
        opt.step(closure)
    assert len(calls) == 2
    twin(x)
    for name, value in twin[0].named_buffers():
        assert torch.equal(value, dict(model[0].named_buffers())[name]), name
    assert model[0].training
    assert model[0].track_running_stats


def test_a10_every_kind_of_batchnorm_is_known():
    """SyncBatchNorm trains on a GPU only; that it is held like the others is seen on its flag."""
    for make, _ in NORMS.values():
        model = nn.Sequential(make(3))
        opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {"a": model})
        seen = []
        param = model[0].weight

        def closure(param=param, seen=seen, model=model):
            seen.append(model[0].track_running_stats)
            param.grad = torch.ones_like(param)
            return 1.0

        opt.step(closure)
        assert seen == [True, False]
        assert model[0].track_running_stats


@pytest.mark.parametrize("frozen", ["eval", "no statistics"])
def test_a10_frozen_layers_stay_frozen(frozen):
    norm = nn.BatchNorm1d(3, track_running_stats=frozen != "no statistics")
    model = nn.Sequential(nn.Linear(3, 3), norm)
    if frozen == "eval":
        norm.eval()
    before = copy.deepcopy(dict(norm.named_buffers()))
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {"a": model})
    opt.step(plain_closure(opt, model, torch.randn(5, 3)))
    assert same(before, dict(norm.named_buffers()))
    assert norm.training == (frozen != "eval")
    assert norm.track_running_stats == (frozen != "no statistics")


# --- A11 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["step", "first_step", "replay"])
@pytest.mark.parametrize("preserve", [True, False])
def test_a11_both_passes_draw_the_same_dropout_mask(device, form, preserve):
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)).to(device)
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), preserve_rng=preserve)
    x, masks = torch.randn(4, 8, device=device), []

    def closure():
        opt.zero_grad()
        out = model(x)
        masks.append(out == 0)
        loss = out.square().mean()
        loss.backward()
        return loss

    if form == "step":
        opt.step(closure)
    else:
        if preserve:
            opt.remember_rng()
        closure()
        if form == "replay":
            opt.replay(closure)
            opt.step()
        else:
            opt.first_step()
            closure()
            opt.second_step()
    assert len(masks) == 2
    assert torch.equal(*masks) == preserve
    model(x)
    closure()
    assert not torch.equal(masks[-1], masks[0]), "the generators go on"


def test_a11_a_form_that_cannot_know_says_so():
    model = nn.Linear(2, 2)
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), preserve_rng=True)
    closure = plain_closure(opt, model, torch.ones(1, 2))
    before = weights(model)
    closure()
    with pytest.raises(RuntimeError, match=r"first_step with preserve_rng=True .* expected opt.remember_rng\(\)"):
        opt.first_step()
    opt.replay(closure)
    with pytest.raises(RuntimeError, match=r"replay with preserve_rng=True .* expected opt.remember_rng\(\)"):
        opt.step()
    assert unchanged(model, before)


# --- A12 ------------------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("form", ["step()", "step(closure)"])
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_a12_hooks_fire_once_in_order(base, form, rho):
    """The optimizer's own, those set on the base before it was wrapped, and torch's global ones."""
    layer = nn.Linear(2, 2)
    inner, calls = base(layer.parameters()), []
    inner.register_step_pre_hook(lambda opt, *_: calls.append(("base's pre", type(opt).__name__)))
    opt = IGMOptimizer(inner, rho=rho)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    closure = plain_closure(opt, layer, torch.ones(1, 2))
    try:
        if form == "step()":
            closure()
            with pytest.warns(UserWarning, match="without a closure") if rho else _nothing():
                opt.step()
        else:
            opt.step(closure)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", ("base's pre", "IGMOptimizer"), "pre", "post", "global post"]


class _nothing:  # noqa: N801 - stands where pytest.warns stands
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_a12_a_pre_hook_may_change_the_arguments():
    layer = nn.Linear(2, 2)
    opt = IGMOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), rho=0.0)
    calls = []
    closure = plain_closure(opt, layer, torch.ones(1, 2), calls)
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert opt.step() is not None
    assert calls == [1]


# --- A13 ------------------------------------------------------------------------------------------------------------


def micro(model, name, pieces):
    """Closures of the micro-batches, weighted so that their sum is the loss of the whole batch."""
    total = sum(len(y) for _, y in pieces)

    def one(x, y):
        def closure():
            loss = cross_entropy(model(name, x), y) * (len(y) / total)
            loss.backward()
            return loss

        return closure

    return [one(x, y) for x, y in pieces]


@every_base
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("kind", [list, tuple])
def test_a13_a_list_of_closures_accumulates_in_both_passes(base, rho, kind):
    """Without projection (each micro-batch is a batch of Eq. (2) of its own) that is the step of the whole batch."""
    (model, opt), (twin, other) = (build(base, rho=rho, tau=0.0) for _ in range(2))
    for x, y in batches(TWO, 4)["audio"]:
        pieces = list(zip(x.split(4), y.split(4), strict=True))
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)  # what is left from before does not count
        loss = opt.step(kind(micro(model, "audio", pieces)))
        expected = other.step(closure_for(other, twin, "audio", (x, y)))
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)
        assert distance(model, twin) < 1e-12
        assert opt.last_stats["loss"] == loss.item()
        if rho:
            assert opt.last_stats["loss_perturbed"] == pytest.approx(other.last_stats["loss_perturbed"], rel=1e-12)


def test_a13_each_micro_batch_is_a_batch_of_eq_2_and_pass_2_sees_the_same():
    model, opt = build(tau=1.5)
    x, y = batches(TWO, 1)["audio"][0]
    seen = []
    closures = [
        lambda c=c, i=i: (seen.append(i), c())[1]
        for i, c in enumerate(micro(model, "audio", [(x[:4], y[:4]), (x[4:], y[4:])]))
    ]
    with torch.no_grad():
        rows = [model.encoders["audio"](part).mean(0) for part in (x[:4], x[4:])]
    with opt.turn("audio"):
        opt.step(closures)
    assert seen == [0, 1, 0, 1]
    expected = sum(torch.outer(row, row) for row in rows)
    # the means are summed in another order than torch's: entries that nearly cancel differ by rounding of their terms
    size = expected.abs().max().item()
    torch.testing.assert_close(opt.covariances["audio"]["audio.0"], expected, rtol=0, atol=1e-14 * size)


@pytest.mark.parametrize("which", [1, 2])
def test_a13_zero_grad_in_a_closure_of_a_list_is_refused(which):
    model, opt = build()
    before, state = weights(model), snapshot(opt)
    good = micro(model, "audio", batches(TWO, 1)["audio"])[0]
    calls = []

    def bad():
        calls.append(1)
        if len(calls) == which:
            opt.zero_grad()
        return good()

    with pytest.raises(RuntimeError, match="zero_grad inside a closure of a list"):
        opt.step([good, bad])
    assert unchanged(model, before)
    assert same(state, snapshot(opt))
    opt.zero_grad()


# --- A14 ------------------------------------------------------------------------------------------------------------

REFUSED = {
    "complex": lambda: torch.ones(2, dtype=torch.complex64, requires_grad=True),
    "integer": lambda: torch.ones(2, dtype=torch.int64),
    "bool": lambda: torch.ones(2, dtype=torch.bool),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(2).to_sparse().requires_grad_(),
    "csr": lambda: torch.eye(2).to_sparse_csr().requires_grad_(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("where", ["parameters", "group", "base", "add_param_group"])
def test_a14_parameters_that_are_not_dense_and_real_are_refused(kind, where):
    bad, good = REFUSED[kind](), nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"parameter 0 of group \d .*(not supported)"):
        if where == "parameters":
            IGMOptimizer([bad], lr=0.1)
        elif where == "group":
            IGMOptimizer([{"params": [good]}, {"params": [bad]}], lr=0.1)
        elif where == "base":
            IGMOptimizer(torch.optim.SGD([bad], lr=0.1))
        else:
            opt = IGMOptimizer([good], lr=0.1)
            try:
                opt.add_param_group({"params": [bad]})
            finally:
                assert [len(group["params"]) for group in opt.param_groups] == [1]
                assert len(opt.state_dict()["igm"]["initial_lr"]) == 1


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_a14_layers_with_sparse_gradients_are_refused(make):
    model = nn.ModuleDict({"table": make(5, 3, sparse=True), "head": nn.Linear(3, 2)})
    for options in ({"modalities": {"text": model}}, {"model": model}):
        with pytest.raises(ValueError, match=rf"{make.__name__} 'table' has sparse=True, expected sparse=False"):
            IGMOptimizer(model.parameters(), lr=0.1, **options)


def test_a14_a_sparse_gradient_that_nobody_announced_changes_nothing():
    table = nn.Embedding(5, 3, sparse=True)
    opt = IGMOptimizer(table.parameters(), lr=0.1)
    before = table.weight.detach().clone()

    def closure():
        opt.zero_grad()
        loss = table(torch.tensor([1, 2])).square().mean()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"shape \(5, 3\) has the layout torch.sparse_coo, expected a dense tensor"):
        opt.step(closure)
    assert torch.equal(table.weight, before)


# --- clipping -------------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_c_clipping_max_grad_norm_clips_after_projection(base, rho, limit):
    """Against clip_grad_norm_ on the projected gradient, which a twin shows after a step (`.grad` is what was used)."""
    (model, opt), (twin, other) = (build(base, rho=rho, tau=3.0) for _ in range(2))
    opt._core.max_grad_norm = None
    data = batches(TWO, 4)
    for m, o in ((model, opt), (twin, other)):
        for name in TWO:
            with o.turn(name):
                for t in range(2):
                    o.step(closure_for(o, m, name, data[name][t]))
    assert distance(model, twin) == 0
    opt._core.max_grad_norm = limit
    before, state = copy.deepcopy(twin.state_dict()), copy.deepcopy(other.base.state_dict())
    with other.turn("audio"), opt.turn("audio"):
        other.step(closure_for(other, twin, "audio", data["audio"][3]))
        opt.step(closure_for(opt, model, "audio", data["audio"][3]))
    projected = {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}
    twin.load_state_dict(before)
    by_hand = base(twin.parameters())
    by_hand.load_state_dict(state)
    for n, p in twin.named_parameters():
        p.grad = projected.get(n)
    norm = nn.utils.clip_grad_norm_(twin.parameters(), limit)
    by_hand.step()
    assert opt.last_stats["grad_norm_projected"] == pytest.approx(norm.item(), rel=1e-12)
    assert (norm > limit) == (limit < 1)
    assert distance(model, twin) < 1e-14


def test_c_clipping_by_the_user_in_the_form_without_closure():
    (model, opt), (twin, other) = build(rho=0.0, tau=0.0), build(rho=0.0, tau=0.0)
    for x, y in batches(TWO, 3)["audio"]:
        for m, o in ((model, opt), (twin, other.base)):
            o.zero_grad()
            cross_entropy(m("audio", x), y).backward()
            assert nn.utils.clip_grad_norm_(m.parameters(), 1e-2) > 1e-2
            o.step()
        assert distance(model, twin) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_clipping_holds_in_lower_precision(dtype):
    model, opt = build(BASES["sgd"], dtype=dtype, max_grad_norm=1e-2, rho=0.0)
    opt.step(closure_for(opt, model, "audio", batches(TWO, 1, dtype)["audio"][0]))
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-2, rel=1e-5 if dtype == torch.float32 else 1e-2)  # 8 bits of mantissa


# --- precision of parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_c_precision_perturbation_of_half_precision_is_measured_in_float32(dtype):
    """ε* = ρ g/‖g‖ with the norm in at least float32; what of it the dtype keeps is told, once and with the figure."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50, 40).to(dtype))
    opt = IGMOptimizer([weight], lr=0.0)
    gradient = (torch.randn(50, 40) * 100).to(dtype)  # the sum of their squares is beyond float16
    seen = []

    def closure():
        seen.append(weight.detach().clone())
        weight.grad = gradient.clone()
        return 1.0

    for rho, warns in ((0.5, False), (1e-3, True), (1e-3, False)):
        opt.rho = rho
        seen.clear()
        with pytest.warns(UserWarning, match="below the resolution") if warns else _nothing() as caught:
            opt.step(closure)
        exact = seen[0].double() + rho * gradient.double() / gradient.double().norm()
        realised = seen[1].double() - seen[0].double()
        share = realised.norm() / rho
        # one rounding to the dtype, of a sum made in float32: off by half a unit in the last place, and no more
        assert ((seen[1].double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
        assert opt.last_stats["effective_perturbation"] == pytest.approx(share.item(), rel=1e-6)
        assert opt.last_stats["moved"] == pytest.approx((realised != 0).double().mean().item(), rel=1e-12)
        if warns:
            assert f"{share.item():.2%} of the length asked for" in str(caught[0].message)


def test_c_precision_state_of_half_precision_models_is_float32_or_better():
    model, opt = build(dtype=torch.bfloat16, tau=1.5)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.bfloat16)["audio"][0]))
    assert opt.covariances["audio"]["audio.0"].dtype == torch.float64
    assert opt.projectors["audio"]["audio.0"].dtype == torch.float32


@pytest.mark.parametrize("form", ["step", "replay", "first_step"])
@pytest.mark.parametrize(
    "options",
    [{}, {"refresh": 2}, {"project": "update"}, {"atomic": False}, {"max_grad_norm": 0.1}],
    ids=str,
)
def test_a11_a13_masks_micro_batches_and_settings_together(form, options):
    """Dropout in a list of closures, in each form of a step: the same weights as step(list) gives."""

    def setting():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Linear(8, 3)).double()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        opt = IGMOptimizer(base, {"a": model}, head=model[2], preserve_rng=True, tau=1.5, **options)
        return model, opt

    (model, opt), (twin, other) = setting(), setting()
    data = batches(("audio",), 4)["audio"]

    def closures(m):
        def one(x, y):
            def closure():
                loss = cross_entropy(m(x), y) / 2
                loss.backward()
                return loss

            return closure

        return lambda batch: [one(batch[0][:4], batch[1][:4]), one(batch[0][4:], batch[1][4:])]

    with opt.turn("a"), other.turn("a"):
        for t, batch in enumerate(data):
            torch.manual_seed(t)
            other.step(closures(twin)(batch))
            torch.manual_seed(t)
            mine = closures(model)(batch)
            if form == "step":
                opt.step(mine)
                continue
            opt.remember_rng()
            opt.zero_grad()
            for one in mine:
                one()
            if form == "replay":
                opt.replay(mine, loss=other.last_stats["loss"])
                opt.step()
                for name in ("loss", "loss_perturbed", "sharpness"):
                    assert opt.last_stats[name] == pytest.approx(other.last_stats[name], rel=1e-12)
            else:
                opt.first_step(zero_grad=True)
                for one in mine:
                    one()
                opt.second_step()
            assert distance(model, twin) == 0
    assert same(opt.state_dict(), other.state_dict())


def test_c_ddp_projection_in_several_processes_is_refused(monkeypatch):
    model, opt = build()
    before, state = weights(model), snapshot(opt)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    closure = closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0])
    with pytest.raises(RuntimeError, match=r"projection in 2 processes: .* expected tau=0 \(SAM works\), or one"):
        opt.step(closure)
    assert unchanged(model, before)
    assert same(state, snapshot(opt))
    opt.tau = 0.0
    opt.step(closure)
    assert not unchanged(model, before)


@pytest.mark.parametrize("returned", [{"loss": 1.0}, "1.0"])
def test_a13_a_closure_of_a_list_returns_a_loss(returned):
    model, opt = build()
    good = micro(model, "audio", batches(TWO, 1)["audio"])[0]
    with pytest.raises(TypeError, match=rf"closure\[1\] returned a {type(returned).__name__}, expected the loss"):
        opt.step([good, lambda: (good(), returned)[1]])


def test_a5_a_base_with_unusual_state_is_put_back_too():
    """State that is no dict, that belongs to no parameter, and groups that hold numbers of their own."""

    class Unusual(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        self.state["run"]["count"] = self.state["run"].get("count", 0) + 1
                        self.state["last"] = p.grad.sum()
                        if self.fails:
                            raise ArithmeticError("half-way")

    for atomic in (True, False):
        layer = nn.Linear(3, 2)
        base = Unusual(layer.parameters(), lr=0.1, momentum=0.9)
        opt = IGMOptimizer(base, rho=0.05, atomic=atomic)
        closure = plain_closure(opt, layer, torch.ones(4, 3))
        opt.step(closure)
        before, state, k = weights(layer), copy.deepcopy([*base.state.values()]), base.param_groups[0]["k"]
        Unusual.fails = True
        with pytest.raises(ArithmeticError, match="half-way"):
            opt.step(closure)
        Unusual.fails = False
        assert unchanged(layer, before)
        assert base.param_groups[0]["k"] == k
        if atomic:
            assert same(state, [*base.state.values()])
        opt.step(closure)
        assert not unchanged(layer, before)
