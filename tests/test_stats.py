"""last_stats, spectrum, projectors: what is told of a step is what was done."""

import math

import numpy as np
import pytest
import torch
from models import OwnHeads, batches, closure_for
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer, StepStats

TWO = ("audio", "video")


def trained(**options):
    torch.manual_seed(0)
    model = OwnHeads().double()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), **({"tau": 2.0} | options))
    data = batches(TWO, 4)
    for name in TWO:
        with opt.turn(name):
            for t in range(3):
                opt.step(closure_for(opt, model, name, data[name][t]))
    return model, opt, data


def test_stats_of_a_step_are_what_was_done():
    model, opt, data = trained()
    x, y = data["audio"][3]
    calls = []

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model("audio", x), y)
        loss.backward()
        calls.append((loss.item(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
        return loss

    with opt.turn("audio"):
        opt.step(closure)
        stats = opt.last_stats
    assert isinstance(stats, StepStats)
    assert (stats["active"], stats["sources"], stats["turn"], stats["round"], stats["step"]) == (
        "audio",
        ["video"],
        2,
        1,
        7,
    )
    assert (stats["skipped"], stats["skipped_steps"]) == (False, 0)
    (first, g), (second, h) = calls
    assert stats["loss"] == first
    assert stats["loss_perturbed"] == second
    assert stats["sharpness"] == second - first
    for key, gradients in (("grad_norm", g), ("grad_norm_perturbed", h)):
        norm = math.sqrt(sum(float((v * v).sum()) for v in gradients.values()))
        assert stats[key] == pytest.approx(norm, rel=1e-13)
    assert stats["effective_perturbation"] == pytest.approx(1.0, abs=1e-9)
    assert stats["moved"] == 1.0
    for layer, key in (("audio.0", "heads.audio.0.weight"), ("audio.1", "heads.audio.2.weight")):
        projector = opt.projectors["video"][layer.replace("audio", "video")]
        after = h[key] @ projector
        told = stats["projected"][layer]
        assert told["norm_before"] == pytest.approx(float(h[key].norm()), rel=1e-12)
        assert told["norm_after"] == pytest.approx(float(after.norm()), rel=1e-12)
        cosine = float((h[key] * after).sum() / (h[key].norm() * after.norm()))
        assert told["cosine"] == pytest.approx(cosine, rel=1e-12)
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, after, rtol=0, atol=1e-14)
    spectrum = opt.spectrum("video")["video.0"]
    assert stats["lambda_max"]["video.0"] == pytest.approx(spectrum[0], rel=1e-12)
    assert stats["lambda_min"]["video.0"] == pytest.approx(spectrum[-1], abs=1e-12)
    share = spectrum[spectrum > 1e-12] / spectrum.sum()
    assert stats["effective_rank"]["video.0"] == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_stats_read_like_a_mapping_and_print():
    _, opt, _ = trained()
    stats = opt.last_stats
    assert set(stats) == {
        "active", "sources", "turn", "round", "step", "skipped", "skipped_steps", "loss", "loss_perturbed", "sharpness",
        "grad_norm", "grad_norm_perturbed", "grad_norm_projected", "effective_perturbation", "moved", "projected",
        "lambda_max", "lambda_min", "effective_rank", "top_share", "routes", "second_pass",
    }  # fmt: skip
    assert len(stats) == len(dict(stats))
    assert "'active': 'video'" in repr(stats)
    with pytest.raises(KeyError):
        stats["accuracy"]


def test_stats_before_any_step_and_without_sam():
    model = OwnHeads()
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), rho=0.0)
    assert dict(opt.last_stats) == {}
    closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0])()
    opt.step()
    for key in ("loss", "loss_perturbed", "sharpness", "grad_norm_perturbed", "effective_perturbation", "moved"):
        assert opt.last_stats[key] is None
    assert opt.last_stats["projected"] == {}


def test_stats_keep_no_graph_alive():
    model, opt, data = trained()
    with opt.turn("audio"):
        loss = opt.step(closure_for(opt, model, "audio", data["audio"][0]))
    assert loss.requires_grad
    assert not opt.last_stats._entries["loss"].args[0]["loss"].requires_grad


@pytest.mark.parametrize("closure_returns", [lambda loss: loss.item(), lambda loss: (loss, 1)])
def test_whatever_the_closure_returns_is_returned(closure_returns):
    model, opt, data = trained()
    usual = closure_for(opt, model, "audio", data["audio"][0])
    with opt.turn("audio"):
        result = opt.step(lambda: closure_returns(usual()))
    assert type(result) in (float, tuple)
    assert isinstance(opt.last_stats["loss"], float) == isinstance(result, float)


def test_spectrum_and_projectors():
    _, opt, _ = trained()
    spectra = opt.spectrum()
    assert spectra.keys() == {"audio", "video"}
    for name in TWO:
        for layer, values in spectra[name].items():
            assert isinstance(values, np.ndarray)
            assert values.dtype == np.float64
            assert (np.diff(values) <= 0).all()
            covariance = opt.covariances[name][layer]
            np.testing.assert_allclose(values, torch.linalg.svdvals(covariance).numpy(), rtol=0, atol=1e-12)
            projector = opt.projectors[name][layer]
            assert torch.equal(projector, projector.T)
            eigenvalues = torch.linalg.eigvalsh(projector)
            assert eigenvalues.min() >= math.exp(-2.0) - 1e-12
            assert eigenvalues.max() <= 1 + 1e-12


def test_effective_perturbation_falls_with_rho():
    told = {}
    for rho in (0.05, 1e-6, 1e-8):
        torch.manual_seed(0)
        model = OwnHeads()
        opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **model.options(), rho=rho)
        opt._core.warned.add("perturbation")  # the warning has its own test
        with opt.turn("audio"):
            opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
        told[rho] = opt.last_stats["moved"]
    assert told[0.05] > 0.99 > told[1e-6] > told[1e-8]
