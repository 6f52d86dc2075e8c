"""BatchNorm beside SAM: statistics advance once a step, frozen layers stay frozen, nothing stays switched off."""

import copy

import pytest
import torch
from torch import nn

from igm_rs import IGMOptimizer


class Subclass(nn.BatchNorm1d):
    """A user's own layer."""


def build(kind=nn.BatchNorm1d, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), kind(4, **arguments), nn.Linear(4, 2)).double()
    return model, torch.randn(6, 3, dtype=torch.float64)


def closure_for(opt, model, x, fail_at=None):
    calls = []

    def closure():
        opt.zero_grad()
        calls.append(1)
        loss = model(x).square().mean()
        loss.backward()
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return loss

    return closure


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Subclass])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("known", ["modalities", "model"])
def test_statistics_advance_once_a_step(kind, momentum, known):
    model, x = build(kind, momentum=momentum)
    twin = copy.deepcopy(model)
    options = {"modalities": {"a": model}} if known == "modalities" else {"model": model}
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.05, **options)
    for _ in range(2):
        opt.step(closure_for(opt, model, x))
        twin(x)
    for mine, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, expected)
    assert model[1].num_batches_tracked == 2


def test_second_pass_normalises_with_its_own_batch():
    model, x = build()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), {"a": model}, rho=0.05)
    outputs = []
    model[1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach()))
    opt.step(closure_for(opt, model, x))
    torch.testing.assert_close(outputs[1].mean(0), model[1].bias.detach(), rtol=0, atol=0.06)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("fail_at", [1, 2])
def test_after_an_exception_statistics_are_recorded_again(fail_at):
    model, x = build()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), {"a": model}, rho=0.05)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure_for(opt, model, x, fail_at))
    assert model[1].track_running_stats
    opt.step(closure_for(opt, model, x))
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("how", ["eval", "off"])
def test_frozen_layers_stay_frozen(how):
    model, x = build(track_running_stats=how == "eval")
    if how == "eval":
        model[1].eval()
    before = copy.deepcopy(list(model.buffers()))
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {"a": model}, rho=0.05)
    opt.step(closure_for(opt, model, x))
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), before, strict=True))
    assert model[1].track_running_stats == (how == "eval")


def test_two_call_form_holds_them_too():
    model, x = build()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), {"a": model}, rho=0.05)
    for call in (opt.first_step, opt.second_step):
        model(x).square().mean().backward()
        call(zero_grad=True)
    assert model[1].num_batches_tracked == 1
    assert model[1].track_running_stats
